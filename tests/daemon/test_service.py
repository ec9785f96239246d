"""Signals of a daemon's process: what a changed file may change, and what happens to a wrong one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ckptd.config import PrimaryConfig, load_primary
from ckptd.daemon.logs import set_up_log
from ckptd.daemon.service import serve

GOOD = """
[guest]
name = "vm1"
memory = "{memory}"
[secondary]
address = "127.0.0.1:7070"
[checkpoint]
interval = "{interval}"
stage = "{stage}"
[runtime]
dir = "{place}"
"""


class Idle:
    """A daemon that waits for its end."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self.applied: list[PrimaryConfig] = []
        self.log: list[str] = []

    async def run(self) -> None:
        self.log.append("run")
        await self.stopped.wait()

    def stop(self) -> None:
        self.stopped.set()

    async def start_control(self) -> None:
        self.log.append("start")

    async def stop_control(self) -> None:
        self.log.append("stop")


def write(place: Path, **changed: str) -> Path:
    values = {"memory": "16MiB", "interval": "25ms", "stage": "64MiB", "place": str(place)} | changed
    (place / "p.toml").write_text(GOOD.format(**values))
    return place / "p.toml"


def served(place: Path, script: Callable[[Idle], Coroutine[Any, Any, None]]) -> Idle:
    """Serve an idle daemon while `script` runs; SIGTERM ends it."""

    async def main() -> Idle:
        set_up_log("info", "text")  # to the stderr of this moment
        daemon, path = Idle(), write(place)
        work = asyncio.create_task(
            serve(
                daemon, load_primary(path, {}), lambda: load_primary(path, {}), daemon.applied.append,
                daemon.start_control, daemon.stop_control,
            )
        )  # fmt: skip
        while "run" not in daemon.log:
            await asyncio.sleep(0)
        await script(daemon)
        os.kill(os.getpid(), signal.SIGTERM)
        await work
        return daemon

    return asyncio.run(asyncio.wait_for(main(), 30))


async def hup(daemon: Idle, capsys: pytest.CaptureFixture[str]) -> str:
    """SIGHUP, and what was logged."""
    capsys.readouterr()
    os.kill(os.getpid(), signal.SIGHUP)
    said = ""
    while "reloaded" not in said and "the old one stays" not in said:
        await asyncio.sleep(0.001)
        said += capsys.readouterr().err
    return said


def test_sigterm_ends_it_and_its_control_socket(tmp_path: Path) -> None:
    async def nothing(_: Idle) -> None: ...

    assert served(tmp_path, nothing).log == ["start", "run", "stop"]


def test_what_needs_a_restart_is_named_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def script(daemon: Idle) -> None:
        write(tmp_path, interval="50ms", stage="32MiB", memory="32MiB")
        said = await hup(daemon, capsys)
        assert "checkpoint.interval" in said and "only with a restart" in said
        assert "checkpoint.stage" in said and "guest.memory" in said
        # what was left is named again: the file still differs
        said = await hup(daemon, capsys)
        assert "checkpoint.stage" in said and "nothing" in said

    daemon = served(tmp_path, script)
    checkpoint = daemon.applied[0].checkpoint
    assert (checkpoint.interval, checkpoint.stage) == (50_000_000, 64 << 20)
    assert daemon.applied[0].guest.memory == 16 << 20
    assert daemon.applied[1] == daemon.applied[0]


def test_a_wrong_file_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def script(daemon: Idle) -> None:
        path = write(tmp_path, interval="soon")
        assert "the old one stays" in await hup(daemon, capsys)
        path.write_text("[guest\n")
        assert "the old one stays" in await hup(daemon, capsys)
        path.write_bytes(b"\xff\xfe")
        assert "the old one stays" in await hup(daemon, capsys)
        path.unlink()
        assert "the old one stays" in await hup(daemon, capsys)
        assert not daemon.applied
        write(tmp_path, interval="50ms")
        assert "checkpoint.interval" in await hup(daemon, capsys)

    assert [one.checkpoint.interval for one in served(tmp_path, script).applied] == [50_000_000]
