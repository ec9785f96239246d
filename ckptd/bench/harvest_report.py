"""The result of `ckptd bench harvest` for people: lines of a table, a document's part in Markdown, a plot."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ckptd.errors import CkptdError, ConfigError
from ckptd.units import format_size

__all__ = ["check_plot", "lines", "markdown", "plot"]

_COLOURS = {"kvm-bitmap": "#c44e52", "kvm-manual": "#4c72b0", "kvm-ring": "#55a868"}


def lines(result: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """For the table of all benches: bench, figure, measured, limit."""
    limit = f"at most {result['limit_ratio']}"
    for row in result["rows"]:
        label = f"{row['tracker']}, {format_size(row['memory_bytes'])}, {row['dirty_pages']:,} dirty"
        figures = f"{row['harvest_us']} us, bare {row['bare_us']} us, ratio {row['ratio']:.2f}"
        yield "harvest", label, figures, limit
    for one in result["ring_growth"]:
        small, large = map(format_size, one["memory_bytes"])
        label = f"kvm-ring, {one['dirty_pages']:,} dirty: {large} beside {small}"
        yield "harvest", label, f"ratio {one['ratio']:.2f}", "about 1"
    for name, why in result["left_out"].items():
        yield "harvest", name, "left out", why


def markdown(result: dict[str, Any]) -> str:
    """All tables of a run, and what it ran on."""
    rows, limit = result["rows"], result["limit_ratio"]
    parts = [_measured_on(result)]
    head = ("tracker", "memory", "dirty pages", "harvest, µs", "bare, µs", "ratio", f"at most {limit}", "unsorted, µs")
    cells: list[tuple[str, ...]] = [
        (
            row["tracker"], format_size(row["memory_bytes"]), f"{row['dirty_pages']:,}", _spread(row, "harvest_us"),
            _spread(row, "bare_us"), f"{row['ratio']:.2f}", "yes" if row["ratio"] <= limit else "**no**",
            f"{row['unsorted_us']:,.1f}" if "unsorted_us" in row else "",
        )
        for row in rows
    ]  # fmt: skip
    parts.append(_table(head, cells))
    if result["ring_growth"]:
        small, large = map(format_size, result["ring_growth"][0]["memory_bytes"])
        parts.append("The ring with the same pages in the smallest and in the largest memory:")
        parts.append(_table(
            ("dirty pages", f"{small}, µs", f"{large}, µs", "ratio"),
            [(f"{one['dirty_pages']:,}", *map(str, one["harvest_us"]), f"{one['ratio']:.2f}")
             for one in result["ring_growth"]],
        ))  # fmt: skip
    parts.append("To begin: the log turned on with the guest paused, and the first harvest:")
    parts.append(_table(
        ("tracker", "memory", "start, ms", "first harvest, ms", "pages in it"),
        [
            (one["tracker"], format_size(one["memory_bytes"]), f"{one['start_ms']:.1f}",
             f"{one['first_harvest_ms']:.1f}", f"{one['first_harvest_pages']:,}")
            for one in result["starts"]
        ],
    ))  # fmt: skip
    parts += [f"{name} was left out: {why}." for name, why in result["left_out"].items()]
    return "\n\n".join(parts) + "\n"


def _measured_on(result: dict[str, Any]) -> str:
    at, rounds = result["conditions"], [row["rounds"] for row in result["rows"]]
    paging = "hardware" if at["hardware_paging"] else "shadow"
    return (
        f"Measured on: {at['cpu']}, {at['cores']} cores, {at['memory_gib']} GiB; Linux {at['kernel']}, {at['kvm']}"
        f" ({paging} paging); Python {at['python']}, numpy {at['numpy']}; load {at['load']} at the end"
        f"{', at real-time priority' if at['realtime'] else ''}. One vCPU, a ring of {at['ring_entries']:,} entries;"
        f" {min(rounds)} to {max(rounds)} rounds, more where pages are few. Medians, quartiles in brackets."
    )


def _spread(row: dict[str, Any], key: str) -> str:
    low, high = row[f"{key}_quartiles"]
    return f"{row[key]:,.1f} ({low:,.0f} to {high:,.0f})"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ("---",) * len(head), *rows])


def check_plot(path: Path) -> None:
    """Before anything is measured: raises ConfigError or CkptdError if it could not be plotted."""
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"a plot is a .png or .svg, not {path.name!r}", field="--plot")
    if find_spec("matplotlib") is None:
        raise CkptdError("a plot needs matplotlib, which is missing", hint="python -m pip install 'matplotlib>=3.9'")


def plot(result: dict[str, Any], path: Path) -> None:
    """Cost against memory, both logarithmic; a panel for each number of dirty pages."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = result["rows"]
    counts = sorted({row["dirty_pages"] for row in rows})
    sizes = sorted({row["memory_bytes"] for row in rows})
    # Text stays text, and neither date nor chance is in the file: the same figures make the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ckptd", "font.size": 9}):
        figure = Figure(figsize=(3.2 * len(counts) + 0.8, 3.8), layout="constrained")
        panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
        for panel, count in zip(panels, counts, strict=True):
            for tracker, colour in _COLOURS.items():
                of = sorted(
                    (row["memory_bytes"], row["harvest_us"], row["bare_us"])
                    for row in rows
                    if row["tracker"] == tracker and row["dirty_pages"] == count
                )
                if of:
                    memory, harvest, bare = zip(*of, strict=True)
                    panel.plot(memory, harvest, "o-", color=colour, markersize=4, label=tracker)
                    panel.plot(memory, bare, ":", color=colour, label=f"{tracker}, bare")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(sizes, [format_size(size) for size in sizes])
            panel.minorticks_off()
            panel.set_title(f"{count:,} dirty pages")
            panel.set_xlabel("memory")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("a harvest, µs")
        panels[0].legend(fontsize=7)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
