"""The machine's devices: a serial console and a control port. What a vCPU does with them, and nothing of KVM.

    0x3F8  out 8   transmit a byte; also as a string (`rep outsb`)
           in  8   receive a byte; 0 where there is none
    0x3FD  in  8   line status: 0x60 transmitter empty, 0x01 a byte can be received
    0x604  out 32  latch an argument, for this vCPU
    0x600  out 32  a command:
             1 MARK   a boundary between two batches: where a vCPU can be made to stop, and where its rate is held
             2 WAIT   nothing to do until there is input
             3 FETCH  one line of input to the guest-physical address in the latch: u32 length, bytes; 0 if none waits
             4 END    the guest has ended
             5 FAULT  the program found something wrong; the latch says what

Other ports read as ones and ignore what is written, as an empty bus does. The transmitter never refuses: a vCPU whose
output the gate does not take is held until it does.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from enum import IntEnum

__all__ = ["MAX_INPUT", "MAX_LINE", "Command", "Console", "Devices"]

THR, LSR, COMMAND, LATCH = 0x3F8, 0x3FD, 0x600, 0x604
_TRANSMITTER_EMPTY, _DATA_READY = 0x60, 0x01
MAX_LINE = 240
MAX_INPUT = 1 << 16


class Command(IntEnum):
    MARK = 1
    WAIT = 2
    FETCH = 3
    END = 4
    FAULT = 5


class Console:
    """What was typed and is not fetched yet. Bounded: what does not fit is refused to whoever typed it."""

    def __init__(self, waiting: bytes = b"") -> None:
        self._waiting = bytearray(waiting)
        self._lock = threading.Lock()  # vCPUs take from their threads what others typed

    @property
    def waiting(self) -> bytes:
        with self._lock:
            return bytes(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def room(self) -> int:
        return MAX_INPUT - len(self._waiting)

    def typed(self, data: bytes) -> None:
        """More input, at most `room` bytes."""
        with self._lock:
            self._waiting += data

    def line(self) -> bytes:
        """Take one line, with its end; nothing until it is whole, or too long to become so."""
        with self._lock:
            end = self._waiting.find(b"\n", 0, MAX_LINE) + 1 or (MAX_LINE if len(self._waiting) >= MAX_LINE else 0)
            taken = bytes(self._waiting[:end])
            del self._waiting[:end]
        return taken

    def byte(self) -> int:
        """Take one byte; 0 where there is none."""
        with self._lock:
            return self._waiting.pop(0) if self._waiting else 0


class Devices:
    """Port accesses of one vCPU. `transmit(bytes)`, `command(command)` and `fetch(gpa, line)` are what follows."""

    def __init__(
        self,
        console: Console,
        transmit: Callable[[bytes], None],
        command: Callable[[Command], None],
        store: Callable[[int, bytes], None],
    ) -> None:
        self.latch = 0
        self._console = console
        self._transmit = transmit
        self._command = command
        self._store = store

    def write(self, port: int, size: int, data: bytes) -> None:
        """OUT, `data` as many times `size` bytes as the instruction repeats."""
        if port == THR and size == 1:
            self._transmit(data)
        elif port == LATCH and size == 4:
            self.latch = int.from_bytes(data[-4:], "little")
        elif port == COMMAND and size == 4:
            self._do(int.from_bytes(data[-4:], "little"))

    def read(self, port: int, size: int, count: int) -> bytes:
        """IN: `size` times `count` bytes."""
        if size == 1 and port == THR:
            return bytes(self._console.byte() for _ in range(count))
        if size == 1 and port == LSR:
            return bytes([_TRANSMITTER_EMPTY | (_DATA_READY if self._console else 0)]) * count
        return b"\xff" * (size * count)

    def _do(self, number: int) -> None:
        if number == Command.FETCH:
            line = self._console.line()
            self._store(self.latch, struct.pack("<I", len(line)) + line)
        elif number in Command.__members__.values():
            self._command(Command(number))
