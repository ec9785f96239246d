"""The bench of harvests, small: every tracker gives a row, and each harvest was checked in the run."""

from __future__ import annotations

import pytest

from ckptd.bench.harvest import bench_harvest
from tests.guests.kvm.machines import needs_kvm, ring_here


@pytest.mark.kvm
@needs_kvm
def test_rows_of_all_trackers() -> None:
    found = bench_harvest(sizes=(8 << 20, 16 << 20), counts=(10, 500), rounds=2, say=lambda _: None)
    trackers = {"kvm-bitmap", "kvm-manual", *(() if ring_here() else ("kvm-ring",))}
    rows = {(row["tracker"], row["memory_bytes"], row["dirty_pages"]) for row in found["rows"]}
    assert rows == {(one, size << 20, count) for one in trackers for size in (8, 16) for count in (10, 500)}
    for row in found["rows"]:
        assert row.keys() == {"tracker", "memory_bytes", "dirty_pages", "harvest_us", "bare_us", "ratio"}
        assert row["harvest_us"] > 0 and row["bare_us"] > 0
    assert set(found["left_out"]) == {"kvm-bitmap", "kvm-manual", "kvm-ring"} - trackers
