"""What finds the written pages of a process: userfaultfd with PAGEMAP_SCAN, and soft-dirty.

Tried on memory of this process's own; `soft_dirty` clears the bits of the whole process, so it wants a child
(doctor/system.py). Constants: Linux include/uapi/linux/userfaultfd.h and fs.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ckptd.doctor.findings import Check, Finding, no, yes
from ckptd.doctor.system import PAGE, SYS_PTRACE, address_of, closing_fd, has_capability, pages_of, syscall

__all__ = [
    "CHECKS", "page_tracking", "pagemap_scan", "soft_dirty", "userfaultfd_device", "userfaultfd_syscall",
    "userfaultfd_unprivileged", "userfaultfd_user_mode", "userfaultfd_wp_async",
]  # fmt: skip

DEVICE = Path("/dev/userfaultfd")
UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")
PAGEMAP, CLEAR_REFS = Path("/proc/self/pagemap"), Path("/proc/self/clear_refs")

_SYS_USERFAULTFD = 323
_USER_MODE_ONLY = 1
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_IOC_NEW = 0xAA00  # of the device: _IO(0xAA, 0)
_API, _REGISTER, _WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06
_REGISTER_WP, _PROTECT_WP = 2, 1  # modes
_FEATURES = {"PAGEFAULT_FLAG_WP": 1 << 0, "WP_HUGETLBFS_SHMEM": 1 << 12, "WP_UNPOPULATED": 1 << 13, "WP_ASYNC": 1 << 15}

_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg: 12 u64)
_WP_MATCHING, _CHECK_WPASYNC = 1, 2
_WRITTEN, _PRESENT = 1 << 1, 1 << 3
_SOFT_DIRTY_BIT = 55  # of an entry of pagemap

_NEWER = "use kernel 6.7 or newer"
_NO_USERFAULTFD = "use a kernel with CONFIG_USERFAULTFD; in a container, let its seccomp profile allow userfaultfd"

Opener = Callable[[], int]


def open_syscall() -> int:
    """A userfaultfd that also takes the kernel's own accesses."""
    return syscall(_SYS_USERFAULTFD, _FLAGS)


def open_user_mode() -> int:
    """A userfaultfd that anybody may have; asynchronous write protection never asks for what it lacks."""
    return syscall(_SYS_USERFAULTFD, _FLAGS | _USER_MODE_ONLY)


def open_device(device: Path = DEVICE) -> int:
    """A userfaultfd by permission to a file."""
    with closing_fd(os.open(device, os.O_RDWR | os.O_CLOEXEC)) as fd:
        return fcntl.ioctl(fd, _IOC_NEW, _FLAGS)


OPENERS: tuple[Opener, ...] = (open_syscall, open_device, open_user_mode)


def userfaultfd_syscall(opener: Opener = open_syscall) -> Finding:
    """The system call, with all rights."""
    name = "userfaultfd_syscall"
    try:
        os.close(opener())
    except OSError as error:
        if error.errno == errno.EPERM:
            cure = (
                "let the container's seccomp profile allow userfaultfd" if has_capability(SYS_PTRACE)
                else "`sysctl -w vm.unprivileged_userfaultfd=1`, or run as root or with CAP_SYS_PTRACE"
            )  # fmt: skip
            return no(name, "userfaultfd(2) is not permitted to this user", cure)
        if error.errno == errno.ENOSYS:
            return no(name, "userfaultfd(2) is not there", _NO_USERFAULTFD)
        raise
    return yes(name, "userfaultfd(2) works")


def userfaultfd_user_mode(opener: Opener = open_user_mode) -> Finding:
    """The system call with UFFD_USER_MODE_ONLY, which needs no permission."""
    name = "userfaultfd_user_mode"
    try:
        os.close(opener())
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
            return no(name, f"userfaultfd(2) with UFFD_USER_MODE_ONLY: {error.strerror}", _NO_USERFAULTFD)
        raise
    return yes(name, "userfaultfd(2) with UFFD_USER_MODE_ONLY works; no permission is needed for it")


def userfaultfd_device(device: Path = DEVICE) -> Finding:
    """The device file."""
    name = "userfaultfd_device"
    try:
        os.close(open_device(device))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return no(name, f"{device} is not there", "use kernel 6.1 or newer; in a container, pass the device in")
        if error.errno in (errno.EACCES, errno.EPERM):
            return no(name, f"{device} is not permitted to this user", f"give a group access to {device} (udev rule)")
        if error.errno == errno.ENOTTY:
            return no(name, f"{device} is not the device of userfaultfd")
        raise
    return yes(name, f"{device} makes a userfaultfd")


def userfaultfd_unprivileged(sysctl: Path = UNPRIVILEGED) -> Finding:
    """May any user have a userfaultfd with all rights? It is made inside QEMU, so QEMU's user counts, not ours."""
    name = "userfaultfd_unprivileged"
    try:
        value = sysctl.read_text().strip()
    except FileNotFoundError:
        return no(name, "this kernel has no vm.unprivileged_userfaultfd", _NO_USERFAULTFD)
    if value == "0":
        what = "a QEMU that does not run as root can have one of user mode only, which is all that tracking needs"
        return no(name, f"vm.unprivileged_userfaultfd is 0: {what}")
    return yes(name, f"vm.unprivileged_userfaultfd is {value}: any user may have a userfaultfd")


def userfaultfd_wp_async(openers: Sequence[Opener] = OPENERS) -> Finding:
    """The features that asynchronous write protection needs: listed by the kernel, and then accepted."""
    name = "userfaultfd_wp_async"
    opened = _open_any(openers)
    if opened is None:
        return no(name, "there is no userfaultfd: see userfaultfd_syscall")
    with closing_fd(opened.fd):
        offered = _handshake(opened.fd, 0)
    missing = [feature for feature, bit in _FEATURES.items() if not offered & bit]
    if missing:
        return no(name, f"userfaultfd lacks {', '.join(missing)}", f"{_NEWER}, with CONFIG_PTE_MARKER_UFFD_WP")
    with closing_fd(opened.opener()) as fd:
        _handshake(fd, sum(_FEATURES.values()))
    return yes(name, f"userfaultfd has {', '.join(_FEATURES)}", features=offered)


def pagemap_scan(pagemap: Path = PAGEMAP) -> Finding:
    """The ioctl by itself: which of four pages are present?"""
    name = "pagemap_scan"
    memory = pages_of(4)
    memory[PAGE], memory[3 * PAGE] = 1, 1
    try:
        with closing_fd(os.open(pagemap, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            found = _scan(fd, memory, 0, _PRESENT)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return no(name, "this kernel's pagemap has no PAGEMAP_SCAN", _NEWER)
        if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
            return no(name, f"{pagemap}: {error.strerror}", "mount /proc; use a kernel with CONFIG_PROC_PAGE_MONITOR")
        raise
    if found != [1, 3]:
        return no(name, f"PAGEMAP_SCAN reports pages {found}, pages [1, 3] are present", _NEWER)
    return yes(name, "PAGEMAP_SCAN works")


def page_tracking(pagemap: Path = PAGEMAP, openers: Sequence[Opener] = OPENERS) -> Finding:
    """All of it: does a scan name just the pages that this process and the kernel wrote, once?"""
    name = "page_tracking"
    opened = _open_any(openers)
    if opened is None:
        return no(name, "there is no userfaultfd: see userfaultfd_syscall")
    memory = pages_of(16)
    memory[:] = bytes(len(memory))
    start = address_of(memory)
    with closing_fd(opened.fd) as fd:
        try:
            _handshake(fd, sum(_FEATURES.values()))
            fcntl.ioctl(fd, _REGISTER, bytearray(struct.pack("<4Q", start, len(memory), _REGISTER_WP, 0)))
            fcntl.ioctl(fd, _WRITEPROTECT, bytearray(struct.pack("<3Q", start, len(memory), _PROTECT_WP)))
            memory[3 * PAGE] = 1
            _kernel_writes(memory, 7 * PAGE)
            with closing_fd(os.open(pagemap, os.O_RDONLY | os.O_CLOEXEC)) as scanned:
                flags = _WP_MATCHING | _CHECK_WPASYNC
                first, second = (_scan(scanned, memory, flags, _WRITTEN) for _ in range(2))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTTY, errno.ENOENT, errno.EACCES, errno.EPERM):
                return no(name, f"not possible ({error.strerror}): see userfaultfd_wp_async and pagemap_scan")
            raise
    if (first, second) != ([3, 7], []):
        return no(name, f"pages [3, 7] were written; a scan reports {first}, the next one {second}", _NEWER)
    return yes(name, f"a scan names just the written pages and protects them again ({opened.opener.__name__[5:]})")


def soft_dirty(pagemap: Path = PAGEMAP, clear_refs: Path = CLEAR_REFS) -> Finding:
    """Clear, write a page, look: there are kernels that take the order and report nothing."""
    name = "soft_dirty"
    memory = pages_of(4)
    memory[:] = bytes(len(memory))
    try:
        clear_refs.write_text("4")
        memory[PAGE] = 1
        with pagemap.open("rb", buffering=0) as file:
            file.seek(address_of(memory) // PAGE * 8)
            entries = struct.unpack("<4Q", file.read(32))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EINVAL):
            return no(name, f"{error.filename or clear_refs}: {error.strerror}", _SOFT_DIRTY_KERNEL)
        raise
    found = [page for page, entry in enumerate(entries) if entry >> _SOFT_DIRTY_BIT & 1]
    if 1 not in found:
        return no(name, "a page was written, and the kernel reported none", _SOFT_DIRTY_KERNEL)
    if found != [1]:
        return yes(name, f"works, but reports too much: pages {found}, of which 1 was written", exact=False)
    return yes(name, "clear_refs and pagemap name the written page", exact=True)


_SOFT_DIRTY_KERNEL = "use a kernel with CONFIG_MEM_SOFT_DIRTY; better, track by userfaultfd, which replaces it"

CHECKS: tuple[Check, ...] = (
    userfaultfd_syscall, userfaultfd_user_mode, userfaultfd_device, userfaultfd_unprivileged, userfaultfd_wp_async,
    pagemap_scan, page_tracking, soft_dirty,
)  # fmt: skip


class _Opened(NamedTuple):
    fd: int
    opener: Opener


def _open_any(openers: Sequence[Opener]) -> _Opened | None:
    for opener in openers:
        try:
            return _Opened(opener(), opener)
        except OSError:
            continue  # each has a finding of its own that says why
    return None


def _handshake(fd: int, wanted: int) -> int:
    """UFFDIO_API: what the kernel has, after it has agreed to what is wanted."""
    api = bytearray(struct.pack("<3Q", 0xAA, wanted, 0))
    fcntl.ioctl(fd, _API, api)
    found: int = struct.unpack("<3Q", api)[1]
    return found


def _scan(pagemap: int, memory: mmap.mmap, flags: int, category: int) -> list[int]:
    """The numbers of the pages of this category."""
    start, end = address_of(memory), address_of(memory) + len(memory)
    regions = (ctypes.c_uint64 * (3 * 16))()  # struct page_region: start | end | categories
    argument = struct.pack(
        "<12Q", 96, flags, start, end, 0, ctypes.addressof(regions), 16, 0, 0, category, 0, category
    )  # fmt: skip
    count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, bytearray(argument))
    found: list[int] = []
    for region in range(count):
        found += range((regions[3 * region] - start) // PAGE, (regions[3 * region + 1] - start) // PAGE)
    return found


def _kernel_writes(memory: mmap.mmap, at: int) -> None:
    """As a device backend's read(2) into the guest's memory."""
    reading, writing = os.pipe()
    with closing_fd(reading), closing_fd(writing):
        os.write(writing, b"x")
        os.readv(reading, [memoryview(memory)[at : at + 1]])
