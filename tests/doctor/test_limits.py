"""CPUs, memory and network: as they are here, and each kind of too little."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptd.doctor import limits
from ckptd.doctor.findings import Finding
from ckptd.doctor.system import in_child

Check = Callable[..., Finding]


def refuses(number: int) -> Callable[[], None]:
    def call() -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("check", limits.CHECKS)
@pytest.mark.parametrize("ordinary", [False, True], ids=["as we are", "ordinary user"])
def test_each_check_answers_here_whatever_this_machine_is(check: Check, ordinary: bool, settled: Any) -> None:
    settled(check, ordinary)


def test_cpus_are_those_that_we_may_use() -> None:
    def pinned() -> Finding:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return limits.cpus()

    found = in_child(pinned)
    assert (found.data["count"], found.detail) == (1, "1 CPU") and found.cure
    assert limits.cpus().data["count"] == len(os.sched_getaffinity(0))


def test_memory_is_counted_in_bytes(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4194304 kB\nMemFree: 1 kB\nMemAvailable:  2097152 kB\nHugePages_Total: 0\n")
    found = limits.memory(meminfo)
    assert found.detail == "4 GiB, of which 2 GiB are available"
    assert found.data == {"total_bytes": 4 << 30, "available_bytes": 2 << 30}
    with pytest.raises(FileNotFoundError):
        limits.memory(tmp_path / "none")


@pytest.mark.parametrize(("mode", "state"), [("always", "yes"), ("madvise", "yes"), ("never", "no")])
def test_transparent_huge_pages(tmp_path: Path, mode: str, state: str) -> None:
    directory = tmp_path / "transparent_hugepage"
    assert limits.transparent_huge_pages(tmp_path).state == "no"
    directory.mkdir()
    every = "always madvise never"
    (directory / "enabled").write_text(every.replace(mode, f"[{mode}]"))
    (directory / "shmem_enabled").write_text("always within_size [advise] never deny force")
    found = limits.transparent_huge_pages(tmp_path)
    assert (found.state, found.data) == (state, {"private": mode, "shared": "advise"})
    assert (found.cure is None) == (state == "yes")


def pool(huge: Path, size_kib: int, total: int, free: int) -> None:
    directory = huge / "hugepages" / f"hugepages-{size_kib}kB"
    directory.mkdir(parents=True)
    (directory / "nr_hugepages").write_text(f"{total}\n")
    (directory / "free_hugepages").write_text(f"{free}\n")


def test_pools_of_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = limits.hugetlb(tmp_path)
    assert none.state == "no" and none.cure and "CONFIG_HUGETLBFS" in none.cure
    pool(tmp_path, 1048576, 0, 0)
    empty = limits.hugetlb(tmp_path)
    assert empty.state == "no" and empty.cure and "vm.nr_hugepages" in empty.cure
    pool(tmp_path, 2048, 8, 5)
    real = mmap.mmap
    monkeypatch.setattr("mmap.mmap", lambda fd, size, flags: real(fd, size, flags=flags & ~0x40000))
    found = limits.hugetlb(tmp_path)
    assert (found.state, found.detail) == ("yes", "0 of 0 free of 1 GiB, 5 of 8 free of 2 MiB")

    def exhausted(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", exhausted)
    assert limits.hugetlb(tmp_path).state == "no"


def test_memory_beyond_the_limit_cannot_be_locked_by_a_user(as_nobody: Any) -> None:
    def limited(size_bytes: int) -> Finding:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
        return limits.locked_memory(size_bytes)

    found = as_nobody(lambda: limited(1 << 20))
    assert (found.state, found.data) == ("no", {"limit_bytes": 64 << 10})
    assert "LimitMEMLOCK" in found.cure
    assert as_nobody(lambda: limited(16 << 10)).state == "yes"


def test_dev_shm_may_be_missing_or_small(tmp_path: Path) -> None:
    missing = limits.dev_shm(tmp_path / "none")
    assert missing.state == "no" and missing.cure and "mount -t tmpfs" in missing.cure
    small = limits.dev_shm(tmp_path, 1 << 62)
    assert small.state == "no" and small.cure and "remount,size=" in small.cure
    assert os.listdir(tmp_path) == []


def test_dev_shm_may_be_forbidden(tmp_path: Path, as_nobody: Any) -> None:
    shm = tmp_path / "shm"
    shm.mkdir(0o000)
    if os.getuid() != 0:
        pytest.skip("one's own directory's mode is no obstacle that stands for another user's")
    assert as_nobody(lambda: limits.dev_shm(shm)).state == "no"


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.EPERM, "CAP_SYS_ADMIN"), (errno.EINVAL, "CONFIG_NET_NS"), (errno.ENOSPC, "user.max_net_namespaces")],
)
def test_a_network_namespace_that_is_refused(number: int, cure: str) -> None:
    found = limits.network_namespace(refuses(number))
    assert found.state == "no" and found.cure and cure in found.cure


def test_a_network_namespace_that_fails_otherwise() -> None:
    with pytest.raises(OSError, match="Cannot allocate memory"):
        limits.network_namespace(refuses(errno.ENOMEM))


def test_tun_may_be_missing_forbidden_or_another(tmp_path: Path, as_nobody: Any) -> None:
    missing = limits.tun(tmp_path / "tun", refuses(errno.EPERM))
    assert missing.state == "no" and missing.cure and "modprobe tun" in missing.cure
    forbidden = tmp_path / "forbidden"
    forbidden.touch(0o000)
    found = as_nobody(lambda: limits.tun(forbidden))
    assert found.state == "no" and "CAP_NET_ADMIN" in found.cure
    assert limits.tun(Path(os.devnull), refuses(errno.EPERM)).state == "no"


def test_no_device_of_ours_is_seen() -> None:
    before = os.listdir("/sys/class/net")
    in_child(limits.tun)
    assert os.listdir("/sys/class/net") == before
