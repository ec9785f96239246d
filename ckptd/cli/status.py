"""`ckptd status`: what a daemon does and holds, once or again and again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ckptd.cli.common import Json, emit
from ckptd.cli.daemons import Config, Socket, find_daemon
from ckptd.errors import ConfigError
from ckptd.units import format_duration, format_size, parse_duration

__all__ = ["Sampler", "shown", "status"]

_FIRST_SAMPLE = 0.25  # seconds between the two samples that a rate needs
_STYLES = {"protected": "green", "receiving": "green", "promoted": "green", "fenced": "red", "unprotected": "red"}
_COUNTED = ("dirty_pages", "wire_bytes", "epochs_committed", "outputs_released", "pages_received", "bytes_received")


def status(
    *,
    config: Config = None,
    socket: Socket = None,
    watch: Annotated[bool, Parameter(negative=(), help="Again and again, until interrupted.")] = False,
    every: Annotated[str, Parameter(help="The time between two looks with --watch.")] = "1s",
    as_json: Json = False,
) -> None:
    """Show what a daemon does and holds.

    With --watch and --json: one object a line.
    """
    interval = parse_duration(every) / 1e9
    if not 0.05 <= interval <= 3600:
        raise ConfigError(f"--every {every} is not between 50ms and 1h")
    sampler = Sampler(find_daemon(config, socket))
    sampler.sample()
    time.sleep(min(interval, _FIRST_SAMPLE))
    if not watch:
        emit(sampler.sample(), as_json, shown)
    elif as_json:
        while True:
            print(json.dumps(sampler.sample(), default=str), flush=True)
            time.sleep(interval)
    else:
        from rich.live import Live

        with Live(shown(sampler.sample()), auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(interval)
                live.update(shown(sampler.sample()), refresh=True)


class Sampler:
    """Asks one daemon for its status and adds `rates`: what its counters grew by, a second, since the last sample."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._before: dict[str, float] = {}
        self._at = 0.0

    def sample(self) -> dict[str, Any]:
        """The status. Raises Unreachable."""
        from ckptd.control.client import ask

        found, at = ask(self._socket, "status"), time.monotonic()
        passed, self._at = at - self._at, at
        before, self._before = self._before, {}
        for place in (found, *found.get("guests", ())):
            name = place.get("guest", "")
            counts = {key: place[key] for key in _COUNTED if key in place}
            place["rates"] = {
                key: round(max(0.0, value - before.get(f"{name} {key}", value)) / passed, 1)
                for key, value in counts.items()
            }
            self._before |= {f"{name} {key}": value for key, value in counts.items()}
        return found


def shown(found: dict[str, Any]) -> Group:
    """A daemon's status for people."""
    if found["role"] == "primary":
        return Group(_primary(found))
    heading = Text(f"secondary, listens on {found['listen']}, {found['connections']} connected, pid {found['pid']}")
    return Group(heading, *(_replica(guest) for guest in found["guests"]))


def _grid(found: dict[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for_ = format_duration(max(0.0, time.time() - found["since"]) * 1e9)
    style = _STYLES.get(found["condition"], "yellow")
    word = Text.assemble((found["condition"], style), f" for {for_}: ", found["reason"])
    grid.add_row("guest", f"{found['guest']} ({found['kind']}, {format_size(found['memory_bytes'])})")
    grid.add_row("condition", word)
    return grid


def _primary(found: dict[str, Any]) -> Table:
    grid, rates = _grid(found), found["rates"]
    progress = found.get("progress")
    if progress:
        done, total = progress["pages_done"], progress["pages_total"] or 1
        grid.add_row("resync", f"iteration {progress['iteration']}: {done} of {total} pages, {100 * done // total} %")
    grid.add_row("secondary", f"{found['secondary']}, connection {found['connections']}")
    at = _ago(found["acknowledged_at"])
    grid.add_row("epoch", f"{found['epoch']} in term {found['term']}, {at}; {found['in_flight']} in flight")
    grid.add_row(
        "rates", f"{rates['epochs_committed']:.0f} epochs/s, {rates['dirty_pages']:.0f} pages/s,"
        f" {format_size(rates['wire_bytes'])}/s on the wire; an epoch every {found['interval_ms']:g} ms",
    )  # fmt: skip
    grid.add_row("pause", _spread(found["pause_ms"]))
    grid.add_row("commit", _spread(found["commit_ms"]))
    full = "; the gate is FULL, the guest waits" if found["gate_full"] else ""
    grid.add_row("outputs", f"{found['outputs_held']} held, {found['outputs_released']} released{full}")
    grid.add_row("tracker", f"{found['tracker']}, {found['rescans']} scans of all memory")
    grid.add_row("pid", str(found["pid"]))
    return grid


def _replica(found: dict[str, Any]) -> Table:
    grid, rates = _grid(found), found["rates"]
    holding = Text(f"INCONSISTENT: {found['inconsistent']}", "red") if found["inconsistent"] else Text(found["holding"])
    grid.add_row("holds", holding)
    grid.add_row("epoch", f"{found['epoch']} in term {found['term']}, {_ago(found['committed_at'])}")
    if found["receiving_epoch"]:
        grid.add_row("receives", f"epoch {found['receiving_epoch']} from {found['primary']}")
    grid.add_row("rates", f"{rates['pages_received']:.0f} pages/s, {format_size(rates['bytes_received'])}/s")
    grid.add_row("digest", found["digest"])
    standby = found["standby"]
    if standby.get("active"):
        step = f", step {standby['steps']}" if "steps" in standby else ""
        grid.add_row("guest runs", f"here, pid {standby['pid']}{step}")
        if standby.get("note"):
            grid.add_row("note", standby["note"])
    elif standby.get("prepared"):
        grid.add_row("standby", f"ready, pid {standby['pid']}")
    else:
        grid.add_row("standby", "not started yet")
    return grid


def _ago(at: float) -> str:
    return f"{format_duration(max(0.0, time.time() - at) * 1e9)} ago" if at else "not in this daemon's life"


def _spread(ms: dict[str, float]) -> str:
    return f"{ms['p50']:.2f} ms median, {ms['p99']:.2f} ms p99, {ms['max']:.2f} ms longest"
