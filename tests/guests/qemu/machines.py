"""Real QEMU processes for tests: start, speak QMP, copy the RAM, kill by pid at the end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from ckptd.errors import GuestError
from ckptd.guests.qemu.survey import Survey

__all__ = ["QEMU", "Machine", "copy_ram", "needs_qemu", "qmp_argument", "started"]

QEMU = shutil.which("qemu-system-x86_64")

needs_qemu = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")
"""Beside @pytest.mark.qemu, which only selects."""

_START_SECONDS = 60


class Machine:
    """A QEMU process and a QMP connection to it; the Monitor that `survey` wants.

    Speaks QMP itself, over a blocking socket: tests depend on nothing but QEMU.
    """

    def __init__(self, argv: Sequence[str], monitor: Path, cwd: Path, log: Path) -> None:
        self.argv = list(argv)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                self.argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self._log = log
        self._stream: IO[bytes] | None = None
        self._sock: socket.socket | None = None
        self.events: list[dict[str, Any]] = []
        try:
            self._connect(monitor)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        """What QEMU wrote to its terminal."""
        return self._log.read_text(errors="replace")

    def _connect(self, monitor: Path) -> None:
        end = time.monotonic() + _START_SECONDS
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"QEMU ended with {self.process.returncode}: {self.said}\n{self.argv}")
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(_START_SECONDS)
            try:
                sock.connect(str(monitor))
            except OSError:
                sock.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
                continue
            break
        self._stream = sock.makefile("rb")
        self._sock = sock
        self._receive()
        self.ask("qmp_capabilities")

    def _receive(self) -> dict[str, Any]:
        assert self._stream is not None
        line = b""
        with suppress(ConnectionError):
            line = self._stream.readline()
        if not line:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            raise AssertionError(f"QEMU is gone ({self.process.poll()}): {self.said}")
        return dict(json.loads(line))

    def ask(self, command: str, arguments: dict[str, Any] | None = None, descriptor: int | None = None) -> Any:
        """The answer to a command, with which a descriptor may be handed over. Raises GuestError for an error."""
        assert self._sock is not None
        words = json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n"
        socket.send_fds(self._sock, [words], [] if descriptor is None else [descriptor])
        while True:
            answer = self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise GuestError(f"{command}: {answer['error']['desc']}")
            self.events.append(answer)

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        return self.ask(command, arguments)

    async def human(self, line: str) -> str:
        return str(self.ask("human-monitor-command", {"command-line": line}))

    def save(self, state: Path) -> None:
        """The device state of a stopped guest, into a file that QEMU itself may be unable to open (chroot, runas)."""
        descriptor = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.ask("add-fd", {"fdset-id": 7}, descriptor)
        os.close(descriptor)
        self.ask("xen-save-devices-state", {"filename": "/dev/fdset/7", "live": False})
        self.ask("remove-fd", {"fdset-id": 7})

    def load(self, state: Path) -> None:
        """Give a standby the device state, and wait until it has taken it. Raises AssertionError if it does not."""
        # a pipe, not exec: (a sandbox with spawn=deny kills QEMU for it) and not a path (chroot, runas)
        reader, writer = os.pipe()
        self.ask("getfd", {"fdname": "state"}, reader)
        os.close(reader)
        thread = threading.Thread(target=_write_all, args=(writer, state.read_bytes()))
        thread.start()
        self.ask("migrate-incoming", {"uri": "fd:state"})
        thread.join()
        while (status := self.ask("query-migrate").get("status")) in ("setup", "active", None):
            time.sleep(0.01)
        assert status == "completed", f"{status}: {self.said}"

    def kill(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._sock is not None:
            self._sock.close()
        self.process.kill()
        self.process.wait()


def _write_all(descriptor: int, data: bytes) -> None:
    with suppress(BrokenPipeError), open(descriptor, "wb") as pipe:
        pipe.write(data)


def qmp_argument(path: Path) -> list[str]:
    return ["-qmp", f"unix:{path},server=on,wait=off"]


@contextmanager
def started(*arguments: str, cwd: Path | None = None) -> Iterator[Machine]:
    """A primary with these arguments, and `-qmp` added; killed at the end. Its folder is short and its own."""
    assert QEMU is not None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckq")))
        machine = Machine([QEMU, *arguments, *qmp_argument(folder / "q")], folder / "q", cwd or folder, folder / "log")
        stack.callback(machine.kill)
        yield machine


def copy_ram(survey: Survey, folder: Path) -> dict[str, str]:
    """All RAM of a stopped QEMU, in a sparse file for each backend: {id: path}."""
    files = {}
    chunk = 4 << 20
    with open(f"/proc/{survey.pid}/mem", "rb", buffering=0) as memory:
        for number, backend in enumerate(one for one in survey.ram if one.used and not one.firmware):
            assert backend.address is not None, backend.problem
            path = folder / f"ram,{number}"  # a comma, which must be escaped
            with path.open("wb") as target:
                target.truncate(backend.size)
                for start, end in _touched(survey.pid, backend.address, backend.size):
                    for at in range(start, end, chunk):
                        memory.seek(backend.address + at)
                        target.seek(at)
                        target.write(memory.read(min(chunk, end - at)))
            files[backend.id] = str(path)
    return files


def _touched(pid: int, address: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges that QEMU's page table has, which are all that QEMU itself has written; the others are zeros."""
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        start: int | None = None
        for base in range(0, size, 1 << 30):
            count = min(1 << 30, size - base) // 4096
            pagemap.seek((address + base) // 4096 * 8)
            there = np.frombuffer(pagemap.read(count * 8), np.uint64) >> np.uint64(62) != 0
            for index in np.flatnonzero(np.diff(there, prepend=start is not None)).tolist():
                at = base + index * 4096
                if start is None:
                    start = at
                else:
                    yield start, at
                    start = None
        if start is not None:
            yield start, size
