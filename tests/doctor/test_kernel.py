"""userfaultfd, PAGEMAP_SCAN and soft-dirty: as they are here, and refused in each way that has a cure."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ckptd.doctor import kernel, try_check
from ckptd.doctor.findings import Finding
from ckptd.doctor.system import SYS_PTRACE, has_capability, in_child

Check = Callable[..., Finding]


def refuses(number: int) -> Callable[[], NoReturn]:
    def opener() -> NoReturn:
        raise OSError(number, os.strerror(number))

    return opener


@pytest.mark.parametrize("check", kernel.CHECKS)
@pytest.mark.parametrize("ordinary", [False, True], ids=["as we are", "ordinary user"])
def test_each_check_answers_here_whatever_this_machine_is(check: Check, ordinary: bool, settled: Any) -> None:
    settled(check, ordinary)


@pytest.mark.parametrize("ordinary", [False, True], ids=["as we are", "ordinary user"])
def test_tracking_works_just_where_its_parts_do(ordinary: bool, as_nobody: Any) -> None:
    parts = (kernel.userfaultfd_wp_async, kernel.pagemap_scan, kernel.page_tracking)
    found = as_nobody(lambda: [part() for part in parts]) if ordinary else [in_child(part) for part in parts]
    wp_async, scan, tracking = (one.state for one in found)
    assert (tracking == "yes") == (wp_async == scan == "yes")


# userfaultfd.


def test_a_forbidden_userfaultfd_wants_the_sysctl_or_a_capability(as_nobody: Any) -> None:
    found = as_nobody(lambda: kernel.userfaultfd_syscall(refuses(errno.EPERM)))
    assert found.state == "no"
    assert "sysctl -w vm.unprivileged_userfaultfd=1" in found.cure and "CAP_SYS_PTRACE" in found.cure


@pytest.mark.skipif(not has_capability(SYS_PTRACE), reason="needs CAP_SYS_PTRACE")
def test_forbidden_in_spite_of_the_capability_it_is_a_sandbox() -> None:
    cure = kernel.userfaultfd_syscall(refuses(errno.EPERM)).cure
    assert cure is not None and "seccomp" in cure


@pytest.mark.parametrize("check", [kernel.userfaultfd_syscall, kernel.userfaultfd_user_mode])
def test_a_kernel_without_userfaultfd(check: Check) -> None:
    found = check(refuses(errno.ENOSYS))
    assert found.state == "no" and found.cure and "CONFIG_USERFAULTFD" in found.cure
    with pytest.raises(OSError, match="Too many open files"):
        check(refuses(errno.EMFILE))


def test_the_device_may_be_missing_forbidden_or_another(tmp_path: Path, as_nobody: Any) -> None:
    missing = kernel.userfaultfd_device(tmp_path / "userfaultfd")
    assert missing.state == "no" and missing.cure and "kernel" in missing.cure
    forbidden = tmp_path / "forbidden"
    forbidden.touch(0o000)
    found = as_nobody(lambda: kernel.userfaultfd_device(forbidden))
    assert (found.state, "group" in found.cure) == ("no", True)
    assert kernel.userfaultfd_device(Path(os.devnull)).state == "no"
    found = try_check(kernel.userfaultfd_device)
    assert found.name == "userfaultfd_device"
    with pytest.raises(IsADirectoryError):
        kernel.userfaultfd_device(tmp_path)


@pytest.mark.parametrize(("value", "state"), [("0", "no"), ("1", "yes")])
def test_the_sysctl_is_read(tmp_path: Path, value: str, state: str) -> None:
    sysctl = tmp_path / "sysctl"
    sysctl.write_text(value + "\n")
    found = kernel.userfaultfd_unprivileged(sysctl)
    assert (found.state, found.cure) == (state, None)  # user mode is enough: no reason to loosen anything


def test_a_sysctl_that_is_missing_or_cannot_be_read(tmp_path: Path, as_nobody: Any) -> None:
    assert kernel.userfaultfd_unprivileged(tmp_path / "none").state == "no"
    sysctl = tmp_path / "sysctl"
    sysctl.write_text("1")
    sysctl.chmod(0)

    def userfaultfd_unprivileged() -> Finding:
        return kernel.userfaultfd_unprivileged(sysctl)

    found = as_nobody(partial(try_check, userfaultfd_unprivileged))
    assert (found.name, found.state) == ("userfaultfd_unprivileged", "unknown")
    assert "Permission denied" in found.detail


def test_without_any_userfaultfd_nothing_is_tracked() -> None:
    none = [refuses(errno.EPERM), refuses(errno.ENOENT)]
    for check in (kernel.userfaultfd_wp_async, kernel.page_tracking):
        found = check(openers=none)
        assert (found.state, "see userfaultfd_syscall" in found.detail) == ("no", True)


def test_features_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_handshake", lambda fd, wanted: 1 | 1 << 12)
    found = kernel.userfaultfd_wp_async([lambda: os.open(os.devnull, os.O_RDWR)])
    assert found.detail == "userfaultfd lacks WP_UNPOPULATED, WP_ASYNC"
    assert found.cure and "6.7" in found.cure


# pagemap.


def test_a_pagemap_without_the_scan() -> None:
    found = kernel.pagemap_scan(Path(os.devnull))
    assert (found.state, found.detail) == ("no", "this kernel's pagemap has no PAGEMAP_SCAN")
    assert found.cure and "6.7" in found.cure


def test_a_pagemap_that_is_missing(tmp_path: Path) -> None:
    assert kernel.pagemap_scan(tmp_path / "none").state == "no"
    assert kernel.page_tracking(tmp_path / "none").state == "no"


def test_a_scan_that_reports_wrong_pages_is_no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_scan", lambda *_: [2])
    assert kernel.pagemap_scan().state == "no"


# soft-dirty.


def test_soft_dirty_is_what_the_kernel_reports_and_not_what_it_accepts(tmp_path: Path) -> None:
    """A kernel that takes the order and reports nothing: a file of zeros for its pagemap."""
    clear_refs, pagemap = tmp_path / "clear_refs", Path("/dev/zero")
    found = kernel.soft_dirty(pagemap, clear_refs)
    assert (found.state, found.detail) == ("no", "a page was written, and the kernel reported none")
    assert clear_refs.read_text() == "4"


def test_soft_dirty_that_is_not_there(tmp_path: Path) -> None:
    found = kernel.soft_dirty(clear_refs=tmp_path / "none" / "clear_refs")
    assert found.state == "no" and found.cure and "CONFIG_MEM_SOFT_DIRTY" in found.cure


@pytest.mark.parametrize(("dirty", "exact"), [({1}, True), ({0, 1, 2, 3}, False)])
def test_soft_dirty_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dirty: set[int], exact: bool) -> None:
    pagemap = tmp_path / "pagemap"
    pagemap.write_bytes(b"".join((1 << 55 if page in dirty else 0).to_bytes(8, "little") for page in range(4)))
    monkeypatch.setattr(kernel, "address_of", lambda _: 0)
    found = kernel.soft_dirty(pagemap, tmp_path / "clear_refs")
    assert (found.state, found.data) == ("yes", {"exact": exact})
