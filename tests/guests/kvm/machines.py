"""Machines for tests: memory and gate in this process, programs given as text, and devices that tests control."""

from __future__ import annotations

import fcntl
import signal
import struct
import textwrap
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ckptd.errors import CkptdError
from ckptd.guests.kvm import abi
from ckptd.guests.kvm.gate import KvmGate, gate_bytes
from ckptd.guests.kvm.host import features_of, open_kvm
from ckptd.guests.kvm.machine import Machine
from ckptd.guests.kvm.programs import assemble, assemble_file
from ckptd.guests.kvm.spec import CODE, KvmSpec
from ckptd.guests.kvm.vcpu import KICK
from ckptd.guests.process.shared import make_file, map_file
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.trackers.kvm_log import KvmTracker
from ckptd.units import PAGE_SIZE

__all__ = ["AT", "Puppet", "assembled", "machine_over", "needs_kvm", "new_memory", "ring_here"]

AT = PAGE_SIZE - 4
"""Where a puppet writes within a page: beyond whatever the program and its data take of theirs."""


def _why_not() -> str:
    try:
        fd = open_kvm()
    except CkptdError as error:
        return f"this machine has no usable KVM: {error}"
    import os

    os.close(fd)
    try:
        assemble("counter")
    except CkptdError as error:
        return str(error)
    return ""


_REASON = _why_not()
needs_kvm = pytest.mark.skipif(bool(_REASON), reason=_REASON)


def ring_here() -> str:
    """Why there is no dirty ring here; empty if there is."""
    fd = open_kvm()
    return "" if features_of(fd).ring_entries else "this kernel's KVM has no dirty ring"


def assembled(source: str, place: Path) -> bytes:
    """The code of a program given as text, in 32 bits, for CODE."""
    path = place / "program.S"
    path.write_text(".code32\n" + textwrap.dedent(source))
    return assemble_file(path)


def new_memory(spec: KvmSpec) -> list[npt.NDArray[np.uint8]]:
    return [map_file(make_file(f"test-{region.name}", region.size_bytes)) for region in spec.geometry]


@contextmanager
def machine_over(
    spec: KvmSpec, code: bytes | None = None, memory: Sequence[npt.NDArray[np.uint8]] | None = None
) -> Iterator[Machine]:
    """A machine that stands before its first instruction (of `code`, or of its own program)."""
    signal.signal(KICK, lambda *_: None)
    gate = KvmGate(np.zeros(gate_bytes(1 << 16), dtype=np.uint8))
    machine = Machine(spec, new_memory(spec) if memory is None else memory, gate)
    try:
        image = [] if code is None else [(CODE, code)]
        if code is None:
            from ckptd.guests.kvm.programs import image_of

            image = image_of(spec)
        machine.begin(image)
        yield machine
    finally:
        machine.end()


_PUPPET = """
    # Takes an address from port 0x700 and adds 1 to what is there; at address 0 it passes a mark.
next:
    mov $0x700, %edx
    inl %dx, %eax
    test %eax, %eax
    jz idle
    incl (%eax)
    jmp next
idle:
    mov $0x600, %edx
    mov $1, %eax
    outl %eax, %dx
    jmp next
"""


class Puppet:
    """A guest that writes to the pages that it is told to, and a tracker: a bench of the contract."""

    def __init__(self, machine: Machine, tracker: KvmTracker, capacity: int | None) -> None:
        self.machine = machine
        self.tracker = tracker
        self.geometry = machine.spec.geometry
        self.vcpus = machine.spec.vcpus
        self.capacity = capacity
        self._orders: list[deque[int]] = []
        for vcpu in machine.vcpus:
            orders: deque[int] = deque()
            self._orders.append(orders)
            vcpu.devices.read = _read(orders)  # type: ignore[method-assign]

    @classmethod
    @contextmanager
    def made(cls, spec: KvmSpec, tracker: str, place: Path, entries: int = 4096) -> Iterator[Puppet]:
        with machine_over(spec, assembled(_PUPPET, place)) as machine:
            used = machine.use_tracker(tracker, entries)
            capacity = entries - machine.features.ring_reserve if tracker == "kvm-ring" else None
            yield cls(machine, used, capacity)

    def write(self, vcpu: int, region: int, gfns: Gfns) -> None:
        self._orders[vcpu].extend((self.machine.spec.places[region] + gfns * PAGE_SIZE + AT).tolist())
        self.run()

    def run(self) -> None:
        """All vCPUs, until each has done what it was told."""
        self.machine.resume()
        self.machine.pause_at_marks(60.0)

    def order(self, vcpu: int, region: int, gfns: Gfns) -> None:
        """To be written with the next `run`."""
        self._orders[vcpu].extend((self.machine.spec.places[region] + gfns * PAGE_SIZE + AT).tolist())

    def harvest(self) -> DirtySet:
        return self.tracker.harvest()


def _read(orders: deque[int]):  # type: ignore[no-untyped-def]
    def read(port: int, size: int, count: int) -> bytes:
        return struct.pack("<I", orders.popleft() if port == 0x700 and orders else 0)

    return read


def registers_of(machine: Machine, vcpu: int) -> dict[str, int]:
    """The general registers of a paused vCPU."""
    buffer = bytearray(abi.REGS_SIZE)
    fcntl.ioctl(machine.vcpus[vcpu].file.fd, abi.GET_REGS, buffer)
    return dict(zip(abi.REG_NAMES, abi.REGS.unpack(buffer), strict=True))
