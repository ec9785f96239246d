"""Attaching harms nobody: what the process was doing goes on, with the right result, and nothing stays behind."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.doctor.system import in_child
from ckptd.errors import TrackerUnavailable
from ckptd.trackers import injection, userfaultfd
from ckptd.trackers.injection import take_userfaultfd
from ckptd.trackers.ptrace import Tracee

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="attaches to a process that is no descendant: needs root")
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="the target is a C program: needs cc")
pytestmark = needs_root

NOBODY = 65534
HEAD = """
import ctypes, os, signal, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def result(value): print(value, ctypes.get_errno() if value < 0 else 0, flush=True)
def at_least(seconds, call):
    begin = time.monotonic()
    value = call()
    result(value if time.monotonic() - begin >= seconds else "too early")
print("ready", flush=True)
"""
# What it does, the number of the system call that it sits in, and what the call must return with errno.
BLOCKED = {
    "poll": ("at_least(0.5, lambda: libc.poll(0, 0, 500))", 7, "0 0"),
    "nanosleep": ("at_least(0.5, lambda: libc.syscall(35, struct.pack('<2q', 0, 500_000_000), 0))", 35, "0 0"),
    "futex": (
        "at_least(0.5, lambda: libc.syscall(202, struct.pack('<I', 5), 128, 5, struct.pack('<2q', 0, 500_000_000), 0))",
        202, "-1 110",
    ),
    "read": ("result(libc.read(0, ctypes.create_string_buffer(16), 16))", 0, "5 0"),
}  # fmt: skip


@contextmanager
def target(program: str | list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-I", "-S", "-c", HEAD + program] if isinstance(program, str) else program
    process = subprocess.Popen(command, stdin=-1, stdout=-1, bufsize=0, **options)  # type: ignore[call-overload]
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def until(holds: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if holds():
            return
        time.sleep(0.001)
    raise AssertionError("it never came to that")


def in_call(pid: int, number: int) -> bool:
    return Path(f"/proc/{pid}/syscall").read_text().startswith(f"{number} ")


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def descriptors(pid: int) -> list[str]:
    return sorted(os.listdir(f"/proc/{pid}/fd"))


def refusal(pid: int) -> str:
    with pytest.raises(TrackerUnavailable) as caught:
        os.close(take_userfaultfd(pid))
    return str(caught.value)


@pytest.mark.parametrize("call", BLOCKED)
def test_a_blocked_call_goes_on_and_returns_what_it_should(call: str) -> None:
    program, number, wanted = BLOCKED[call]
    with target(program) as process:
        until(lambda: in_call(process.pid, number))
        before = descriptors(process.pid)
        for _ in range(10):
            os.close(take_userfaultfd(process.pid))
        assert descriptors(process.pid) == before
        assert state(process.pid) not in "tT"
        if call == "read":
            process.stdin.write(b"hello")
        assert process.stdout.readline().decode() == wanted + "\n"


LOAD = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
static volatile sig_atomic_t signals, last, disorder, done;
static void got(int n, siginfo_t *info, void *c) {
    signals++;
    if (info->si_value.sival_int != last + 1) disorder++;
    last = info->si_value.sival_int;
}
static void end(int n) { done = 1; }
static uint64_t work(void) {
    uint64_t x = 1; double f = 1;
    for (int i = 0; i < 20000; i++) { x = x * 6364136223846793005ull + i; f = f * 1.0000001 + (double)(x >> 60); }
    uint64_t bits; memcpy(&bits, &f, 8); return x ^ bits;
}
static void *sleeper(void *p) { while (!done) { struct timespec t = {0, 300000}; nanosleep(&t, 0); } return 0; }
int main(void) {
    struct sigaction a = {.sa_sigaction = got, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN, &a, 0); signal(SIGTERM, end);
    pthread_t t; pthread_create(&t, 0, sleeper, 0);
    uint64_t wanted = work(); long wrong = 0, turns = 0;
    puts("ready"); fflush(stdout);
    while (!done) { if (work() != wanted) wrong++; turns++; }
    printf("%d %d %ld %d\n", (int)signals, (int)disorder, wrong, turns > 1);
    return 0;
}
"""


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("load")
    (folder / "load.c").write_text(LOAD)
    subprocess.run(["cc", "-O1", "-pthread", "-o", folder / "load", folder / "load.c"], check=True, stderr=-3)
    return str(folder / "load")


@needs_cc
def test_200_times_under_load_with_signals_arriving(load: str) -> None:
    """Computing in registers, with queued signals: none is lost, doubled or out of order, and each keeps its value."""
    libc = ctypes.CDLL(None)
    with target([load]) as process:
        before, ours = descriptors(process.pid), descriptors(os.getpid())
        for turn in range(200):
            assert libc.sigqueue(process.pid, signal.SIGRTMIN, ctypes.c_void_p(turn + 1)) == 0
            os.close(take_userfaultfd(process.pid))
        assert descriptors(process.pid) == before
        assert descriptors(os.getpid()) == ours
        process.terminate()
        assert process.stdout.readline() == b"200 0 0 1\n"
        assert process.wait() == 0


def test_a_signal_that_arrives_while_it_is_held_is_delivered_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
signal.signal(signal.SIGUSR1, lambda *_: None)
mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
value = libc.poll(0, 0, 20_000)
result(value)
print(signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask, flush=True)
"""
    with target(program) as process:
        until(lambda: in_call(process.pid, 7))
        call = Tracee.call

        def with_signal(self: Tracee, site: int, number: int, *arguments: int) -> int:
            os.kill(process.pid, signal.SIGUSR1)
            return call(self, site, number, *arguments)

        monkeypatch.setattr(Tracee, "call", with_signal)
        os.close(take_userfaultfd(process.pid))
        assert process.stdout.readline() == b"-1 4\n"  # EINTR, as without us
        assert process.stdout.readline() == b"True\n"


def test_a_temporary_signal_mask_is_the_same_again() -> None:
    program = """
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
value = libc.sigsuspend(ctypes.create_string_buffer(128))
result(value)
print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])) == [signal.SIGUSR1, signal.SIGUSR2], flush=True)
"""
    with target(program) as process:
        until(lambda: in_call(process.pid, 130))
        os.close(take_userfaultfd(process.pid))
        until(lambda: in_call(process.pid, 130))
        os.kill(process.pid, signal.SIGUSR1)
        assert process.stdout.readline() == b"-1 4\n"
        assert process.stdout.readline() == b"True\n"


def test_a_stopped_process_stays_stopped() -> None:
    program, number, wanted = BLOCKED["read"]
    with target(program) as process:
        until(lambda: in_call(process.pid, number))
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: state(process.pid) == "T")
        for _ in range(5):
            os.close(take_userfaultfd(process.pid))
            until(lambda: state(process.pid) == "T")
        process.stdin.write(b"hello")
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.readline().decode() == wanted + "\n"


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_that_arrives_meanwhile_holds(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    program, number, wanted = BLOCKED["read"]
    with target(program) as process:
        until(lambda: in_call(process.pid, number))
        call = Tracee.call

        def with_stop(self: Tracee, site: int, number: int, *arguments: int) -> int:
            if not late:
                os.kill(process.pid, signal.SIGSTOP)
            value = call(self, site, number, *arguments)
            if late:
                os.kill(process.pid, signal.SIGSTOP)
            return value

        monkeypatch.setattr(Tracee, "call", with_stop)
        os.close(take_userfaultfd(process.pid))
        until(lambda: state(process.pid) == "T")
        process.stdin.write(b"hello")
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.readline().decode() == wanted + "\n"


# What fails leaves it as it was.


@contextmanager
def unharmed() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits in read(2); afterwards it still does, and has no other descriptors."""
    program, number, wanted = BLOCKED["read"]
    with target(program) as process:
        until(lambda: in_call(process.pid, number))
        before, ours = descriptors(process.pid), descriptors(os.getpid())
        yield process
        until(lambda: state(process.pid) == "S")
        assert (descriptors(process.pid), descriptors(os.getpid())) == (before, ours)
        process.stdin.write(b"hello")
        assert process.stdout.readline().decode() == wanted + "\n"


def fails(number: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_descriptor_that_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with unharmed() as process:
        monkeypatch.setattr(injection, "_duplicate", fails(1))
        assert "let the security module" in refusal(process.pid)


@pytest.mark.parametrize("number", [38, 1, 24, 12])
def test_a_call_that_the_kernel_refuses(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hints = {38: "CONFIG_USERFAULTFD", 1: "even with UFFD_USER_MODE_ONLY", 24: "LimitNOFILE", 12: "allocate memory"}
    with unharmed() as process:
        call = Tracee.call

        def refused(self: Tracee, site: int, what: int, *arguments: int) -> int:
            value = call(self, site, what, *arguments)
            if what != 323:
                return value
            call(self, site, 3, value)
            return -number

        monkeypatch.setattr(Tracee, "call", refused)
        assert hints[number] in refusal(process.pid)


def test_a_process_without_a_descriptor_left() -> None:
    with unharmed() as process:
        limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        assert "Too many open files; raise the limit" in refusal(process.pid)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    ("failing", "turn"),
    [*(("_to_syscall_stop", turn) for turn in (1, 2, 3, 4)), *(("_set_registers", turn) for turn in (1, 2)),
     ("_set_mask", 1)],
)  # fmt: skip
def test_whatever_step_fails(failing: str, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that the step is taken, but for the last, which undoes."""
    with target(BLOCKED["read"][0]) as process:
        until(lambda: in_call(process.pid, 0))
        step, count = getattr(Tracee, failing), 0

        def once(self: Tracee, *arguments: object) -> object:
            nonlocal count
            count += 1
            if count == turn:
                raise OSError(5, "Input/output error")
            return step(self, *arguments)

        monkeypatch.setattr(Tracee, failing, once)
        assert "Input/output error" in refusal(process.pid)
        until(lambda: state(process.pid) == "S")
        process.stdin.write(b"hello")
        assert process.stdout.readline() == b"5 0\n"


def test_registers_that_are_not_as_they_were_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with unharmed() as process:
        registers = Tracee._registers

        def different(self: Tracee) -> list[int]:
            found = registers(self)
            return [found[0] ^ (self._trapped and self._saved is not None), *found[1:]]

        monkeypatch.setattr(Tracee, "_registers", different)
        assert "not restored" in refusal(process.pid)


def test_bytes_that_are_no_call_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with unharmed() as process:
        site = injection._syscall_site(process.pid)
        monkeypatch.setattr(injection, "_syscall_site", lambda pid: site + 1)
        assert "no syscall instruction" in refusal(process.pid)


def test_a_thread_that_cannot_be_stopped_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with unharmed() as process:
        # A wait that sees nothing, as of a thread that sleeps in a device. It is let go with the thread that seized it.
        monkeypatch.setattr("ckptd.trackers.ptrace._STOP_SECONDS", 0.01)
        monkeypatch.setattr("ckptd.trackers.ptrace.os.waitid", lambda *_: None)
        assert "state D" in refusal(process.pid)


def test_a_restartable_sequence_is_left_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with unharmed() as process:
        answers = iter([True, True, False])
        monkeypatch.setattr(Tracee, "_in_restartable_sequence", lambda self: next(answers))
        os.close(take_userfaultfd(process.pid))
        assert next(answers, None) is None


# Whom it must not be done to, and who must not do it.


@pytest.mark.parametrize("moment", ["stop", "call"])
@pytest.mark.parametrize("after", [False, True])
def test_a_process_that_dies_meanwhile(moment: str, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with target("time.sleep(60)") as process:
        step = getattr(Tracee, moment)

        def deadly(self: Tracee, *arguments: int) -> object:
            value = step(self, *arguments) if after else None
            process.kill()
            return value if after else step(self, *arguments)

        ours = descriptors(os.getpid())
        monkeypatch.setattr(Tracee, moment, deadly)
        assert f"process {process.pid} ended meanwhile" in refusal(process.pid)
        assert process.wait() == -signal.SIGKILL  # its end was left to its parent
        assert descriptors(os.getpid()) == ours


def test_a_process_that_is_gone() -> None:
    with target("pass") as process:
        process.wait()
    assert f"process {process.pid} is gone" in refusal(process.pid)
    with target("pass") as process:
        until(lambda: state(process.pid) == "Z")
        assert f"process {process.pid} " in (text := refusal(process.pid)) and "start the guest" in text


def test_a_process_that_is_traced() -> None:
    tracer = "libc.ptrace(0x4206, ctypes.c_long(int(sys.argv[1])), 0, 0); print('on', flush=True); time.sleep(60)"
    with unharmed() as process:
        with target([sys.executable, "-I", "-S", "-c", HEAD + tracer, str(process.pid)]) as other:
            assert other.stdout.readline() == b"on\n"
            text = refusal(process.pid)
            assert f"process {process.pid} is traced by process {other.pid} (" in text and "end " in text


def test_a_program_of_another_architecture(tmp_path: Path) -> None:
    """An ELF file of 32 bits: pause() again and again; where the kernel runs none, its head in a copy is looked at."""
    code = bytes.fromhex("b81d000000cd80ebf7")
    # ELF header, 52 bytes, and one program header, 32 bytes
    head = b"\x7fELF\x01\x01\x01" + bytes(9)
    head += struct.pack("<2H5I6H", 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    head += struct.pack("<8I", 1, 0, 0x8048000, 0x8048000, 84 + len(code), 84 + len(code), 5, 4096)
    path = tmp_path / "small"
    path.write_bytes(head + code)
    path.chmod(0o755)
    try:
        process = subprocess.Popen([str(path)])
    except OSError:
        pytest.skip("this kernel runs no programs of 32 bits")
    try:
        until(lambda: state(process.pid) == "S")
        assert "another architecture (ELF machine 3, 32 bits)" in refusal(process.pid)
        # And if the file deceives, the thread's code segment does not.
        with pytest.raises(OSError, match=r"64-bit code \(cs 0x23\)"), Tracee(process.pid) as tracee:
            tracee.stop()
        until(lambda: state(process.pid) == "S")
    finally:
        process.kill()
        process.wait()


def as_nobody(work: Callable[[], str]) -> str:
    def drop() -> str:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return work()

    return in_child(drop)


def try_it(pid: int) -> str:
    try:
        os.close(take_userfaultfd(pid))
    except TrackerUnavailable as error:
        return str(error)
    return "taken"


def test_without_permission() -> None:
    with unharmed() as process:
        text = as_nobody(lambda: try_it(process.pid))
        assert f"attaching to process {process.pid} is not permitted" in text
        assert "CAP_SYS_PTRACE" in text and "as the user of process" in text


@pytest.mark.parametrize(("scope", "hint"), [("1", "`sysctl -w kernel.yama.ptrace_scope=0`"), ("3", "until a reboot")])
def test_yama_is_named(scope: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Yama:
        def read_text(self) -> str:
            return scope + "\n"

    monkeypatch.setattr(injection, "YAMA", Yama())
    with unharmed() as process:
        assert hint in as_nobody(lambda: try_it(process.pid))


def own_child(*, filtered: bool = False) -> int:
    """A child of the same user, that may be attached to and waits."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        libc = ctypes.CDLL(None)
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: setuid has cleared it
        if filtered:
            forbid_userfaultfd()
        os.write(writing, b".")
        signal.pause()
    os.read(reading, 1)
    return pid


def test_a_user_may_attach_to_an_own_process_without_any_permission() -> None:
    """vm.unprivileged_userfaultfd is 0 by default: UFFD_USER_MODE_ONLY is enough."""

    def attach() -> str:
        uffd = take_userfaultfd(own_child())
        userfaultfd.set_up(uffd)
        return "set up"

    assert as_nobody(attach) == "set up"


def forbid_userfaultfd() -> None:
    """Be killed for it."""
    # struct sock_filter: u16 code | u8 jt | u8 jf | u32 k. Load the number; equal to 323? kill the process : allow.
    lines = ((0x20, 0, 0, 0), (0x15, 0, 1, 323), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
    # struct sock_fprog: u16 length | pointer
    fprog = ctypes.create_string_buffer(struct.pack("<H6xQ", 4, ctypes.addressof(filters)))
    libc = ctypes.CDLL(None)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, fprog) == 0


def test_a_seccomp_filter_that_would_kill_it_sleeps_meanwhile() -> None:
    def attach() -> str:
        pid = own_child(filtered=True)
        answer = try_it(pid)
        still = state(pid)
        return f"{answer}, {still}"

    assert in_child(attach) == "taken, S"


def test_a_seccomp_filter_that_cannot_be_suspended_is_not_risked() -> None:
    def attach() -> str:
        pid = own_child(filtered=True)
        return f"{try_it(pid)} | {state(pid)}"

    text = as_nobody(attach)
    assert "has a seccomp filter, which could kill it" in text
    assert "give ckptd CAP_SYS_ADMIN" in text and "-sandbox off" in text
    assert text.endswith("| S")


def test_strict_seccomp_is_not_risked() -> None:
    program = "read, buffer = libc.read, ctypes.create_string_buffer(1); libc.prctl(22, 1, 0, 0, 0); read(0, buffer, 1)"
    with target(program) as process:
        until(lambda: injection._status(process.pid).seccomp == 1)
        assert "strict mode" in refusal(process.pid)
        assert state(process.pid) == "S"
