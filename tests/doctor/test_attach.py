"""ptrace and its relatives: as they are here, and refused by each that can refuse."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ckptd.doctor import attach
from ckptd.doctor.findings import Finding
from ckptd.doctor.system import SYS_PTRACE, has_capability, in_child

Check = Callable[..., Finding]
TRIED = (attach.ptrace, attach.pidfd_getfd, attach.process_vm_readv)


def refuses(number: int) -> Callable[[int], None]:
    def attempt(_: int) -> None:
        raise OSError(number, os.strerror(number))

    return attempt


@pytest.fixture
def yama(open_dir: Path) -> Callable[[str], Path]:
    def scope(value: str) -> Path:
        file = open_dir / "ptrace_scope"
        file.write_text(value + "\n")
        return file

    return scope


@pytest.mark.parametrize("check", attach.CHECKS)
@pytest.mark.parametrize("ordinary", [False, True], ids=["as we are", "ordinary user"])
def test_each_check_answers_here_whatever_this_machine_is(check: Check, ordinary: bool, settled: Any) -> None:
    settled(check, ordinary)


def test_the_one_that_is_attached_to_goes_on() -> None:
    def twice() -> list[str]:
        return [attach.ptrace().state for _ in range(2)]

    first, second = in_child(twice)
    assert first == second


@pytest.mark.parametrize("check", TRIED)
def test_refused_to_a_user_by_yama(check: Check, yama: Callable[[str], Path], as_nobody: Any) -> None:
    scope = yama("1")
    found = as_nobody(lambda: check(refuses(errno.EPERM), scope))
    assert found.state == "no"
    assert "kernel.yama.ptrace_scope=0" in found.cure and "CAP_SYS_PTRACE" in found.cure


@pytest.mark.parametrize("check", TRIED)
def test_refused_by_a_sandbox(check: Check, yama: Callable[[str], Path], as_nobody: Any) -> None:
    for scope in (yama("0"), Path("/nowhere/ptrace_scope")):
        found = as_nobody(partial(check, refuses(errno.EPERM), scope))
        assert found.state == "no" and "seccomp" in found.cure


def test_refused_for_good(yama: Callable[[str], Path]) -> None:
    found = in_child(lambda: attach.ptrace(refuses(errno.EPERM), yama("3")))
    assert found.cure and "reboot" in found.cure


@pytest.mark.parametrize("check", TRIED)
def test_an_old_kernel_and_what_nobody_foresaw(check: Check) -> None:
    found = in_child(lambda: check(refuses(errno.ENOSYS)))
    assert found.state == "no" and found.cure and "5.6" in found.cure
    with pytest.raises(ChildProcessError, match="Input/output error"):
        in_child(lambda: check(refuses(errno.EIO)))


@pytest.mark.parametrize(
    ("value", "state", "cure"),
    [("0", "yes", None), ("1", "no", "ptrace_scope=0"), ("2", "no", "ptrace_scope=0"), ("3", "no", "reboot")],
)
def test_each_scope_of_yama(yama: Callable[[str], Path], value: str, state: str, cure: str | None) -> None:
    found = attach.ptrace_scope(yama(value))
    assert (found.state, found.data) == (state, {"scope": value})
    assert found.cure is None if cure is None else cure in (found.cure or "")


def test_a_kernel_without_yama_and_one_that_hides_it(tmp_path: Path) -> None:
    assert attach.ptrace_scope(tmp_path / "none").state == "yes"
    with pytest.raises(IsADirectoryError):
        attach.ptrace_scope(tmp_path)


def test_the_capability(tmp_path: Path, as_nobody: Any) -> None:
    status = tmp_path / "status"
    status.write_text("CapEff:\t0000000000080000\n")
    assert attach.cap_sys_ptrace(status).state == "yes"
    assert (attach.cap_sys_ptrace().state == "yes") == has_capability(SYS_PTRACE)
    found = as_nobody(attach.cap_sys_ptrace)
    assert found.state == "no" and "AmbientCapabilities" in found.cure
