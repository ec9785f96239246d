"""Everything that a vCPU is, saved and loaded: an ioctl each way for each part.

The vCPU must be outside of KVM_RUN, with its last exit completed. Order of loading: as QEMU's kvm_arch_put_registers
(target/i386/kvm/kvm.c): CPUID first, since it says what the rest may hold; events after the registers that they refer
to.
"""

from __future__ import annotations

import fcntl
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ckptd.errors import GuestError
from ckptd.guests.kvm import abi
from ckptd.guests.kvm.host import Features

__all__ = ["Layout", "enter_flat", "load_vcpu", "save_vcpu", "usable_msrs"]


class _Part(NamedTuple):
    name: str
    get: int
    set: int
    size: int


_PARTS = (
    _Part("sregs", abi.GET_SREGS, abi.SET_SREGS, abi.SREGS_SIZE),
    _Part("xcrs", abi.GET_XCRS, abi.SET_XCRS, abi.XCRS_SIZE),
    _Part("xsave", abi.GET_XSAVE, abi.SET_XSAVE, abi.XSAVE_SIZE),
    _Part("regs", abi.GET_REGS, abi.SET_REGS, abi.REGS_SIZE),
    _Part("events", abi.GET_VCPU_EVENTS, abi.SET_VCPU_EVENTS, abi.VCPU_EVENTS_SIZE),
    _Part("mp_state", abi.GET_MP_STATE, abi.SET_MP_STATE, abi.MP_STATE_SIZE),
    _Part("debugregs", abi.GET_DEBUGREGS, abi.SET_DEBUGREGS, abi.DEBUGREGS_SIZE),
)


class Layout(NamedTuple):
    """The parts of a saved vCPU on this host and their sizes in bytes; `msrs` are the indices."""

    xsave_bytes: int
    msrs: tuple[int, ...]

    @classmethod
    def of(cls, features: Features, msrs: Sequence[int]) -> Layout:
        return cls(features.xsave_bytes, tuple(msrs))

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {part.name: part.size for part in _PARTS}
        msrs = abi.MSRS_HEAD.size + len(self.msrs) * abi.MSR_ENTRY.size
        return {**sizes, "xsave": self.xsave_bytes, "msrs": msrs}


def save_vcpu(fd: int, layout: Layout) -> dict[str, bytes]:
    """All parts, by name. Raises GuestError."""
    saved = {}
    for part in _PARTS:
        large = part.name == "xsave" and layout.xsave_bytes > abi.XSAVE_SIZE
        buffer = bytearray(layout.xsave_bytes if part.name == "xsave" else part.size)
        _do(fd, abi.GET_XSAVE2 if large else part.get, buffer, f"a vCPU's {part.name} cannot be read")
        saved[part.name] = bytes(buffer)
    values = _msrs([(index, 0) for index in layout.msrs])
    if _do(fd, abi.GET_MSRS, values, "a vCPU's MSRs cannot be read") != len(layout.msrs):
        raise GuestError("a vCPU's MSRs cannot all be read any more")
    saved["msrs"] = bytes(values)
    return saved


def load_vcpu(fd: int, saved: Mapping[str, bytes], cpuid: bytes) -> None:
    """Make a fresh vCPU what `save_vcpu` saw. Raises GuestError naming the part; the vCPU must not run then."""
    _do(fd, abi.SET_CPUID2, bytearray(cpuid), "the guest's CPUID is refused here")
    for part in _PARTS[:3]:
        _do(fd, part.set, bytearray(saved[part.name]), f"a vCPU's {part.name} is refused here")
    msrs = bytearray(saved["msrs"])
    count, _ = abi.MSRS_HEAD.unpack_from(msrs)
    taken = _do(fd, abi.SET_MSRS, msrs, "a vCPU's MSRs are refused here")
    if taken < count:
        index, _, value = abi.MSR_ENTRY.unpack_from(msrs, abi.MSRS_HEAD.size + taken * abi.MSR_ENTRY.size)
        raise GuestError(f"MSR {index:#x} of a vCPU cannot be set to {value:#x} here", hint="use hosts of one model")
    for part in _PARTS[3:]:
        _do(fd, part.set, bytearray(saved[part.name]), f"a vCPU's {part.name} is refused here")


def enter_flat(fd: int, entry: int, cpuid: bytes, registers: Mapping[str, int]) -> None:
    """A fresh vCPU in flat 32-bit protected mode at `entry`: paging and interrupts off."""
    _do(fd, abi.SET_CPUID2, bytearray(cpuid), "the host's CPUID is refused")
    sregs = bytearray(abi.SREGS_SIZE)
    _do(fd, abi.GET_SREGS, sregs, "a vCPU's sregs cannot be read")
    # base, limit, selector, then type present dpl db s l g avl unusable padding: 4 GiB, 32 bits, ring 0
    code = abi.SEGMENT.pack(0, 0xFFFFFFFF, 8, 11, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    data = abi.SEGMENT.pack(0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    sregs[: 6 * abi.SEGMENT.size] = code + 5 * data
    cr0 = int.from_bytes(sregs[abi.SREGS_CR0_AT : abi.SREGS_CR0_AT + 8], "little") | abi.CR0_PE
    sregs[abi.SREGS_CR0_AT : abi.SREGS_CR0_AT + 8] = cr0.to_bytes(8, "little")
    _do(fd, abi.SET_SREGS, sregs, "flat protected mode is refused")
    values = {**dict.fromkeys(abi.REG_NAMES, 0), **registers, "rip": entry, "rflags": 2}
    _do(fd, abi.SET_REGS, bytearray(abi.REGS.pack(*values.values())), "the entry registers are refused")


def usable_msrs(fd: int, indices: Sequence[int]) -> tuple[int, ...]:
    """Those that a fresh vCPU lets us read, and write again. The kernel lists some that it then refuses."""
    usable = []
    for index in indices:
        value = _msrs([(index, 0)])
        try:
            if fcntl.ioctl(fd, abi.GET_MSRS, value) == 1 and fcntl.ioctl(fd, abi.SET_MSRS, value) == 1:
                usable.append(index)
        except OSError:
            continue
    return tuple(usable)


def _msrs(entries: Sequence[tuple[int, int]]) -> bytearray:
    packed = b"".join(abi.MSR_ENTRY.pack(index, 0, value) for index, value in entries)
    return bytearray(abi.MSRS_HEAD.pack(len(entries), 0) + packed)


def _do(fd: int, request: int, buffer: bytearray, what: str) -> int:
    try:
        return int(fcntl.ioctl(fd, request, buffer))
    except OSError as error:
        raise GuestError(f"{what}: {error.strerror}") from error
