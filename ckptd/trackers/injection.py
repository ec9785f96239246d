"""A userfaultfd of another process's memory, made inside it by ptrace and taken out.

A userfaultfd belongs to the address space that called userfaultfd(2), so that one call must be made there. One thread
is stopped for some 0.2 ms (trackers/ptrace.py says how it stays unharmed): it makes the descriptor, we take a duplicate
by pidfd_getfd(2), and it closes its own again before it goes on. Nothing is left in the process.

If this process is killed within those 0.2 ms, the kernel lets the thread go with the registers of the call: that cannot
be helped from outside, so do not kill ckptd while it attaches.

UFFD_USER_MODE_ONLY is no restriction for us: it forbids faults of the kernel to wait for a handler, and asynchronous
write protection has none. So no sysctl, capability or device node is needed in the process itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ckptd.errors import TrackerUnavailable
from ckptd.trackers.ptrace import SUSPEND_SECCOMP, Gone, NotStopped, Tracee

__all__ = ["take_userfaultfd"]

YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")

_SYS_CLOSE, _SYS_USERFAULTFD, _SYS_PIDFD_GETFD = 3, 323, 438
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_USER_MODE_ONLY = 1
_SYSCALL_BYTES = b"\x0f\x05"
_ELF_64, _ELF_LITTLE, _EM_X86_64 = 2, 1, 62
_SYS_PTRACE, _SYS_ADMIN = 19, 21  # CAP_, include/uapi/linux/capability.h
_SEARCH_BYTES = 64 << 20  # of one executable mapping

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def take_userfaultfd(pid: int) -> int:
    """A new userfaultfd of the memory of this process, close-on-exec and non-blocking; the caller closes it.

    Raises TrackerUnavailable, which names what is missing. Whatever happens, the process runs on as it was.
    """
    # In a thread of its own, which no KeyboardInterrupt reaches, and with whose end the kernel lets go in any case.
    with ThreadPoolExecutor(1, thread_name_prefix="ptrace") as thread:
        return thread.submit(_take, pid).result()


class _Status(NamedTuple):
    """Of /proc/PID/status."""

    state: str
    tracer: int
    seccomp: int


def _take(pid: int) -> int:
    if platform.machine() != "x86_64":
        raise TrackerUnavailable(
            f"attaching to a process is made for x86-64, not {platform.machine()}", hint="use another tracker"
        )
    try:
        status = _status(pid)
        _check_status(pid, status)
        _check_program(pid)
        site = _syscall_site(pid)
        tid = _thread_of(pid)
        with ExitStack() as on_failure:
            with Tracee(tid, SUSPEND_SECCOMP if status.seccomp else 0) as tracee:
                tracee.stop()
                uffd = _make_and_take(tracee, pid, site)
                on_failure.callback(os.close, uffd)
            _check_it_runs(pid, tid)
            on_failure.pop_all()
            return uffd
    except OSError as error:
        raise _explained(pid, error) from error


def _make_and_take(tracee: Tracee, pid: int, site: int) -> int:
    with ExitStack() as on_failure, _pidfd(pid) as pidfd:
        theirs = tracee.call(site, _SYS_USERFAULTFD, _FLAGS)
        if theirs == -errno.EPERM:
            theirs = tracee.call(site, _SYS_USERFAULTFD, _FLAGS | _USER_MODE_ONLY)
        if theirs < 0:
            raise _call_failed(pid, -theirs)
        try:
            uffd = _duplicate(pidfd, theirs)
            on_failure.callback(os.close, uffd)
        finally:
            closed = tracee.call(site, _SYS_CLOSE, theirs)
        if closed < 0:
            raise OSError(-closed, f"close({theirs}) in process {pid}: {os.strerror(-closed)}")
        on_failure.pop_all()
        return uffd


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _duplicate(pidfd: int, theirs: int) -> int:
    uffd: int = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, theirs, 0)
    if uffd < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_getfd(2): {os.strerror(number)}")
    return uffd


def _check_status(pid: int, status: _Status) -> None:
    if status.state in "ZX":
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    if status.seccomp == 1:
        raise TrackerUnavailable(
            f"process {pid} is in seccomp's strict mode: the kernel would kill it for the call that tracking needs",
            hint="a guest in strict mode cannot be attached to",
        )


def _check_program(pid: int) -> None:
    """The head of an ELF file: "\\x7fELF" | u8 class | u8 byte order | 10 other bytes | u16 type | u16 machine."""
    with open(f"/proc/{pid}/exe", "rb", buffering=0) as program:
        head = program.read(20)
    machine = struct.unpack_from("<H", head, 18)[0] if len(head) == 20 and head[:4] == b"\x7fELF" else None
    if machine != _EM_X86_64 or head[4:6] != bytes((_ELF_64, _ELF_LITTLE)):
        what = "no ELF program" if machine is None else f"ELF machine {machine}, {32 * head[4]} bits"
        raise TrackerUnavailable(
            f"process {pid} runs a program of another architecture ({what}): only x86-64 can be attached to",
            hint="use a guest process built for x86-64",
        )


def _syscall_site(pid: int) -> int:
    """The address of a `syscall` instruction. First the vdso, which every process has and nothing ever patches."""
    found: list[tuple[bool, bool, int, int]] = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, permissions, _, _, _, *name = line.split(None, 5)
        start, end = (int(one, 16) for one in addresses.split("-"))
        if "x" in permissions and "r" in permissions and end < 1 << 47:  # not vsyscall
            path = name[0] if name else ""
            found.append((path != "[vdso]", "/libc" not in path, start, end))
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for _, _, start, end in sorted(found):
            with suppress(OSError):  # of a device, or unmapped meanwhile
                at = os.pread(memory.fileno(), min(end - start, _SEARCH_BYTES), start).find(_SYSCALL_BYTES)
                if at >= 0:
                    return start + at
    raise TrackerUnavailable(
        f"process {pid} has no syscall instruction in its executable mappings", hint="use another tracker"
    )


def _thread_of(pid: int) -> int:
    """The main thread, unless it has ended or sleeps where it cannot be stopped."""
    threads = sorted((int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()), key=lambda tid: tid != pid)
    for tid in threads:
        with suppress(FileNotFoundError, ProcessLookupError):
            if _status(tid).state in "RSTI":
                return tid
    return pid


def _check_it_runs(pid: int, tid: int) -> None:
    """T, stopped by a signal, is somebody's wish, from before or from meanwhile; t is being traced."""
    with suppress(FileNotFoundError, ProcessLookupError):
        if _status(tid).state == "t" and not _status(tid).tracer:
            # It is on its way; the kernel wakes it when it lets go. Only a look that comes at once sees this.
            os.sched_yield()
            if _status(tid).state == "t" and not _status(tid).tracer:
                raise OSError(errno.EBUSY, f"thread {tid} of process {pid} was let go but has not run on")


def _status(pid: int) -> _Status:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return _Status(fields["State"].strip()[0], int(fields["TracerPid"]), int(fields.get("Seccomp", "0")))


def _traced(pid: int, tracer: int) -> TrackerUnavailable:
    with suppress(OSError):
        name = Path(f"/proc/{tracer}/comm").read_text().strip()
        return TrackerUnavailable(
            f"process {pid} is traced by process {tracer} ({name}): there can be one tracer only",
            hint=f"end {name} (process {tracer}), or detach it",
        )
    return TrackerUnavailable(
        f"process {pid} is traced by process {tracer}: there can be one tracer only", hint="end or detach the tracer"
    )


def _call_failed(pid: int, number: int) -> TrackerUnavailable:
    """userfaultfd(2) inside the process said no."""
    why = f"userfaultfd(2) inside process {pid}: {os.strerror(number)}"
    if number == errno.ENOSYS:
        return TrackerUnavailable(
            why, hint="use a kernel with CONFIG_USERFAULTFD (6.7 or newer); in a container, let seccomp allow it"
        )
    if number == errno.EPERM:
        return TrackerUnavailable(
            f"{why}, even with UFFD_USER_MODE_ONLY, which needs no permission",
            hint="let the security module (SELinux, AppArmor) or the seccomp filter of that process allow userfaultfd",
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return TrackerUnavailable(why, hint="raise the limit of open files of that process (LimitNOFILE=)")
    return TrackerUnavailable(why)


def _explained(pid: int, error: OSError) -> TrackerUnavailable:
    """What stood in the way, and what to give."""
    try:
        status = _status(pid)
    except OSError:
        return TrackerUnavailable(f"process {pid} is gone", hint="start the guest first")
    gone = status.state in "ZX" or (error.errno == errno.ESRCH and not isinstance(error, Gone | NotStopped))
    if gone or isinstance(error, Gone):
        return TrackerUnavailable(f"process {pid} ended meanwhile: {error.strerror}", hint="start the guest first")
    if isinstance(error, NotStopped):
        return TrackerUnavailable(
            f"process {pid} could not be stopped: {error.strerror}",
            hint="it waits in the kernel, for a disk or a file server that does not answer (state D): try again",
        )
    cannot_suspend = error.errno == errno.EINVAL and status.seccomp  # a kernel without CONFIG_CHECKPOINT_RESTORE
    if error.errno not in (errno.EPERM, errno.EACCES) and not cannot_suspend:
        return TrackerUnavailable(f"cannot attach to process {pid}: {error.strerror or error}")
    if status.tracer:
        return _traced(pid, status.tracer)
    return TrackerUnavailable(f"attaching to process {pid} is not permitted", hint=_permission(pid, status))


def _permission(pid: int, status: _Status) -> str:
    privileged = _has_capability(_SYS_PTRACE)
    with suppress(OSError):
        scope = YAMA.read_text().strip()
        if scope == "3":
            return "kernel.yama.ptrace_scope=3 forbids it until a reboot: take it out of /etc/sysctl.d"
        if scope != "0" and not privileged:
            return "`sysctl -w kernel.yama.ptrace_scope=0`, or run as root or with CAP_SYS_PTRACE"
    if not privileged and os.stat(f"/proc/{pid}").st_uid != os.geteuid():
        return f"run as root, with CAP_SYS_PTRACE, or as the user of process {pid}"
    if not status.seccomp:
        return "let the security module (SELinux, AppArmor) or the container's seccomp allow ptrace and pidfd_getfd"
    if _status(os.getpid()).seccomp:
        suspend = "run ckptd itself without a seccomp filter: only so may it suspend another's"
    elif _has_capability(_SYS_ADMIN):
        suspend = "use a kernel with CONFIG_CHECKPOINT_RESTORE, which can suspend the filter"
    else:
        suspend = "give ckptd CAP_SYS_ADMIN, which can suspend the filter"
    return (
        f"process {pid} has a seccomp filter, which could kill it for a call that the filter does not know;"
        f" {suspend}, or start the guest without one (QEMU: -sandbox off)"
    )


def _has_capability(number: int) -> bool:
    """In our effective set."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(fields["CapEff"], 16) >> number & 1)
