"""Memory that the guest's process and the daemon share, and the one page by which they signal.

    control page    offset 0    u64 pause   1: stop at the next step boundary      set by the daemon, cleared by both
                    offset 64   u64 step    steps made                             set by the guest
                    offset 128  u64 losses  how often its dirty log lost pages     set by the guest
                    offset 1024 text        what an operator should know of it     set by the guest, ends with a zero

Files are memfds (or the replica's image files): they live as long as a descriptor or mapping of them, whoever made
them.
"""

from __future__ import annotations

import os
from mmap import MAP_SHARED, PROT_READ, PROT_WRITE, mmap

import numpy as np
import numpy.typing as npt

from ckptd.units import PAGE_SIZE

__all__ = ["ControlPage", "make_file", "map_file", "read_file"]


def make_file(name: str, size_bytes: int) -> int:
    """A descriptor of an anonymous file of zeros; takes memory as it is written."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    return fd


def map_file(fd: int, *, writable: bool = True) -> npt.NDArray[np.uint8]:
    """The whole file, shared, as bytes; the descriptor may be closed. The array keeps the mapping alive."""
    access = PROT_READ | PROT_WRITE if writable else PROT_READ
    return np.frombuffer(mmap(fd, os.fstat(fd).st_size, flags=MAP_SHARED, prot=access), dtype=np.uint8)


def read_file(fd: int) -> bytes:
    """All of a file."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


_TEXT = 1024


class ControlPage:
    """The signals that must cost next to nothing."""

    SIZE = PAGE_SIZE

    __slots__ = ("_text", "_words")

    def __init__(self, page: npt.NDArray[np.uint8]) -> None:
        self._words = page.view(np.uint64)
        self._text = page[_TEXT:]

    @property
    def pause(self) -> bool:
        return bool(self._words[0])

    @pause.setter
    def pause(self, wanted: bool) -> None:
        self._words[0] = wanted

    @property
    def step(self) -> int:
        return int(self._words[8])

    @step.setter
    def step(self, step: int) -> None:
        self._words[8] = step

    @property
    def losses(self) -> int:
        return int(self._words[16])

    @losses.setter
    def losses(self, losses: int) -> None:
        self._words[16] = losses

    @property
    def note(self) -> str:
        return self._text.tobytes().partition(b"\0")[0].decode(errors="replace")

    @note.setter
    def note(self, text: str) -> None:
        data = text.encode()[: len(self._text) - 1] + b"\0"
        self._text[: len(data)] = np.frombuffer(data, dtype=np.uint8)
