"""May we attach to another process, as it takes to track a QEMU that was not started for it?

The one that tries is a child, and the one that it attaches to its parent: Yama lets a process attach to its own
descendants always, but a QEMU is none.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

from ckptd.doctor.findings import Check, Finding, no, yes
from ckptd.doctor.system import SYS_PTRACE, error_of, has_capability, in_child, libc_call, syscall

__all__ = ["CHECKS", "cap_sys_ptrace", "pidfd_getfd", "process_vm_readv", "ptrace", "ptrace_scope"]

YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")

_SEIZE, _INTERRUPT, _DETACH, _WALL = 0x4206, 0x4207, 17, 0x40000000
_SYS_PROCESS_VM_READV, _SYS_PIDFD_GETFD = 310, 438
_SECONDS = 5
_MARK = ctypes.create_string_buffer(b"what process_vm_readv must find")

Attempt = Callable[[int], None]


def seize(pid: int) -> None:
    """Stop it as a debugger does, and let it go on."""
    libc_call("ptrace", _SEIZE, pid, 0, 0)
    libc_call("ptrace", _INTERRUPT, pid, 0, 0)
    os.waitpid(pid, _WALL)
    libc_call("ptrace", _DETACH, pid, 0, 0)


def take_fd(pid: int) -> None:
    """A duplicate of its standard input."""
    os.close(syscall(_SYS_PIDFD_GETFD, os.pidfd_open(pid), 0, 0))


def read_memory(pid: int) -> None:
    """A few bytes of its memory: where they are in ours too, as we are its copy."""
    into = ctypes.create_string_buffer(len(_MARK))
    # struct iovec: base | length
    local = ctypes.create_string_buffer(struct.pack("<2Q", ctypes.addressof(into), len(_MARK)))
    remote = ctypes.create_string_buffer(struct.pack("<2Q", ctypes.addressof(_MARK), len(_MARK)))
    syscall(_SYS_PROCESS_VM_READV, pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
    if into.raw != _MARK.raw:
        raise OSError(errno.EIO, "process_vm_readv(2) read something else")


def ptrace(attempt: Attempt = seize, yama: Path = YAMA) -> Finding:
    """PTRACE_SEIZE."""
    return _tried("ptrace", "ptrace(2)", attempt, yama)


def pidfd_getfd(attempt: Attempt = take_fd, yama: Path = YAMA) -> Finding:
    """Take a descriptor from another process."""
    return _tried("pidfd_getfd", "pidfd_getfd(2)", attempt, yama)


def process_vm_readv(attempt: Attempt = read_memory, yama: Path = YAMA) -> Finding:
    """Read another process's memory."""
    return _tried("process_vm_readv", "process_vm_readv(2)", attempt, yama)


def ptrace_scope(yama: Path = YAMA) -> Finding:
    """Yama: whom it lets attach."""
    name = "ptrace_scope"
    try:
        scope = yama.read_text().strip()
    except FileNotFoundError:
        return yes(name, "this kernel has no Yama: a user may attach to their own processes")
    if scope == "0":
        return yes(name, "kernel.yama.ptrace_scope is 0: a user may attach to their own processes", scope=scope)
    whom = {"1": "their descendants only", "2": "nothing, without CAP_SYS_PTRACE", "3": "nothing, not even as root"}
    return no(
        name, f"kernel.yama.ptrace_scope is {scope}: a user may attach to {whom.get(scope, 'what it says')}",
        _lift(scope), scope=scope,
    )  # fmt: skip


def cap_sys_ptrace(status: Path = Path("/proc/self/status")) -> Finding:
    """May we attach to processes of other users?"""
    name = "cap_sys_ptrace"
    if has_capability(SYS_PTRACE, status):
        return yes(name, "CAP_SYS_PTRACE is held: processes of other users too")
    return no(
        name, "CAP_SYS_PTRACE is not held: only processes of this user",
        "for a QEMU of another user, run as root or give CAP_SYS_PTRACE (AmbientCapabilities= in a unit)",
    )  # fmt: skip


CHECKS: tuple[Check, ...] = (ptrace, ptrace_scope, cap_sys_ptrace, pidfd_getfd, process_vm_readv)


def _tried(name: str, call: str, attempt: Attempt, yama: Path) -> Finding:
    target = os.getpid()
    failed = in_child(lambda: error_of(lambda: attempt(target)), _SECONDS)
    if failed == 0:
        return yes(name, f"{call} works on a process that is no descendant")
    if failed == errno.ENOSYS:
        return no(name, f"{call} is not there", "use kernel 5.6 or newer; in a container, let seccomp allow it")
    if failed not in (errno.EPERM, errno.EACCES):
        raise OSError(failed, os.strerror(failed))
    return no(name, f"{call} is not permitted on a process that is no descendant", _permit(call, yama))


def _permit(call: str, yama: Path) -> str:
    try:
        scope = yama.read_text().strip()
    except OSError:
        scope = "0"
    if scope == "3" or (scope != "0" and not has_capability(SYS_PTRACE)):
        return _lift(scope)
    return f"let the container's seccomp profile or the security module allow {call}"


def _lift(scope: str) -> str:
    if scope == "3":
        return "kernel.yama.ptrace_scope=3 stays until a reboot: take it out of /etc/sysctl.d"
    return "`sysctl -w kernel.yama.ptrace_scope=0`, or run as root or with CAP_SYS_PTRACE"
