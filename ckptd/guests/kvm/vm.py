"""One virtual machine of KVM: its memslots, its dirty log, its vCPUs' descriptors. Thin: a method is an ioctl.

A VM belongs to the process that made it. It is never changed afterwards but for the logging of its memslots; whoever
needs another ring makes another VM (machine.py).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckptd.errors import ConfigError, GuestError, TrackerError, TrackerUnavailable
from ckptd.guests.kvm import abi
from ckptd.guests.kvm.abi import Cap
from ckptd.guests.kvm.host import Features, check
from ckptd.trackers.kvm_log import Words
from ckptd.trackers.kvm_ring import ENTRY

__all__ = ["LogMode", "VcpuFile", "Vm"]

_TSS = 0xFFFBD000  # three pages for hosts whose vCPUs cannot run in real mode; the identity map lies below them
_IDENTITY = 0xFFFBC000


@dataclass(frozen=True, slots=True)
class LogMode:
    """How a VM logs: by bitmap, by bitmap with manual clear, or by rings of `ring_entries`."""

    manual: bool = False
    initially_set: bool = False
    ring_entries: int = 0


@dataclass(slots=True)
class VcpuFile:
    """A vCPU's descriptor, the page that it shares (struct kvm_run and what follows), and its ring."""

    fd: int
    run: mmap.mmap
    ring: npt.NDArray[np.void] | None


class Vm:
    """`memory`: the bytes of each region, mapped shared and writable; `places`: their guest-physical addresses.

    The vCPUs are as KVM resets them. Raises GuestError, TrackerUnavailable, ConfigError.
    """

    def __init__(
        self,
        kvm: int,
        features: Features,
        memory: Sequence[npt.NDArray[np.uint8]],
        places: Sequence[int],
        mode: LogMode,
        vcpus: int,
    ) -> None:
        self.mode = mode
        self._memory = list(memory)  # KVM keeps addresses: the mappings must live as long as the VM
        self._places = list(places)
        self._kvm = kvm
        self.vcpus: list[VcpuFile] = []
        # By region: the last map, its address (numpy takes microseconds to tell it), and GET_DIRTY_LOG's argument.
        self._maps: dict[int, tuple[Words, int, bytes]] = {}
        self.fd = _call(kvm, abi.CREATE_VM, "a VM cannot be created")
        try:
            self._set_up(features)
            for _ in range(vcpus):
                self._add_vcpu()
        except BaseException:
            self.close()
            raise

    def _set_up(self, features: Features) -> None:
        free = all(
            place + len(rows) <= _IDENTITY or place >= _TSS + 0x3000
            for place, rows in zip(self._places, self._memory, strict=True)
        )
        if free and check(self._kvm, Cap.SET_IDENTITY_MAP_ADDR) and check(self._kvm, Cap.SET_TSS_ADDR):
            fcntl.ioctl(self.fd, abi.SET_IDENTITY_MAP_ADDR, struct.pack("<Q", _IDENTITY))
            # fcntl.ioctl takes no number above a C int
            ctypes.CDLL(None).ioctl(self.fd, ctypes.c_ulong(abi.SET_TSS_ADDR), ctypes.c_ulong(_TSS))
        if self.mode.ring_entries:
            self._enable_ring(features)
        elif self.mode.manual:
            if not features.manual_clear:
                raise TrackerUnavailable(
                    "this kernel's KVM lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
                    hint='use tracker = "kvm-bitmap", or a kernel from 5.2 on',
                )
            flags = abi.MANUAL_PROTECT_ENABLE | (abi.MANUAL_INITIALLY_SET if self.mode.initially_set else 0)
            self._enable(Cap.MANUAL_DIRTY_LOG_PROTECT2, flags)
        for region in range(len(self._memory)):
            self._set_region(region, abi.MemoryFlag(0))

    def _enable_ring(self, features: Features) -> None:
        entries, most = self.mode.ring_entries, min(features.ring_entries, abi.RING_MAX_ENTRIES)
        if not most:
            raise TrackerUnavailable(
                "this kernel's KVM lacks KVM_CAP_DIRTY_LOG_RING",
                hint='use tracker = "kvm-manual" or "kvm-bitmap", or a kernel from 5.11 on (x86-64)',
            )
        if entries > most:
            raise ConfigError(
                f"a dirty ring has at most {most} entries here, not {entries}", field="guest.ring_entries"
            )
        cap = Cap.DIRTY_LOG_RING_ACQ_REL if check(self.fd, Cap.DIRTY_LOG_RING_ACQ_REL) else Cap.DIRTY_LOG_RING
        try:
            self._enable(cap, entries * ENTRY.itemsize)
        except OSError as error:
            raise TrackerUnavailable(
                f"KVM refuses a dirty ring of {entries} entries: {error.strerror}",
                hint="try guest.ring_entries = 4096 to 65536",
            ) from error

    def _enable(self, cap: Cap, argument: int) -> None:
        fcntl.ioctl(self.fd, abi.ENABLE_CAP, abi.ENABLE_CAP_ARGS.pack(int(cap), 0, argument, 0, 0, 0))

    def _add_vcpu(self) -> None:
        """The next vCPU, as KVM resets it."""
        fd = _call(self.fd, abi.CREATE_VCPU, "a vCPU cannot be created", len(self.vcpus))
        vcpu = VcpuFile(fd, mmap.mmap(fd, fcntl.ioctl(self._kvm, abi.GET_VCPU_MMAP_SIZE, 0)), None)
        self.vcpus.append(vcpu)
        if self.mode.ring_entries:
            size = self.mode.ring_entries * ENTRY.itemsize
            ring = mmap.mmap(fd, size, offset=abi.RING_PAGE_OFFSET * mmap.PAGESIZE)
            vcpu.ring = np.frombuffer(ring, dtype=ENTRY)

    def close(self) -> None:
        """Leave it; the kernel ends it when the last mapping of a ring is gone, too."""
        for vcpu in self.vcpus:
            os.close(vcpu.fd)
            vcpu.ring = None
        self.vcpus.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # --- the dirty log

    def arm(self, logging: bool) -> None:
        for region in range(len(self._memory)):
            self._set_region(region, abi.MemoryFlag.LOG_DIRTY_PAGES if logging else abi.MemoryFlag(0))

    def get_dirty_log(self, region: int, words: Words) -> None:
        known = self._maps.get(region)
        if known is None or known[0] is not words:
            known = self._know(region, words)
        try:
            fcntl.ioctl(self.fd, abi.GET_DIRTY_LOG, known[2])
        except OSError as error:
            raise TrackerError(f"KVM_GET_DIRTY_LOG failed: {error.strerror}", region=region) from error

    def clear_dirty_log(self, region: int, first: int, pages: int, words: Words) -> None:
        known = self._maps.get(region)
        if known is None or known[0] is not words:
            known = self._know(region, words)
        argument = abi.CLEAR_LOG.pack(region, pages, first, known[1] + (first >> 3))
        try:
            fcntl.ioctl(self.fd, abi.CLEAR_DIRTY_LOG, argument)
        except OSError as error:
            raise TrackerError(
                f"KVM_CLEAR_DIRTY_LOG of {pages} pages failed: {error.strerror}", region=region, gfn=first
            ) from error

    def _know(self, region: int, words: Words) -> tuple[Words, int, bytes]:
        address = words.ctypes.data
        self._maps[region] = known = (words, address, abi.DIRTY_LOG.pack(region, 0, address))
        return known

    def reset_rings(self) -> int:
        return fcntl.ioctl(self.fd, abi.RESET_DIRTY_RINGS, 0)

    # --- clock

    def clock(self) -> bytes:
        """struct kvm_clock_data, as SET_CLOCK takes it: the guest's clock goes on from there."""
        buffer = bytearray(abi.CLOCK_SIZE)
        fcntl.ioctl(self.fd, abi.GET_CLOCK, buffer)
        clock, _, _ = abi.CLOCK.unpack_from(buffer)
        # Without flags SET_CLOCK adds no time: while nobody ran, no time passed for the guest.
        return abi.CLOCK.pack(clock, 0, 0) + bytes(abi.CLOCK_SIZE - abi.CLOCK.size)

    def set_clock(self, clock: bytes) -> None:
        fcntl.ioctl(self.fd, abi.SET_CLOCK, clock)

    def _set_region(self, region: int, flags: abi.MemoryFlag) -> None:
        rows = self._memory[region]
        argument = abi.MEMORY_REGION.pack(region, int(flags), self._places[region], len(rows), rows.ctypes.data)
        try:
            fcntl.ioctl(self.fd, abi.SET_USER_MEMORY_REGION, argument)
        except OSError as error:
            raise GuestError(
                f"KVM refuses memory of {len(rows)} bytes at {self._places[region]:#x}: {error.strerror}",
                hint="is there enough memory for its page tables?" if error.errno == errno.ENOMEM else None,
                region=region,
            ) from error


def _call(fd: int, request: int, what: str, argument: int = 0) -> int:
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise GuestError(f"{what}: {error.strerror}") from error
