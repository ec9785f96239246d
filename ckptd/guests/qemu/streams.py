"""What one chardev of the guest says: bytes without packets, held by number, and appended to a file when released."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Stream"]

_READ = 1 << 16
_SURE = 128
"""Bytes: no socket is full with fewer, not even with one in each write, which take 768 bytes of it each."""


class Stream:
    """One chardev. Knows no locks: the holder has one."""

    def __init__(self, label: str, index: int, sock: socket.socket, path: Path) -> None:
        self.label, self.index, self.sock, self.path = label, index, sock, path
        sock.setblocking(False)
        self.waiting: deque[tuple[int, bytearray]] = deque()  # number and bytes of what is not in the file yet
        self.bytes = 0
        self.open = True
        self.trouble = ""  # why the file cannot be written
        self._recent = _SURE  # bytes since the last look: what was there before us may have left QEMU waiting

    def take(self, written: int, closed: int) -> int:
        """Read what is there, as one output, numbered `written` + 1; the number of the last output.

        It joins the last one if that is not among those up to `closed`, which were marked or may leave.
        """
        while self.open:
            try:
                data = self.sock.recv(_READ)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.open = False
                break
            self.bytes += len(data)
            self._recent += len(data)
            if self.waiting and self.waiting[-1][0] > closed:
                self.waiting[-1][1].extend(data)
            else:
                written += 1
                self.waiting.append((written, bytearray(data)))
        return written

    def unsure(self) -> bool:
        """Since the last look so much came that the socket may have been full, and QEMU may wait to say more."""
        recent, self._recent = self._recent, 0
        return recent >= _SURE

    def due(self, wanted: int) -> bool:
        return bool(self.waiting) and self.waiting[0][0] <= wanted

    def leaving(self, wanted: int) -> tuple[int, int, bytes]:
        """What may leave: the number of its last output, how many, and all bytes of them."""
        ready = [one for one in self.waiting if one[0] <= wanted]
        return ready[-1][0], len(ready), b"".join(data for _, data in ready)

    def left(self, count: int) -> None:
        """The first so many outputs are in the file."""
        for _ in range(count):
            self.bytes -= len(self.waiting.popleft()[1])

    def said(self, since: int, mark: int) -> Iterator[tuple[int, int, bytes]]:
        """Outputs in (since, mark] that are not in the file."""
        for number, data in self.waiting:
            if since < number <= mark:
                yield number, self.index, bytes(data)
