"""`ckptd bench`: measure every figure that the documents claim."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ckptd.cli.common import Json, emit
from ckptd.errors import ConfigError
from ckptd.units import format_size, parse_size

__all__ = ["bench"]


def bench(
    what: Annotated[Literal["all", "link", "epoch", "harvest", "qemu"], Parameter()] = "all",
    *,
    memory: str | None = None,
    seconds: float | None = None,
    rounds: int | None = None,
    batch: str = "4MiB",
    pages: int = 1000,
    interval: int = 10,
    tracker: Literal["bitmap", "ring"] = "bitmap",
    level: Literal["memory", "durable"] = "memory",
    encoding: Literal["raw", "xor-lz4", "auto"] = "raw",
    sizes: bool = True,
    dirty: str = "100,1000,10000",
    plot: Path | None = None,
    markdown: Path | None = None,
    as_json: Json = False,
) -> None:
    """Measure on this machine; every result names its limit or its peer in the same run.

    Parameters
    ----------
    what
        link: the first image beside a plain TCP pair. epoch: steady protection, 1,000 dirty pages in each epoch.
        harvest: a harvest of KVM's dirty log beside the bare ioctls and the cheapest scan, for each tracker. qemu: a
        Linux in stock QEMU, alone, protected and promoted; some minutes.
    memory
        Of the guest: 2GiB for link, 1GiB for epoch; 64MiB,1GiB,16GiB,64GiB for harvest.
    seconds
        How long epoch (60) and each part of qemu (10) runs.
    rounds
        How often link (5) and harvest (15, more with few pages) alternate between the bare peer and ours.
    batch
        Bytes in a frame of link.
    pages
        Dirty pages in each interval of epoch.
    interval
        Of epoch, in ms.
    sizes
        Also measure the pause at 256 MiB and 4 GiB.
    dirty
        Dirty pages of harvest, one number or several.
    plot
        Of harvest: write a plot, .svg or .png (needs matplotlib).
    markdown
        Of harvest: write its tables, as docs/dirty-tracking.md has them.
    """
    from ckptd.daemon.logs import set_up_log

    set_up_log("error", "text")
    if plot is not None:
        from ckptd.bench.harvest_report import check_plot

        check_plot(plot)
    results: list[dict[str, Any]] = []
    if what in ("all", "link"):
        from ckptd.bench.link import bench_link

        _say("the first image, and a plain pair")
        results.append(bench_link(parse_size(memory or "2GiB"), rounds or 5, parse_size(batch)))
    if what in ("all", "epoch"):
        from ckptd.bench.epoch import bench_epoch

        results.append(bench_epoch(
            memory_bytes=parse_size(memory or "1GiB"), pages=pages, seconds=seconds or 60.0, interval_ms=interval,
            tracker=tracker, level=level, encoding=encoding, sizes=(256 << 20, 4 << 30) if sizes else (), say=_say,
        ))  # fmt: skip
    if what == "harvest" or (what == "all" and _harvest_runs_here()):
        results.append(_harvest(None if what == "all" else memory, dirty, rounds, plot, markdown))
    if what == "qemu" or (what == "all" and shutil.which("qemu-system-x86_64")):
        from ckptd.bench.qemu import bench_qemu

        results.append(bench_qemu(seconds=seconds or 10.0, say=_say))
    emit(results[0] if what != "all" else {"results": results}, as_json, lambda _: _table(results))


def _harvest_runs_here() -> bool:
    from ckptd.bench.harvest import check_host
    from ckptd.errors import GuestError, TrackerUnavailable

    try:
        check_host()
    except (TrackerUnavailable, GuestError) as error:
        print(f"left out: harvest: {error}", file=sys.stderr)
        return False
    return True


def _harvest(
    memory: str | None, dirty: str, rounds: int | None, plot: Path | None, markdown: Path | None
) -> dict[str, Any]:
    from ckptd.bench import harvest, harvest_report

    sizes = [parse_size(one) for one in memory.split(",")] if memory else harvest.SIZES
    result = harvest.bench_harvest(sizes=sizes, counts=_numbers(dirty), rounds=rounds or harvest.ROUNDS, say=_say)
    if plot is not None:
        harvest_report.plot(result, plot)
    if markdown is not None:
        markdown.write_text(harvest_report.markdown(result))
    return result


def _numbers(text: str) -> list[int]:
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is no list of numbers", hint="such as 100,1000", field="--dirty") from None


def _say(text: str) -> None:
    print(f"measuring: {text}", file=sys.stderr)


def _table(results: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("bench", "figure", "measured", "limit", title="on this machine, now")
    for result in results:
        if result["bench"] == "link":
            label = f"first image of {format_size(result['memory_bytes'])}"
            table.add_row("link", label, f"{result['first_image_gbps']} GB/s", "")
            table.add_row("", "plain TCP pair", f"{result['raw_loopback_gbps']} GB/s", "")
            table.add_row("", "ratio", f"{result['first_image_ratio']}", f"at least {result['target_ratio']}")
            continue
        if result["bench"] == "harvest":
            from ckptd.bench.harvest_report import lines

            for line in lines(result):
                table.add_row(*line)
            continue
        if result["bench"] == "qemu":
            for key, limit in result["limits"].items():
                table.add_row("qemu", key, f"{result[key]}", f"at most {limit}")
            for key in ("bare_pause_ms_p50", "epochs_per_second", "epochs_per_second_at_40", "dirty_pages"):
                table.add_row("", key, f"{result[key]}", "")
            for key in ("slowdown", "response_ms", "promote_large_ms"):
                table.add_row("", key, ", ".join(f"{name}: {value}" for name, value in result[key].items()), "")
            continue
        for key, limit in result["limits"].items():
            table.add_row("epoch", key, f"{result[key]}", f"at most {limit}")
        for key in ("epochs_per_second", "dirty_pages_per_epoch", "rss_growth_mib"):
            table.add_row("", key, f"{result[key]}", "")
        for one in result["pause_by_size"]:
            label = f"pause at {format_size(one['memory_bytes'])}"
            table.add_row("", label, f"{one['pause_ms_p50']} ms", f"tracker's scan {one['tracker_scan_ms']} ms")
    return table
