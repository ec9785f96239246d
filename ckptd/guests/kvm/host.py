"""This host's KVM: opened with errors that name the cure, and what it can do.

Knows the device and its capabilities, no VM.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import TrackerUnavailable
from ckptd.guests.kvm import abi
from ckptd.guests.kvm.abi import Cap

__all__ = ["DEVICE", "Features", "features_of", "open_kvm"]

DEVICE = Path("/dev/kvm")
_MODULES = Path("/sys/module")


@dataclass(frozen=True, slots=True)
class Features:
    """What the host's KVM offers a checkpoint.

    `ring_entries`: the most that a dirty ring may have, 0 for none. `ring_reserve`: entries of a ring that may be
    overrun before a vCPU is stopped, so that more than size minus reserve means that pages may be lost. `exact`: a
    dirty log names the written pages only (hardware paging); shadow paging logs page table updates too.
    """

    manual_clear: bool
    initially_set: bool
    ring_entries: int
    ring_reserve: int
    exact: bool
    xsave_bytes: int
    max_vcpus: int
    module: str


def open_kvm(device: Path = DEVICE) -> int:
    """A descriptor of /dev/kvm. Raises TrackerUnavailable with the cure."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TrackerUnavailable(f"{device} cannot be opened: {error.strerror}", hint=_cure(error, device)) from error
    try:
        version = fcntl.ioctl(fd, abi.GET_API_VERSION, 0)
    except OSError as error:
        os.close(fd)
        raise TrackerUnavailable(f"{device} is not KVM's device: {error.strerror}") from error
    if version != abi.API_VERSION:
        os.close(fd)
        raise TrackerUnavailable(f"{device} speaks version {version} of KVM's ABI, not {abi.API_VERSION}")
    for cap in (Cap.USER_MEMORY, Cap.IMMEDIATE_EXIT, Cap.VCPU_EVENTS, Cap.MP_STATE, Cap.DEBUGREGS, Cap.ADJUST_CLOCK):
        if not check(fd, cap):
            os.close(fd)
            raise TrackerUnavailable(f"this kernel's KVM lacks KVM_CAP_{cap.name}", hint="use a newer kernel")
    return fd


def check(fd: int, cap: Cap) -> int:
    """KVM_CHECK_EXTENSION: 0 where the kernel does not know the capability."""
    return fcntl.ioctl(fd, abi.CHECK_EXTENSION, int(cap))


def features_of(fd: int) -> Features:
    """What an open /dev/kvm offers."""
    manual = check(fd, Cap.MANUAL_DIRTY_LOG_PROTECT2)
    # ACQ_REL is the same ring with its order of accesses spelt out; on x86 kernels since 6.1 have both.
    ring_bytes = check(fd, Cap.DIRTY_LOG_RING_ACQ_REL) or check(fd, Cap.DIRTY_LOG_RING)
    module = next((name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if (_MODULES / name).is_dir()), "kvm")
    return Features(
        manual_clear=bool(manual & abi.MANUAL_PROTECT_ENABLE),
        initially_set=bool(manual & abi.MANUAL_INITIALLY_SET),
        ring_entries=ring_bytes // 16,
        ring_reserve=_reserve(module),
        exact=_parameter(module, "ept") in ("Y", "1") or _parameter(module, "npt") in ("Y", "1"),
        xsave_bytes=check(fd, Cap.XSAVE2) or abi.XSAVE_SIZE,
        max_vcpus=check(fd, Cap.MAX_VCPUS),
        module=module,
    )


def cpuid_of(fd: int) -> bytes:
    """All that KVM can offer a vCPU here: struct kvm_cpuid2."""
    buffer = bytearray(abi.CPUID_HEAD.size + abi.MAX_CPUID * abi.CPUID_ENTRY.size)
    abi.CPUID_HEAD.pack_into(buffer, 0, abi.MAX_CPUID, 0)
    fcntl.ioctl(fd, abi.GET_SUPPORTED_CPUID, buffer)
    count, _ = abi.CPUID_HEAD.unpack_from(buffer)
    return bytes(buffer[: abi.CPUID_HEAD.size + count * abi.CPUID_ENTRY.size])


def msrs_of(fd: int) -> tuple[int, ...]:
    """The model-specific registers that KVM saves and restores here."""
    buffer = bytearray(4 + 4 * abi.MAX_MSRS)
    struct.pack_into("<I", buffer, 0, abi.MAX_MSRS)
    fcntl.ioctl(fd, abi.GET_MSR_INDEX_LIST, buffer)
    (count,) = struct.unpack_from("<I", buffer)
    return struct.unpack_from(f"<{count}I", buffer, 4)


def _reserve(module: str) -> int:
    """The kernel's own reserve (KVM_DIRTY_RING_RSVD_ENTRIES, virt/kvm/dirty_ring.c), what a vCPU logs before it looks
    at its ring again: a PML buffer of 512 with hardware, a batch of emulated instructions with software paging."""
    batch = _parameter(module, "pvm_emul_batch")
    return 64 + (int(batch) if batch.isdigit() else 512)


def _parameter(module: str, name: str) -> str:
    try:
        return (_MODULES / module / "parameters" / name).read_text().strip()
    except OSError:
        return ""


_CURES: Mapping[int, str] = {
    errno.ENOENT: (
        "load the module kvm_intel or kvm_amd, switch virtualization on in the firmware, or (inside a VM) ask for"
        " nested virtualization"
    ),
    errno.ENODEV: "switch virtualization on in the firmware, or (inside a VM) ask for nested virtualization",
}


def _cure(error: OSError, device: Path) -> str | None:
    if error.errno not in (errno.EACCES, errno.EPERM):
        return _CURES.get(error.errno or 0)
    try:
        found = device.stat()
        group = grp.getgrgid(found.st_gid).gr_name if found.st_mode & 0o060 == 0o060 and found.st_gid else ""
    except (OSError, KeyError):
        group = ""
    if group:
        return f"add this user to the group {group} (`usermod -aG {group} USER`), and log in anew"
    return f"run as root, or give the device to a group of this user: `chown root:kvm {device}; chmod 660 {device}`"
