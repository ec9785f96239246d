"""KVM: tried with a machine of 64 pages that writes two of them and halts."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from ckptd.doctor.findings import Check, Finding, no, yes
from ckptd.doctor.system import PAGE, address_of, closing_fd, pages_of
from ckptd.errors import TrackerUnavailable
from ckptd.guests.kvm import abi
from ckptd.guests.kvm.abi import Cap, Exit
from ckptd.guests.kvm.host import DEVICE, Features, check, features_of, open_kvm

__all__ = [
    "CHECKS", "emulates", "kvm_device", "kvm_dirty_bitmap", "kvm_dirty_ring", "kvm_hardware_paging",
    "kvm_manual_clear", "kvm_ring_bounded",
]  # fmt: skip

FeaturesOf = Callable[[int], Features]

_PAGES = 64  # CLEAR_DIRTY_LOG takes no fewer
_ENTRY = 0x1000
_WRITTEN = {3, 8}
# mov [0x3000], al; mov [0x8000], al; hlt: in real mode
_PROGRAM = bytes.fromhex("a20030 a20080 f4")
_TSS = 0x1000000  # three pages that an Intel KVM wants for itself, where no memory is
_RING_ENTRY = struct.Struct("<IIQ")  # struct kvm_dirty_gfn: u32 flags | u32 slot | u64 offset
_RING_DIRTY, _RING_HARVESTED = 1, 2

# What an open that failed for a known reason says; with any other errno the answer is unknown.
_KNOWN = (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EACCES, errno.EPERM, errno.ENOTTY)
_NEWER = "use a newer kernel"


def emulates(features: Features) -> bool:
    """A software KVM: it runs guests without VT-x or AMD-V, and emulates what it cannot run directly."""
    return not features.exact and features.module not in ("kvm_intel", "kvm_amd")


def kvm_device(device: Path = DEVICE, features: FeaturesOf = features_of) -> Finding:
    """Is it there, may we open it, and is it the ABI that we speak?"""
    try:
        fd = open_kvm(device)
    except TrackerUnavailable as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in _KNOWN:
            raise
        return no("kvm_device", error.message, error.hint)
    with closing_fd(fd):
        found = features(fd)
    software = emulates(found)
    kind = f"{found.module}, which emulates: no hardware virtualization" if software else found.module
    return yes(
        "kvm_device", f"{device}, ABI {abi.API_VERSION}, {kind}; up to {found.max_vcpus} vCPUs a guest",
        module=found.module, emulates=software, max_vcpus=found.max_vcpus,
    )  # fmt: skip


def kvm_dirty_bitmap(device: Path = DEVICE) -> Finding:
    """GET_DIRTY_LOG."""
    name = "kvm_dirty_bitmap"
    try:
        fd = open_kvm(device)
    except TrackerUnavailable:
        return _no_kvm(name)
    with _Machine(fd) as machine:
        machine.add_memory()
        machine.run()
        pages = machine.log()
    if not pages >= _WRITTEN:
        return no(name, f"KVM_GET_DIRTY_LOG missed written pages: {_list(_WRITTEN - pages)}", _NEWER)
    return yes(name, "KVM_GET_DIRTY_LOG names the written pages")


def kvm_manual_clear(device: Path = DEVICE, features: FeaturesOf = features_of) -> Finding:
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 and CLEAR_DIRTY_LOG."""
    name = "kvm_manual_clear"
    try:
        fd = open_kvm(device)
    except TrackerUnavailable:
        return _no_kvm(name)
    found = features(fd)
    if not found.manual_clear:
        os.close(fd)
        return no(name, "this KVM clears the log only when it is read", _NEWER, initially_set=False)
    with _Machine(fd) as machine:
        bits = abi.MANUAL_PROTECT_ENABLE | (abi.MANUAL_INITIALLY_SET if found.initially_set else 0)
        machine.enable(Cap.MANUAL_DIRTY_LOG_PROTECT2, bits)
        machine.add_memory()
        initially_set = machine.log() == set(range(_PAGES))
        machine.clear()
        machine.run()
        pages, kept = machine.log(), machine.log()
        machine.clear()
        left = machine.log()
    if not pages >= _WRITTEN or kept != pages or left:
        return no(name, f"KVM_CLEAR_DIRTY_LOG is wrong: {_list(pages)}, then {_list(kept)}, {_list(left)}", _NEWER)
    detail = "KVM_CLEAR_DIRTY_LOG works, with INITIALLY_SET" if initially_set else (
        "KVM_CLEAR_DIRTY_LOG works, without INITIALLY_SET: to begin logging write-protects all memory at once"
    )  # fmt: skip
    return yes(name, detail, cure=None if initially_set else _NEWER, initially_set=initially_set)


def kvm_dirty_ring(device: Path = DEVICE, features: FeaturesOf = features_of) -> Finding:
    """A ring of the largest size, mapped, harvested and reset."""
    name = "kvm_dirty_ring"
    try:
        fd = open_kvm(device)
    except TrackerUnavailable:
        return _no_kvm(name)
    found = features(fd)
    if not found.ring_entries:
        os.close(fd)
        return no(name, "this KVM has no dirty ring", "use kernel 5.11 or newer, with CONFIG_HAVE_KVM_DIRTY_RING")
    size_bytes = found.ring_entries * _RING_ENTRY.size
    with _Machine(fd) as machine:
        ring_cap = Cap.DIRTY_LOG_RING_ACQ_REL if check(fd, Cap.DIRTY_LOG_RING_ACQ_REL) else Cap.DIRTY_LOG_RING
        try:
            machine.enable(ring_cap, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.E2BIG):
                raise
            return no(name, f"a ring of {found.ring_entries} entries was refused: {error.strerror}", _NEWER)
        machine.add_memory()
        machine.run()
        pages, reset = machine.take_ring(size_bytes)
    if not pages >= _WRITTEN or reset < len(pages):
        return no(name, f"the ring named pages {_list(pages)} and reset {reset} entries", _NEWER)
    return yes(
        name, f"up to {found.ring_entries} entries a vCPU, of which the last {found.ring_reserve} are a reserve",
        entries=found.ring_entries, reserve_entries=found.ring_reserve,
    )  # fmt: skip


def kvm_ring_bounded(device: Path = DEVICE, features: FeaturesOf = features_of) -> Finding:
    """Is a vCPU stopped before its ring overruns?

    Not tried: to overrun a ring makes the kernel warn in its log, once, and taints it. What decides is whether KVM
    looks at the ring after every exit, or only after a batch of instructions that it emulated.
    """
    name = "kvm_ring_bounded"
    try:
        fd = open_kvm(device)
    except TrackerUnavailable:
        return _no_kvm(name)
    with closing_fd(fd):
        found = features(fd)
    if not found.ring_entries:
        return no(name, "there is no ring")
    if emulates(found):
        return no(
            name, f"{found.module} emulates instructions in batches: a ring that fills may be overrun and lose pages",
            f"keep the ring large ({found.ring_entries} entries); an epoch that takes more than"
            f" {found.ring_entries - found.ring_reserve} of them counts as overrun, and all memory is sent again",
        )  # fmt: skip
    return yes(name, f"{found.module} stops a vCPU before its ring is full")


def kvm_hardware_paging(device: Path = DEVICE, features: FeaturesOf = features_of) -> Finding:
    """Does the log name written pages only?"""
    name = "kvm_hardware_paging"
    try:
        fd = open_kvm(device)
    except TrackerUnavailable:
        return _no_kvm(name)
    with closing_fd(fd):
        found = features(fd)
    if found.exact:
        return yes(name, "hardware paging: the log is exact", exact=True)
    cure = {
        "kvm_intel": "load kvm_intel with ept=1, or (inside a VM) ask for a CPU model with EPT",
        "kvm_amd": "load kvm_amd with npt=1, or (inside a VM) ask for a CPU model with NPT",
    }.get(found.module, "use a host with VT-x or AMD-V")
    return no(
        name, "shadow paging: the log also names pages of the guest's page tables, so a little more is sent", cure,
        exact=False,
    )  # fmt: skip


CHECKS: tuple[Check, ...] = (
    kvm_device, kvm_dirty_bitmap, kvm_manual_clear, kvm_dirty_ring, kvm_ring_bounded, kvm_hardware_paging,
)  # fmt: skip


def _no_kvm(name: str) -> Finding:
    return no(name, "there is no KVM to ask: see kvm_device")


def _list(pages: set[int]) -> str:
    return ", ".join(map(str, sorted(pages))) or "none"


class _Machine:
    """A VM with one slot at 0 and one vCPU. Takes over the descriptor of /dev/kvm."""

    def __init__(self, kvm: int) -> None:
        self._kvm = kvm
        self._open = ExitStack()
        self._open.callback(os.close, kvm)
        self._vm = fcntl.ioctl(kvm, abi.CREATE_VM, 0)
        self._open.callback(os.close, self._vm)
        self._memory = pages_of(_PAGES)
        self._memory[_ENTRY : _ENTRY + len(_PROGRAM)] = _PROGRAM
        self._vcpu = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def enable(self, cap: Cap, argument: int) -> None:
        fcntl.ioctl(self._vm, abi.ENABLE_CAP, abi.ENABLE_CAP_ARGS.pack(int(cap), 0, argument, 0, 0, 0))

    def add_memory(self) -> None:
        fcntl.ioctl(self._vm, abi.SET_TSS_ADDR, _TSS)
        size, address = len(self._memory), address_of(self._memory)
        slot = abi.MEMORY_REGION.pack(0, abi.MemoryFlag.LOG_DIRTY_PAGES, 0, size, address)
        fcntl.ioctl(self._vm, abi.SET_USER_MEMORY_REGION, slot)

    def run(self) -> None:
        """Up to its `hlt`. Raises OSError when it does not get there."""
        self._vcpu = fcntl.ioctl(self._vm, abi.CREATE_VCPU, 0)
        self._open.callback(os.close, self._vcpu)
        shared = mmap.mmap(self._vcpu, fcntl.ioctl(self._kvm, abi.GET_VCPU_MMAP_SIZE, 0))
        sregs = bytearray(abi.SREGS_SIZE)
        fcntl.ioctl(self._vcpu, abi.GET_SREGS, sregs)
        abi.SEGMENT.pack_into(sregs, 0, 0, 0xFFFF, 0, 11, 1, 0, 0, 1, 0, 0, 0, 0, 0)  # cs: real mode, at 0
        fcntl.ioctl(self._vcpu, abi.SET_SREGS, sregs)
        fcntl.ioctl(self._vcpu, abi.SET_REGS, abi.REGS.pack(*(0,) * 16, _ENTRY, 2))
        fcntl.ioctl(self._vcpu, abi.RUN, 0)
        (reason,) = abi.EXIT_REASON.unpack_from(shared)
        if reason != Exit.HLT:
            raise OSError(errno.EIO, f"a trial guest stopped with KVM's exit reason {reason}, not at its end")

    def log(self) -> set[int]:
        bitmap = ctypes.c_uint64()
        fcntl.ioctl(self._vm, abi.GET_DIRTY_LOG, abi.DIRTY_LOG.pack(0, 0, ctypes.addressof(bitmap)))
        return {page for page in range(_PAGES) if bitmap.value >> page & 1}

    def clear(self) -> None:
        bitmap = ctypes.c_uint64(2**64 - 1)
        fcntl.ioctl(self._vm, abi.CLEAR_DIRTY_LOG, abi.CLEAR_LOG.pack(0, _PAGES, 0, ctypes.addressof(bitmap)))

    def take_ring(self, size_bytes: int) -> tuple[set[int], int]:
        """The pages, and the number of entries that KVM has reset."""
        ring = mmap.mmap(self._vcpu, size_bytes, offset=abi.RING_PAGE_OFFSET * PAGE)
        pages = set()
        for at in range(0, size_bytes, _RING_ENTRY.size):
            flags, _, page = _RING_ENTRY.unpack_from(ring, at)
            if flags != _RING_DIRTY:
                break
            pages.add(page)
            struct.pack_into("<I", ring, at, _RING_HARVESTED)
        return pages, fcntl.ioctl(self._vm, abi.RESET_DIRTY_RINGS, 0)
