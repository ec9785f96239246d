"""The process's end of the connection: one daemon at a time, and what is asked answered.

Knows nothing of the guest: what a command does is `answer`'s, what the loss of the daemon means is `lost`'s.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptd.errors import CkptdError, GuestError
from ckptd.guests.process.wire import receive, send

__all__ = ["Answer", "GuestServer", "serve_until_end"]

Answer = tuple[dict[str, Any] | None, Sequence[int]]
"""A reply, or None for commands that have none, and the descriptors that go with it."""

_REFUSE_WAIT = 0.05


class GuestServer:
    """A listening SOCK_SEQPACKET socket and at most one daemon.

    `answer(message, descriptors)` does a command and may raise CkptdError, which the daemon is told. Descriptors that
    it was given are its own unless it raises. `lost()` is called when the daemon is gone.
    """

    def __init__(
        self, listener: socket.socket, answer: Callable[[dict[str, Any], list[int]], Answer], lost: Callable[[], None]
    ) -> None:
        self._listener = listener
        self._answer = answer
        self._on_lost = lost
        self._daemon: socket.socket | None = None

    @property
    def connected(self) -> bool:
        return self._daemon is not None

    def wait(self, timeout: float | None, also: Sequence[int] = ()) -> list[int]:
        """Wait at most so many seconds, do what is asked, and return which of `also` are readable."""
        own = [self._listener.fileno()] if self._daemon is None else [self._daemon.fileno(), self._listener.fileno()]
        ready = select.select([*own, *also], [], [], timeout)[0]
        if self._daemon is not None and self._daemon.fileno() in ready:
            self._command(self._daemon)
        if self._listener.fileno() in ready:
            # a daemon that was killed may have left commands before the end of its connection
            while self._daemon is not None and select.select([self._daemon], [], [], 0)[0]:
                self._command(self._daemon)
            sock, _ = self._listener.accept()
            if self._daemon is None:
                self._daemon = sock
            else:
                _refuse(sock)
        return [fd for fd in also if fd in ready]

    def _command(self, daemon: socket.socket) -> None:
        try:
            received = receive(daemon)
            if received is None:
                self._lost()
                return
            message, fds = received
            try:
                reply, out = self._answer(message, fds)
            except (CkptdError, KeyError, TypeError, ValueError) as error:
                reply, out = {"error": str(error)}, []
                for fd in fds:
                    os.close(fd)
            if reply is not None:
                send(daemon, reply, out)
        except (OSError, GuestError):
            self._lost()

    def _lost(self) -> None:
        if self._daemon is not None:
            self._daemon.close()
        self._daemon = None
        self._on_lost()


def _refuse(sock: socket.socket) -> None:
    with sock, suppress(OSError, GuestError):
        sock.settimeout(_REFUSE_WAIT)
        # the answer would be lost if the socket were closed with its question unread
        _, fds = receive(sock) or ({}, [])
        for fd in fds:
            os.close(fd)
        send(sock, {"error": "another daemon is attached to this guest; stop that one first"})


def serve_until_end(run: Callable[[socket.socket, Path], None], about: str, arguments: list[str] | None) -> None:
    """The main of a guest's process: `run(listener, control)`. Leaves neither socket nor pid file behind unless it is
    killed."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--listen-fd", type=int, required=True, help="a bound and listening SOCK_SEQPACKET socket")
    parser.add_argument("--control", type=Path, required=True, help="the path that it is bound to")
    options = parser.parse_args(arguments)
    pid_file = options.control.with_suffix(".pid")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    pid_file.write_text(f"{os.getpid()}\n")
    try:
        run(socket.socket(fileno=options.listen_fd), options.control)
    finally:
        options.control.unlink(missing_ok=True)
        pid_file.unlink(missing_ok=True)
