"""The gate of a sim guest: outputs in shared memory, emitted by the guest and released by whoever owns the gate.

    offset 0     u64 written    outputs emitted; number n is the n-th            moved by the guest
    offset 64    u64 released   outputs that have left                           moved by the owner
    offset 128   record[]       output n is at (n - 1) mod capacity

    record       u64 number | u64 step | 16 bytes content                        32 bytes

A full gate stalls the guest; it never drops. What is released is appended to the output file, one line an output:
`number step content-in-hex`. The line is written before `released` moves: a crash in between repeats lines, and never
skips any.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError
from ckptd.guests.process.output import append
from ckptd.guests.sim.machine import Output

__all__ = ["RECORD_SIZE", "SimGate", "gate_bytes", "outputs_of"]

_RECORD = np.dtype([("number", "<u8"), ("step", "<u8"), ("content", "V16")])
RECORD_SIZE = _RECORD.itemsize
_HEAD = 128


def gate_bytes(capacity_bytes: int) -> int:
    """Bytes of shared memory for a gate that holds `capacity_bytes` of outputs, at least one."""
    return _HEAD + max(capacity_bytes, RECORD_SIZE) // RECORD_SIZE * RECORD_SIZE


def outputs_of(held: bytes) -> list[Output]:
    """What `SimGate.held` encoded. Raises GuestError unless it is whole records, numbered without a gap."""
    if len(held) % RECORD_SIZE:
        raise GuestError(f"{len(held)} bytes of held output are no whole records")
    records = np.frombuffer(held, dtype=_RECORD)
    outputs = [Output(int(one["number"]), int(one["step"]), one["content"].tobytes()) for one in records]
    if [one.number for one in outputs] != list(
        range(outputs[0].number, outputs[0].number + len(outputs)) if outputs else []
    ):
        raise GuestError("the held outputs are not numbered one by one", first=outputs[0].number)
    return outputs


class SimGate:
    """Either side of the gate, over the same `buffer`. Without an `output` file it only counts what it lets go."""

    def __init__(self, buffer: npt.NDArray[np.uint8], output: Path | None = None) -> None:
        self._heads = buffer[:_HEAD].view(np.uint64)
        self._records = buffer[_HEAD:].view(_RECORD)
        self._output = output

    @property
    def capacity(self) -> int:
        """Outputs that fit."""
        return len(self._records)

    @property
    def written(self) -> int:
        return int(self._heads[0])

    @property
    def released(self) -> int:
        return int(self._heads[8])

    @property
    def full(self) -> bool:
        return self.written - self.released >= self.capacity

    def emit(self, output: Output) -> None:
        """The guest's side; only while not full."""
        self._records[(output.number - 1) % self.capacity] = (output.number, output.step, output.content)
        self._heads[0] = output.number  # the record first, the marker last (x86 keeps the order of stores)

    def mark(self) -> int:
        return self.written

    def held(self, mark: int) -> bytes:
        return self._between(self.released, mark).tobytes()

    def release(self, mark: int) -> int:
        records = self._between(self.released, mark)
        if not len(records):
            return 0
        if self._output is not None:
            lines = [f"{number} {step} {content.hex()}\n" for number, step, content in records.tolist()]
            append(self._output, "".join(lines).encode())
        self._heads[8] = mark
        return len(records)

    def fill(self, held: bytes, released: int) -> None:
        """Make an unused gate hold what another one held, which must follow number `released`. Raises GuestError."""
        outputs = outputs_of(held)
        if len(outputs) > self.capacity:
            raise GuestError(f"a gate of {self.capacity} outputs cannot hold {len(outputs)}")
        if outputs and outputs[0].number != released + 1:
            raise GuestError(f"held output begins with number {outputs[0].number}, not {released + 1}")
        self._heads[0] = self._heads[8] = released
        for output in outputs:
            self.emit(output)

    def _between(self, released: int, mark: int) -> npt.NDArray[np.void]:
        if mark > self.written:
            raise GuestError(f"there is no output {mark} yet: the guest has emitted {self.written}")
        count = max(0, mark - released)
        return self._records[(released + np.arange(count)) % self.capacity]
