"""The daemon's end of a guest process: start it or find it, ask it, see whether it lives, end it.

The listening socket is made here and handed over, so that the first connection needs no retries. The process gets a
session of its own and no descriptor but that socket: it must outlive the daemon.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ckptd
from ckptd.errors import GuestError
from ckptd.guests.process.wire import receive, send, socket_address

__all__ = ["GuestLink"]

_TIMEOUT = 10.0  # seconds for one answer; a step takes microseconds, an import a second on a busy machine
_SOON = 0.005
_END_WAIT = 2.0
_ENDED = "the connection to the guest's process has ended"


class GuestLink:
    """A connection to one guest process. `started` says that this call made the process."""

    def __init__(self, sock: socket.socket, runtime: Path, process: subprocess.Popen[bytes] | None) -> None:
        sock.settimeout(_TIMEOUT)
        self._sock = sock
        self._runtime = runtime
        self._process = process
        self._pidfd = -1
        self.started = process is not None
        self.pid = 0
        self.active = False
        self.page_fd = -1

    @classmethod
    async def open(cls, runtime: Path, module: str) -> GuestLink:
        """Connect to the process whose socket is in `runtime`, or start one that runs `module`. Raises GuestError."""
        try:
            runtime.mkdir(parents=True, exist_ok=True)
            control = runtime / "guest.sock"
            sock = _connect(control)
            process = None
            if sock is None:
                sock, process = _start(module, control, runtime / "guest.log")
        except OSError as error:
            raise GuestError(f"the guest's process cannot be started: {error}", runtime=str(runtime)) from error
        link = cls(sock, runtime, process)
        try:
            hello, fds = await asyncio.to_thread(link.ask, {"op": "hello"})
            link.page_fd = fds[0]
            link.pid, link.active = int(hello["pid"]), bool(hello["active"])
            link._pidfd = os.pidfd_open(link.pid)
        except BaseException:
            link.close()
            if process is not None:
                process.kill()
                process.wait()
            raise
        return link

    def ask(self, message: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        """Send, and wait for the answer. Raises GuestError if the process says no, or nothing any more."""
        self.tell(message, fds)
        return self._answer()

    async def ask_soon(self, message: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        """The same for what is answered at once: by waiting in place, which is fastest.

        A process that is stuck is waited for in a thread, so that it does not stop the daemon too.
        """
        self.tell(message, fds)
        # A sleep, not a spin: the kernel wakes the guest on this very CPU, and a spin would keep it off.
        if select.select([self._sock], [], [], _SOON)[0]:
            return self._answer()
        return await asyncio.to_thread(self._answer)

    def _answer(self) -> tuple[dict[str, Any], list[int]]:
        try:
            answer = receive(self._sock)
        except TimeoutError as error:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # a late answer must not pass for that to a later question
            raise self._gone(f"the guest's process does not answer within {_TIMEOUT:g} s") from error
        except OSError as error:
            raise self._gone(_ENDED) from error
        if answer is None:
            raise self._gone(_ENDED)
        reply, received = answer
        if "error" in reply:
            raise GuestError(reply["error"], pid=self.pid or None)
        return reply, received

    def tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send what has no answer. Raises GuestError."""
        try:
            send(self._sock, message, fds)
        except OSError as error:
            raise self._gone(_ENDED) from error

    def alive(self) -> bool:
        """The process runs: neither ended nor killed, whoever started it."""
        return self._pidfd >= 0 and not self._ended(0)

    async def ends_soon(self) -> bool:
        """It has ended, or does within a moment."""
        return self._pidfd < 0 or await asyncio.to_thread(self._ended, _END_WAIT)

    async def end(self) -> None:
        """Ask it to end; kill it if it does not. Closes the link."""
        with suppress(GuestError):
            await asyncio.to_thread(self.ask, {"op": "end"})
        if self._pidfd >= 0 and not await asyncio.to_thread(self._ended, _END_WAIT):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await asyncio.to_thread(self._ended, _END_WAIT)
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)
        elif self._pidfd >= 0:
            with suppress(ChildProcessError):  # ours from before a detach, or no child of ours
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        self.close()
        for left in ("guest.sock", "guest.pid"):
            (self._runtime / left).unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the process alone."""
        self._sock.close()
        for fd in (self._pidfd, self.page_fd):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self.page_fd = -1

    def _ended(self, timeout: float) -> bool:
        return bool(select.select([self._pidfd], [], [], timeout)[0])  # a pidfd is readable once the process has ended

    def _gone(self, message: str) -> GuestError:
        return GuestError(message, hint=f"see {self._runtime / 'guest.log'}", pid=self.pid or None)


def _connect(control: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with socket_address(control) as address:
            sock.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


def _start(module: str, control: Path, log: Path) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    control.unlink(missing_ok=True)  # nobody listens there: a process that was killed left it
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with socket_address(control) as address:
            listener.bind(address)
        control.chmod(0o600)
        listener.listen(4)
        command = [sys.executable, "-P", "-m", module,
                   "--listen-fd", str(listener.fileno()), "--control", str(control)]  # fmt: skip
        home = str(Path(ckptd.__file__).resolve().parents[1])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=environment,
            )
    sock = _connect(control)
    if sock is None:
        process.wait()
        raise GuestError("the guest's process ended as it began", hint=f"see {log}")
    return sock, process
