"""Processes to be killed: the daemons that we start, and the guests' processes that those start.

A guest's process belongs to no one once its daemon is dead, so it is found by its pid file, and killed only if its
command line says that it is that guest: a pid may have become somebody else's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from select import select
from typing import Any

import ckptd
from ckptd.config import Role
from ckptd.control.client import Answered, ask
from ckptd.errors import CkptdError, Unreachable

__all__ = ["Child", "ChildFailed", "guest_pid", "kill_guest"]

_LOOK = 0.01  # seconds between two looks at what is waited for


class ChildFailed(CkptdError):
    """A daemon did not do what was waited for; `hint` is the end of its log."""


class Child:
    """One daemon, in a session of its own, so that a Ctrl-C for us is none for it."""

    def __init__(self, role: Role, config: Path, socket: Path, log: Path) -> None:
        self.role: Role = role
        self.socket, self.log = socket, log
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns at once; see `wait_ready`."""
        home = str(Path(ckptd.__file__).resolve().parents[1])
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CKPTD_")}
        environment["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [environment.get("PYTHONPATH")])])
        command = [sys.executable, "-P", "-m", "ckptd", self.role, "-c", str(self._config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def wait_ready(self, seconds: float = 30.0) -> dict[str, Any]:
        """The first status that it answers with. Raises ChildFailed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check()
            with suppress(Unreachable, Answered):  # not yet listening; not yet attached
                return self.status()
            time.sleep(_LOOK)
        raise ChildFailed(f"the {self.role} does not answer within {seconds:g} s", hint=self.tail())

    def status(self) -> dict[str, Any]:
        """Raises Unreachable."""
        return ask(self.socket, "status", timeout=20.0)

    def check(self) -> None:
        """Raises ChildFailed if it has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise ChildFailed(f"the {self.role} ended with code {self._process.returncode}", hint=self.tail())

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def private_bytes(self) -> int:
        """Memory that is its own: neither a guest's, nor an image's, nor a file's."""
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) << 10
        return 0

    def reload(self) -> None:
        """Take over what its file says now (SIGHUP)."""
        self._signal(signal.SIGHUP)

    def freeze(self) -> None:
        """Stop it where it is (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def yield_cpu(self) -> None:
        """Everybody else goes first from now on."""
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.pid, 19)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def end(self, seconds: float = 5.0) -> None:
        """SIGTERM, and SIGKILL after a while; returns when it is gone."""
        self._signal(signal.SIGTERM)
        self.thaw()
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        with suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _signal(self, number: int) -> None:
        if self.running:
            assert self._process is not None
            self._process.send_signal(number)


def guest_pid(runtime: Path) -> int:
    """The process of the guest whose runtime directory this is; 0 if none runs."""
    fd, pid = _open_guest(runtime)
    if fd >= 0:
        os.close(fd)
    return pid


def kill_guest(runtime: Path, seconds: float = 5.0) -> bool:
    """SIGKILL the guest's process, if one runs; returns when it is gone, whether there was one."""
    fd, _ = _open_guest(runtime)
    if fd < 0:
        return False
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        select([fd], [], [], seconds)
    finally:
        os.close(fd)
    return True


def _open_guest(runtime: Path) -> tuple[int, int]:
    """A pidfd and the pid, or -1 and 0. The command line is read while the pidfd is open: it is that process's."""
    try:
        pid = int((runtime / "guest.pid").read_text())
        fd = os.pidfd_open(pid)
    except (OSError, ValueError):
        return -1, 0
    with suppress(OSError):
        if _is_guest(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"), runtime):
            return fd, pid
    os.close(fd)
    return -1, 0


def _is_guest(command: Sequence[bytes], runtime: Path) -> bool:
    """A process of ours that keeps a guest, or a QEMU that a secondary has started."""
    keeps = b"--control" in command and os.fsencode(runtime / "guest.sock") in command
    monitor = os.fsencode(runtime / "guest.qmp")
    return keeps or any(monitor in word for word in command)
