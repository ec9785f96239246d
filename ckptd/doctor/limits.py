"""How much there is of what guests take: CPUs, memory in its kinds, and the network devices of a guest."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import resource
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ckptd.doctor.findings import Check, Finding, no, yes
from ckptd.doctor.system import address_of, closing_fd, libc_call
from ckptd.units import format_size

__all__ = [
    "CHECKS", "cpus", "dev_shm", "hugetlb", "locked_memory", "memory", "network_namespace", "transparent_huge_pages",
    "tun",
]  # fmt: skip

MEMINFO = Path("/proc/meminfo")
HUGE = Path("/sys/kernel/mm")
SHM = Path("/dev/shm")
TUN = Path("/dev/net/tun")

_MAP_HUGETLB = 0x40000
_MLOCK_ONFAULT = 1
_LOCK_BYTES = 1 << 30
_SHM_BYTES = 768 << 20  # the demo's guest of 256 MiB, its replica, and something to spare
_NEWNET = 0x40000000  # CLONE_NEWNET
_TUNSETIFF = 0x400454CA
_TAP, _NO_PI = 0x0002, 0x1000  # IFF_*


def cpus() -> Finding:
    """Those that this process may use."""
    count = len(os.sched_getaffinity(0))
    if count < 2:
        return yes("cpus", "1 CPU", cure="give the host two: guest and daemon want to run at once", count=count)
    return yes("cpus", f"{count} CPUs", count=count)


def memory(meminfo: Path = MEMINFO) -> Finding:
    """All, and what is available now."""
    values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines()}
    total, available = values["MemTotal"], values["MemAvailable"]
    return yes(
        "memory", f"{format_size(total)}, of which {format_size(available)} are available",
        total_bytes=total, available_bytes=available,
    )  # fmt: skip


def transparent_huge_pages(huge: Path = HUGE) -> Finding:
    """For private memory, and for shared memory such as a guest's memfd."""
    name = "transparent_huge_pages"
    directory = huge / "transparent_hugepage"
    try:
        private, shared = (_chosen((directory / file).read_text()) for file in ("enabled", "shmem_enabled"))
    except FileNotFoundError:
        return no(name, "this kernel has none", "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    detail = f"private memory: {private}; shared memory: {shared}"
    if private == "never":
        return no(name, detail, f"`echo madvise > {directory}/enabled`", private=private, shared=shared)
    return yes(name, f"{detail}; tracking splits them where the guest writes", private=private, shared=shared)


def hugetlb(huge: Path = HUGE) -> Finding:
    """Pools of huge pages; one page of the default size is reserved for a moment, none is taken."""
    name = "hugetlb"
    pools = {}
    for pool in sorted((huge / "hugepages").glob("hugepages-*kB")):
        size = int(pool.name.removeprefix("hugepages-").removesuffix("kB")) << 10
        total, free = (int((pool / file).read_text()) for file in ("nr_hugepages", "free_hugepages"))
        pools[size] = (total, free)
    if not pools:
        return no(name, "this kernel has no pools of huge pages", "use a kernel with CONFIG_HUGETLBFS")
    detail = ", ".join(f"{free} of {total} free of {format_size(size)}" for size, (total, free) in pools.items())
    if not any(total for total, _ in pools.values()):
        return no(name, "the pools are empty", "for a guest on hugetlb only: `sysctl -w vm.nr_hugepages=N`")
    try:
        mmap.mmap(-1, _default_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB).close()
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return no(name, f"{detail}: none of the default size to be had", "`sysctl -w vm.nr_hugepages=N`, a larger N")
    return yes(name, detail)


def locked_memory(size_bytes: int = _LOCK_BYTES) -> Finding:
    """Can a guest's memory be locked? Tried with memory that is not there yet, so that nothing is allocated."""
    name = "locked_memory"
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit_bytes = -1 if limit == resource.RLIM_INFINITY else limit
    said = "no limit" if limit == resource.RLIM_INFINITY else f"RLIMIT_MEMLOCK {format_size(limit)}"
    trial = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        libc_call("mlock2", address_of(trial), size_bytes, _MLOCK_ONFAULT)
    except OSError as error:
        if error.errno not in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
            raise
        return no(
            name, f"{format_size(size_bytes)} cannot be locked ({said})",
            "to lock a guest's memory: LimitMEMLOCK=infinity in the unit, or CAP_IPC_LOCK", limit_bytes=limit_bytes,
        )  # fmt: skip
    finally:
        trial.close()  # which unlocks it
    return yes(name, f"{format_size(size_bytes)} can be locked ({said})", limit_bytes=limit_bytes)


def dev_shm(shm: Path = SHM, wanted_bytes: int = _SHM_BYTES) -> Finding:
    """Memory for files: a file without a name is made there."""
    name = "dev_shm"
    try:
        found = os.statvfs(shm)
        os.close(os.open(shm, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise
        return no(name, f"{shm}: {error.strerror}", f"`mount -t tmpfs -o mode=1777 tmpfs {shm}`")
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    detail = f"{format_size(size)}, of which {format_size(free)} are free"
    if free < wanted_bytes:
        cure = f"`mount -o remount,size=50% {shm}`; in a container, --shm-size; or put replicas elsewhere"
        return no(name, f"{detail}: too small for replicas in memory", cure, size_bytes=size, free_bytes=free)
    return yes(name, detail, size_bytes=size, free_bytes=free)


def unshare_network() -> None:
    """A network namespace of this process's own."""
    libc_call("unshare", _NEWNET)


def network_namespace(unshare: Callable[[], None] = unshare_network) -> Finding:
    """Moves this process into one, so it wants a child (doctor/system.py)."""
    name = "network_namespace"
    try:
        unshare()
    except OSError as error:
        cure = {
            errno.EPERM: "run as root or with CAP_SYS_ADMIN",
            errno.EINVAL: "use a kernel with CONFIG_NET_NS",
            errno.ENOSPC: "`sysctl -w user.max_net_namespaces=1000`",
        }.get(error.errno or 0)
        if cure is None:
            raise
        return no(name, f"cannot be made: {error.strerror}", cure)
    return yes(name, "can be made")


def tun(device: Path = TUN, unshare: Callable[[], None] = unshare_network) -> Finding:
    """A tap device for a guest; made in a namespace of its own where that may be, so that nobody sees it."""
    name = "tun"
    with suppress(OSError):  # then it is seen for a moment: it ends with the descriptor
        unshare()
    try:
        with closing_fd(os.open(device, os.O_RDWR | os.O_CLOEXEC)) as fd:
            # struct ifreq: char name[16] | short flags | padding to 40 bytes
            fcntl.ioctl(fd, _TUNSETIFF, bytearray(struct.pack("<16sH22x", b"", _TAP | _NO_PI)))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return no(name, f"{device}: {error.strerror}", "`modprobe tun`; in a container, pass the device in")
        if error.errno in (errno.EPERM, errno.EACCES):
            return no(name, f"{device}: {error.strerror}", "run as root or with CAP_NET_ADMIN, or use passt")
        if error.errno == errno.ENOTTY:
            return no(name, f"{device} is not the device of tun")
        raise
    return yes(name, "a tap device can be made")


CHECKS: tuple[Check, ...] = (
    cpus, memory, transparent_huge_pages, hugetlb, locked_memory, dev_shm, network_namespace, tun,
)  # fmt: skip


def _chosen(text: str) -> str:
    """Of "always [madvise] never", the one in brackets."""
    match = re.search(r"\[([\w+]+)\]", text)
    return match[1] if match else text.strip()


def _default_size() -> int:
    line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("Hugepagesize:"))
    return int(line.split()[1]) << 10
