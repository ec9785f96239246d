"""The gate of a kvm guest: what its console says, byte by byte, in shared memory.

    offset 0     u64 written    bytes emitted; output number n is the n-th byte      moved by the guest
    offset 64    u64 released   bytes that have left                                 moved by the owner
    offset 128   u64 sent       bytes whose place may be used again                  moved by the guest's process
    offset 192   byte n is at (n - 1) mod capacity

    sent <= released <= written <= sent + capacity

A full gate stalls the vCPU; it never drops. What is released is appended to the output file, before `released` moves:
a crash in between repeats bytes, and never skips any. Then the guest's process passes it on to whoever is connected to
the console, and moves `sent`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError
from ckptd.guests.process.output import append

__all__ = ["KvmGate", "gate_bytes"]

_HEAD = 192
_WRITTEN, _RELEASED, _SENT = 0, 8, 16


def gate_bytes(capacity: int) -> int:
    """Bytes of shared memory for a gate that holds `capacity` bytes of output."""
    return _HEAD + max(capacity, 1)


class KvmGate:
    """Either side of the gate, over the same `buffer`. `on_release` is called after some output was let go."""

    def __init__(
        self,
        buffer: npt.NDArray[np.uint8],
        output: Path | None = None,
        on_release: Callable[[], None] | None = None,
    ) -> None:
        self._heads = buffer[:_HEAD].view(np.uint64)
        self._bytes = buffer[_HEAD:]
        self._output = output
        self._on_release = on_release

    @property
    def capacity(self) -> int:
        return len(self._bytes)

    @property
    def written(self) -> int:
        return int(self._heads[_WRITTEN])

    @property
    def released(self) -> int:
        return int(self._heads[_RELEASED])

    @property
    def sent(self) -> int:
        return int(self._heads[_SENT])

    @property
    def room(self) -> int:
        return self.capacity - (self.written - self.sent)

    @property
    def full(self) -> bool:
        return self.room <= 0

    def emit(self, data: bytes) -> int:
        """The guest's side: as many of the bytes as there is room for; how many. One caller at a time."""
        count = min(len(data), self.room)
        start = self.written
        at, piece = start % self.capacity, np.frombuffer(data, dtype=np.uint8, count=count)
        until_end = min(count, self.capacity - at)
        self._bytes[at : at + until_end] = piece[:until_end]
        self._bytes[: count - until_end] = piece[until_end:]
        self._heads[_WRITTEN] = start + count  # the bytes first, the marker last (x86 keeps the order of stores)
        return count

    def mark(self) -> int:
        return self.written

    def held(self, mark: int) -> bytes:
        return self._between(self.released, mark)

    def release(self, mark: int) -> int:
        data = self._between(self.released, mark)
        if data:
            if self._output is not None:
                append(self._output, data)
            self._heads[_RELEASED] = mark
            if self._on_release is not None:
                self._on_release()
        return len(data)

    def unsent(self) -> bytes:
        """The guest's process: what was released and is not passed on yet."""
        return self._between(self.sent, self.released)

    def passed_on(self, count: int) -> None:
        """So many more bytes are; their places are free."""
        self._heads[_SENT] += np.uint64(count)

    def fill(self, held: bytes, released: int) -> None:
        """Make an unused gate hold what another one held, which follows byte number `released`. Raises GuestError."""
        if len(held) > self.capacity:
            raise GuestError(f"a gate of {self.capacity} bytes cannot hold {len(held)}")
        self._heads[_WRITTEN] = self._heads[_RELEASED] = self._heads[_SENT] = released
        self.emit(held)

    def _between(self, start: int, end: int) -> bytes:
        if end > self.written:
            raise GuestError(f"there is no output {end} yet: the guest has emitted {self.written}")
        count = max(0, end - start)
        if not count:
            return b""
        at = start % self.capacity
        first = self._bytes[at : at + count].tobytes()
        return first + self._bytes[: count - len(first)].tobytes()
