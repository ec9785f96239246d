"""`ckptd bench`: measure every figure that the documents claim."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ckptd.cli.common import Json, emit
from ckptd.units import format_size, parse_size

__all__ = ["bench"]


def bench(
    what: Annotated[Literal["all", "link", "epoch", "harvest"], Parameter()] = "all",
    *,
    memory: str | None = None,
    seconds: float = 60.0,
    rounds: int = 5,
    batch: str = "4MiB",
    pages: int = 1000,
    interval: int = 10,
    tracker: Literal["bitmap", "ring"] = "bitmap",
    level: Literal["memory", "durable"] = "memory",
    encoding: Literal["raw", "xor-lz4", "auto"] = "raw",
    sizes: bool = True,
    as_json: Json = False,
) -> None:
    """Measure on this machine; every result names its limit or its peer in the same run.

    Parameters
    ----------
    what
        link: the first image beside a plain TCP pair. epoch: steady protection, 1,000 dirty pages in each epoch.
        harvest: what a harvest of KVM's dirty log costs, beside the bare ioctls.
    memory
        Of the guest: 2GiB for link, 1GiB for epoch.
    seconds
        How long epoch runs.
    rounds
        How often link alternates between the plain pair and ours.
    batch
        Bytes in a frame of link.
    pages
        Dirty pages in each interval of epoch.
    interval
        Of epoch, in ms.
    sizes
        Also measure the pause at 256 MiB and 4 GiB.
    """
    from ckptd.daemon.logs import set_up_log

    set_up_log("error", "text")
    results: list[dict[str, Any]] = []
    if what in ("all", "link"):
        from ckptd.bench.link import bench_link

        _say("the first image, and a plain pair")
        results.append(bench_link(parse_size(memory or "2GiB"), rounds, parse_size(batch)))
    if what in ("all", "epoch"):
        from ckptd.bench.epoch import bench_epoch

        results.append(bench_epoch(
            memory_bytes=parse_size(memory or "1GiB"), pages=pages, seconds=seconds, interval_ms=interval,
            tracker=tracker, level=level, encoding=encoding, sizes=(256 << 20, 4 << 30) if sizes else (), say=_say,
        ))  # fmt: skip
    if what in ("all", "harvest"):
        from ckptd.bench.harvest import bench_harvest
        from ckptd.errors import TrackerUnavailable

        try:
            results.append(bench_harvest(say=_say))
        except TrackerUnavailable as error:
            if what == "harvest":
                raise
            _say(f"no harvest: {error}")
    emit(results[0] if what != "all" else {"results": results}, as_json, lambda _: _table(results))


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
            for row in result["rows"]:
                label = f"{row['tracker']}, {format_size(row['memory_bytes'])}, {row['dirty_pages']} dirty"
                figures = f"{row['harvest_us']} us, bare {row['bare_us']} us: {row['ratio']}"
                table.add_row("harvest", label, figures, f"at most {result['limit_ratio']}")
            table.add_row("", "the ring, largest beside smallest memory", f"{result['ring_growth']}", "about 1")
            continue
        for key, limit in result["limits"].items():
            table.add_row("epoch", key, f"{result[key]}", f"at most {limit}")
        for key in ("epochs_per_second", "dirty_pages_per_epoch", "rss_growth_mib"):
            table.add_row("", key, f"{result[key]}", "")
        for one in result["pause_by_size"]:
            label = f"pause at {format_size(one['memory_bytes'])}"
            table.add_row("", label, f"{one['pause_ms_p50']} ms", f"tracker's scan {one['tracker_scan_ms']} ms")
    return table
