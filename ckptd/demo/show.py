"""What a demo shows while it runs: on a terminal one live table, else a line now and then. Always on stderr."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ckptd.units import format_size

__all__ = ["Show"]

_EVERY = 1.0  # seconds between two lines


class Show:
    """A context manager. `phase` says what begins; `figures` is a Pair's Watch."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=8) if self._console.is_terminal else None
        self._began = time.monotonic()
        self._said: list[Text] = []
        self._at = 0.0
        self._before: tuple[float, dict[str, Any]] | None = None
        self._previous: tuple[float, dict[str, Any]] | None = None

    def __enter__(self) -> Show:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(Group(*self._said))
            self._live.stop()

    def phase(self, text: str) -> None:
        """One more step of the story."""
        line = Text(f"{time.monotonic() - self._began:6.2f} s  {text}")
        self._said.append(line)
        if self._live is not None:
            self._live.update(Group(*self._said))
        else:
            self._console.print(line, soft_wrap=True)

    def figures(self, primary: dict[str, Any] | None, replica: dict[str, Any] | None) -> None:
        """Both sides as they are now."""
        now = time.monotonic()
        facts = self._of_primary(primary, now) if primary is not None else []
        if replica is not None and replica["condition"] == "promoted":
            facts.append(("guest there", f"step {replica['standby'].get('steps', 0)}, its output leaves at once"))
        if self._live is not None:
            grid = Table.grid(padding=(0, 2))
            for key, value in facts:
                grid.add_row(Text(f"          {key}", "bold"), value)
            self._live.update(Group(*self._said, grid))
        elif facts and now - self._at >= _EVERY:
            self._at = now
            self._console.print(f"          {'; '.join(f'{key}: {value}' for key, value in facts)}", soft_wrap=True)

    def _of_primary(self, found: dict[str, Any], now: float) -> list[tuple[str, str]]:
        if self._before is None or now - self._before[0] >= _EVERY:
            self._previous, self._before = self._before, (now, found)
        at, before = self._previous or (now, found)
        passed = max(now - at, 1e-9)

        def rate(key: str) -> float:
            return float(found[key] - before[key]) / passed

        progress = found["progress"]
        if progress:
            done, total = progress["pages_done"], progress["pages_total"]
            return [("first image", f"iteration {progress['iteration']}, {done} of {total} pages")]
        return [
            ("epoch", f"{found['epoch']}, {rate('epochs_committed'):.0f}/s"),
            ("dirty", f"{rate('dirty_pages'):.0f} pages/s, {format_size(rate('wire_bytes'))}/s on the wire"),
            ("pause", f"{found['pause_ms']['p50']:.2f} ms, p99 {found['pause_ms']['p99']:.2f} ms"),
            ("commit lag", f"{found['commit_ms']['p50']:.2f} ms, p99 {found['commit_ms']['p99']:.2f} ms"),
            ("outputs", f"{found['outputs_held']} held, {found['outputs_released']} released"),
        ]

    _previous: tuple[float, dict[str, Any]] | None = None
