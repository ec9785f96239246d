"""The bench of harvests, small: every tracker gives its rows, each harvest was checked, the report can be written.

No figure is judged here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptd.bench import harvest_report
from ckptd.bench.bare import SCANS
from ckptd.bench.harvest import _beyond, bench_harvest
from ckptd.errors import CkptdError, ConfigError, TrackerError
from ckptd.memory.dirtyset import DirtySet, gfns_of_bitmap
from tests.guests.kvm.machines import needs_kvm, ring_here

from .test_bench import bench

KEYS = {"tracker", "memory_bytes", "dirty_pages", "harvest_us", "bare_us", "ratio"}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench_harvest(sizes=(16 << 20, 8 << 20), counts=(500, 10), rounds=1, say=lambda _: None)


@pytest.mark.kvm
@needs_kvm
def test_every_tracker_has_a_row_for_each_size_and_count(result: dict[str, Any]) -> None:
    trackers = {"kvm-bitmap", "kvm-manual", *(() if ring_here() else ("kvm-ring",))}
    assert set(result["left_out"]) == {"kvm-bitmap", "kvm-manual", "kvm-ring"} - trackers
    rows = result["rows"]
    found = [(row["tracker"], row["memory_bytes"], row["dirty_pages"]) for row in rows]
    wanted = {(one, size << 20, count) for one in trackers for size in (8, 16) for count in (10, 500)}
    assert set(found) == wanted and len(found) == len(wanted)
    for row in rows:
        assert row.keys() >= KEYS
        assert row["harvest_us"] > 0 and row["bare_us"] > 0 and row["ratio"] > 0 and row["pages_beyond"] >= 0
    assert result["met"] == (not result["misses"]) == all(row["ratio"] <= result["limit_ratio"] for row in rows)
    growth = [] if ring_here() else [10, 500]
    assert [one["dirty_pages"] for one in result["ring_growth"]] == growth
    assert all(one["memory_bytes"] == [8 << 20, 16 << 20] and one["ratio"] > 0 for one in result["ring_growth"])
    assert len(result["starts"]) == 2 * len(trackers) and result["conditions"]["kvm"]


@pytest.mark.kvm
@needs_kvm
def test_the_command_gives_json_and_writes_tables_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    table, plot = tmp_path / "table.md", tmp_path / "plot.svg"
    arguments = ["--memory", "8MiB", "--dirty", "10,300", "--rounds", "1", "--markdown", str(table)]
    found = bench("harvest", *arguments, "--plot", str(plot))
    assert found["bench"] == "harvest" and {row["dirty_pages"] for row in found["rows"]} == {10, 300}
    assert "| kvm-manual | 8 MiB | 300 |" in table.read_text()
    assert plot.read_text().startswith("<?xml") and "300 dirty pages" in plot.read_text()


@pytest.mark.kvm
@needs_kvm
def test_the_report_says_what_was_measured_and_on_what(result: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads(json.dumps(result)) == result
    text = harvest_report.markdown(result)
    assert result["conditions"]["kernel"] in text and text.count("| kvm-bitmap | 8 MiB |") == 3
    assert len(list(harvest_report.lines(result))) == len(result["rows"]) + len(result["ring_growth"])
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    harvest_report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_harvest_that_lacks_a_written_page_ends_the_bench() -> None:
    written = np.array([7, 3, 5])
    assert _beyond(written, np.array([3, 5, 7])) == 0
    assert _beyond(written, DirtySet([np.array([3, 4, 5, 7, 9])])) == 2
    with pytest.raises(TrackerError, match="1 of 3 written pages"):
        _beyond(written, DirtySet([np.array([3, 7])]))
    with pytest.raises(TrackerError, match="lost"):
        _beyond(written, DirtySet([np.array([3, 5, 7])], overflowed=True))


@pytest.mark.parametrize(
    ("sizes", "counts", "rounds"),
    [((), (10,), 1), ((8 << 20,), (), 1), ((8 << 20,), (10,), 0), ((8 << 20,), (0,), 1), ((8 << 20,), (3000,), 1)],
)
def test_what_cannot_be_measured_is_said(sizes: Sequence[int], counts: Sequence[int], rounds: int) -> None:
    with pytest.raises(ConfigError):
        bench_harvest(sizes=sizes, counts=counts, rounds=rounds)


def test_a_plot_that_cannot_be_made_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="svg"):
        harvest_report.check_plot(Path("plot.gif"))
    monkeypatch.setattr(harvest_report, "find_spec", lambda _: None)
    with pytest.raises(CkptdError, match="matplotlib") as raised:
        harvest_report.check_plot(Path("plot.svg"))
    assert "pip install" in (raised.value.hint or "")


@pytest.mark.parametrize("dirty", [0, 1, 300, 5_000, 60_000])
@pytest.mark.parametrize("pages", [64, 1_000, 32_768, 32_800, 100_000, 1 << 20])
def test_all_scans_find_the_same(pages: int, dirty: int) -> None:
    rng = np.random.default_rng(pages + dirty)
    wanted = np.unique(rng.integers(0, pages, dirty))
    words = np.zeros(-(-pages // 64), dtype=np.uint64)
    np.bitwise_or.at(words, wanted >> 6, np.uint64(1) << (wanted & 63).astype(np.uint64))
    assert np.array_equal(gfns_of_bitmap(words, pages), wanted)
    for name, scan in SCANS.items():
        assert np.array_equal(scan(words), wanted), name
