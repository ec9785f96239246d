"""Asynchronous write protection by userfaultfd, and the scan that takes what was written: the ioctls of both.

    struct uffdio_api           u64 api 0xAA | features | ioctls
    struct uffdio_register      u64 start | length | mode | ioctls
    struct uffdio_writeprotect  u64 start | length | mode
    struct uffdio_range         u64 start | length

    struct pm_scan_arg, 12 u64
    size | flags | start | end | walk_end | vec | vec_len | max_pages |
    category_inverted | category_mask | category_anyof_mask | return_mask

    struct page_region          u64 start | end | categories

WP_ASYNC: the kernel resolves a write to a protected page itself, by dropping the protection; a page without it was
written. Nobody waits and nothing is read from the descriptor. Source: Linux include/uapi/linux/userfaultfd.h, fs.h,
Documentation/admin-guide/mm/pagemap.rst and userfaultfd.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from functools import cache

from ckptd.errors import TrackerError, TrackerUnavailable

__all__ = [
    "ABSENT", "WRITTEN", "KernelLacks", "hides_holes", "kernel_lacks", "open_user_mode", "register", "scan_argument",
    "set_up", "unregister", "walk_from", "write_protect",
]  # fmt: skip

_API, _REGISTER, _UNREGISTER, _WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0x8010AA01, 0xC018AA06
_FEATURES = {"PAGEFAULT_FLAG_WP": 1 << 0, "WP_HUGETLBFS_SHMEM": 1 << 12, "WP_UNPOPULATED": 1 << 13, "WP_ASYNC": 1 << 15}
_MODE_WP = 2  # UFFDIO_REGISTER_MODE_WP
_PROTECT = 1  # UFFDIO_WRITEPROTECT_MODE_WP

SCAN = 0xC0606610  # PAGEMAP_SCAN, _IOWR('f', 16, 96)
_WP_MATCHING, _CHECK_WPASYNC = 1, 2
_IS_WRITTEN, _IS_PRESENT, _IS_SWAPPED = 1 << 1, 1 << 3, 1 << 4
_ARGUMENT = struct.Struct("<12Q")
_WALK_OF = struct.Struct("<3Q")  # start, end, walk_end: at byte 16

WRITTEN = (0, _IS_WRITTEN)
"""(category_inverted, category_mask): pages without the protection."""
ABSENT = (_IS_PRESENT | _IS_SWAPPED, _IS_PRESENT | _IS_SWAPPED)
"""Neither present, nor swapped, nor marked as protected: ranges without page tables."""

_SYS_USERFAULTFD = 323
_USER_MODE = os.O_CLOEXEC | os.O_NONBLOCK | 1  # UFFD_USER_MODE_ONLY, for which no permission is needed
_HUGE = 2 << 20

_NEWER = "use Linux 6.7 or newer with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class KernelLacks(TrackerUnavailable):
    """The kernel itself lacks a feature: no permission would help, another tracker may."""


def set_up(uffd: int) -> None:
    """Agree on the features. Raises KernelLacks naming those that are missing."""
    try:
        fcntl.ioctl(uffd, _API, bytearray(struct.pack("<3Q", 0xAA, sum(_FEATURES.values()), 0)))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise TrackerError(f"userfaultfd does not set up: {error.strerror}") from error
        raise KernelLacks(
            f"this kernel's userfaultfd does not have all of {', '.join(_FEATURES)}", hint=_NEWER
        ) from error


def register(uffd: int, start: int, end: int) -> None:
    """In all mappings of this range, and in those that have been registered before. Raises OSError."""
    fcntl.ioctl(uffd, _REGISTER, bytearray(struct.pack("<4Q", start, end - start, _MODE_WP, 0)))


def unregister(uffd: int, start: int, end: int) -> None:
    """Undoes `register`, and the protection. Raises OSError."""
    fcntl.ioctl(uffd, _UNREGISTER, bytearray(struct.pack("<2Q", start, end - start)))


def write_protect(uffd: int, start: int, end: int) -> None:
    """All pages, those that do not exist yet too. Raises OSError."""
    fcntl.ioctl(uffd, _WRITEPROTECT, bytearray(struct.pack("<3Q", start, end - start, _PROTECT)))


def scan_argument(what: tuple[int, int], vector: int, length: int) -> bytearray:
    """For PAGEMAP_SCAN: find such pages and protect them again, page by page in one step; `walk_from` says where.

    Fails with EPERM at a mapping that is not registered; what was found before it is lost then. `vector` is the address
    of an array of `length` page_regions.
    """
    flags = _WP_MATCHING | _CHECK_WPASYNC
    inverted, mask = what
    return bytearray(
        _ARGUMENT.pack(_ARGUMENT.size, flags, 0, 0, 0, vector, length, 0, inverted, mask, 0, _IS_WRITTEN)
    )  # fmt: skip


def walk_from(pagemap: int, argument: bytearray, start: int, end: int) -> tuple[int, int]:
    """One PAGEMAP_SCAN: (regions found, where the walk ended: before `end` when the vector was full)."""
    _WALK_OF.pack_into(argument, 16, start, end, 0)
    count: int = fcntl.ioctl(pagemap, SCAN, argument)
    ended: int = _WALK_OF.unpack_from(argument, 16)[2]
    if not start < ended <= end:
        raise TrackerError(f"PAGEMAP_SCAN went from {start:#x} to {ended:#x}, which is not towards {end:#x}")
    return count, ended


def open_user_mode() -> int:
    """A userfaultfd of our own memory. Raises OSError."""
    fd: int = _libc.syscall(_SYS_USERFAULTFD, _USER_MODE)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"userfaultfd(2): {os.strerror(number)}")
    return fd


@cache
def kernel_lacks() -> KernelLacks | None:
    """What of this kernel is missing, tried on our own memory; None: nothing, or it cannot be tried here."""
    try:
        _try_hole()
    except KernelLacks as error:
        return error
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return KernelLacks("this kernel has no userfaultfd(2)", hint=_NEWER)
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return KernelLacks("this kernel's pagemap has no PAGEMAP_SCAN", hint=_NEWER)
    return None


@cache
def hides_holes() -> bool:
    """True: this kernel's scan says nothing of ranges without page tables, as after MADV_DONTNEED of a huge page.

    They read as zeros from then on, so they must be searched for. Also True where it cannot be tried.
    """
    try:
        return not _try_hole()
    except (OSError, TrackerError):
        return True


def _try_hole() -> bool:
    """Does a scan of registered memory that was never touched report it?"""
    with mmap.mmap(-1, 2 * _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        anchor = ctypes.c_char.from_buffer(memory)
        start = -(-ctypes.addressof(anchor) // _HUGE) * _HUGE
        del anchor  # it would keep the memory from being unmapped
        regions = (ctypes.c_uint64 * (3 * 4))()
        uffd = open_user_mode()
        try:
            set_up(uffd)
            register(uffd, start, start + _HUGE)
            pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                argument = scan_argument(WRITTEN, ctypes.addressof(regions), 4)
                return walk_from(pagemap, argument, start, start + _HUGE)[0] > 0
            finally:
                os.close(pagemap)
        finally:
            os.close(uffd)
