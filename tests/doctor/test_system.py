"""A check in a child of its own: what comes back, and that nothing stays."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ckptd.doctor import examine, try_check
from ckptd.doctor.findings import Finding, yes
from ckptd.doctor.system import error_of, has_capability, in_child, libc_call, pages_of, syscall


def test_the_answer_comes_back_from_another_process() -> None:
    assert in_child(lambda: (os.getpid(), {"a": [1]}))[1] == {"a": [1]}
    assert in_child(os.getpid) != os.getpid()


def test_an_error_comes_back_as_text() -> None:
    def fails() -> None:
        raise ValueError("so it is")

    with pytest.raises(ChildProcessError, match="ValueError: so it is"):
        in_child(fails)


def test_a_crash_is_told_by_its_signal_and_an_exit_by_its_code() -> None:
    with pytest.raises(ChildProcessError, match="died of SIGSEGV"):
        in_child(lambda: crash(signal.SIGSEGV))
    with pytest.raises(ChildProcessError, match="ended with 3"):
        in_child(lambda: os._exit(3))


def crash(number: signal.Signals) -> None:
    faulthandler.disable()  # pytest's own: it would print a traceback
    os.kill(os.getpid(), number)


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    noted = tmp_path / "pid"

    def hangs() -> None:
        sleeping = subprocess.Popen(["/bin/sh", "-c", "sleep 1000"])
        noted.write_text(str(sleeping.pid))
        sleeping.wait()

    with pytest.raises(ChildProcessError, match=r"no answer in 0\.5 s"):
        in_child(hangs, 0.5)
    until = time.monotonic() + 10
    while running(int(noted.read_text())) and time.monotonic() < until:
        time.sleep(0.01)
    assert not running(int(noted.read_text()))


def running(pid: int) -> bool:
    """Not even as a zombie that only waits for init."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_in_a_child_ends_with_it(tmp_path: Path) -> None:
    noted = tmp_path / "pid"

    def inner() -> None:
        noted.write_text(str(os.getpid()))
        time.sleep(1000)

    with pytest.raises(ChildProcessError, match="no answer"):
        in_child(lambda: in_child(inner), 0.5)
    until = time.monotonic() + 10
    while running(int(noted.read_text())) and time.monotonic() < until:
        time.sleep(0.01)
    assert not running(int(noted.read_text()))


def test_a_child_prints_nothing_and_leaves_no_descriptor_and_no_zombie(capfd: pytest.CaptureFixture[str]) -> None:
    def descriptors() -> list[str]:
        return os.listdir("/proc/self/fd")

    def loud() -> int:
        os.write(1, b"out")
        return os.write(2, b"err")

    before = descriptors()
    assert in_child(loud) == 3
    assert len(descriptors()) == len(before)
    assert capfd.readouterr() == ("", "")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if not running(int(pid))]


def test_no_check_can_raise() -> None:
    def surprise() -> Finding:
        raise OSError(5, "Input/output error")

    def broken() -> Finding:
        crash(signal.SIGBUS)
        return yes("broken", "survived")

    first, second = examine([surprise, broken])
    assert (first.name, first.state) == ("surprise", "unknown")
    assert "Input/output error" in first.detail
    assert (second.state, second.detail) == ("unknown", "the process that tried it died of SIGBUS")


def test_no_check_can_hang() -> None:
    def forever() -> Finding:
        time.sleep(1000)
        return yes("forever", "woke up")

    assert try_check(forever, 0.2) == Finding("forever", "unknown", "no answer in 0.2 s")


def test_calls_that_fail_have_an_errno() -> None:
    assert error_of(lambda: syscall(39)) == 0  # getpid
    assert error_of(lambda: syscall(3, 12345)) == 9  # close: EBADF
    with pytest.raises(OSError, match="Bad file descriptor"):
        libc_call("fsync", 12345)


def test_capabilities_are_read_as_a_set(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapPrm:\tffffffffffffffff\nCapEff:\t0000000000080000\n")
    assert has_capability(19, status) and not has_capability(21, status)


def test_pages_are_zero_and_private() -> None:
    memory = pages_of(2)
    in_child(lambda: memory.write(b"x"))
    assert memory[:] == bytes(2 * 4096)
