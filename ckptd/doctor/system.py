"""What the checks share: a process of their own, system calls by number, capabilities and memory with an address.

The numbers are those of x86-64.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn, TypeVar

__all__ = [
    "PAGE", "SYS_PTRACE", "address_of", "closing_fd", "error_of", "has_capability", "in_child", "libc_call", "pages_of",
    "syscall",
]  # fmt: skip

T = TypeVar("T")

PAGE = mmap.PAGESIZE
SYS_PTRACE = 19  # CAP_SYS_PTRACE, include/uapi/linux/capability.h
_SET_PDEATHSIG = 1  # PR_SET_PDEATHSIG

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.ptrace.restype = ctypes.c_long


def in_child(work: Callable[[], T], seconds: float = 20) -> T:
    """What `work` returns in a process of its own, which is gone afterwards with all that it started.

    So a check may attach, unshare, hang or crash. Raises ChildProcessError, with the error's text, when there is no
    answer in time or `work` raised.
    """
    ours, theirs = Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        _child(work, theirs)
    theirs.close()
    try:
        _own_group(pid)
        if not ours.poll(seconds):
            raise ChildProcessError(f"no answer in {seconds:g} s")
        good, answer = ours.recv()
    except EOFError:
        good, answer = False, None
    finally:
        ours.close()
        # The group, not just the process: a program that it runs must not outlive it. It is not reaped yet, so the
        # number is still its own.
        _kill(pid)
        _, status = os.waitpid(pid, 0)
    if good:
        found: T = answer
        return found
    code = os.waitstatus_to_exitcode(status)
    died = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    raise ChildProcessError(answer or f"the process that tried it {died}")


def syscall(number: int, *arguments: int) -> int:
    """A system call that libc or Python has no name for. Raises OSError."""
    return libc_call("syscall", number, *arguments)


def libc_call(name: str, *arguments: int) -> int:
    """A function of libc that returns -1 and sets errno. Raises OSError."""
    result: int = getattr(_libc, name)(*(ctypes.c_long(one) for one in arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def error_of(work: Callable[[], object]) -> int:
    """The errno that it fails with, 0 for none: what a child can tell its parent."""
    try:
        work()
    except OSError as error:
        return error.errno or -1
    return 0


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Close it in the end."""
    try:
        yield fd
    finally:
        os.close(fd)


def has_capability(number: int, status: Path = Path("/proc/self/status")) -> bool:
    """Whether this process has CAP_`number` in its effective set."""
    line = next(line for line in status.read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> number & 1)


def pages_of(count: int) -> mmap.mmap:
    """Fresh private memory, in small pages."""
    memory = mmap.mmap(-1, count * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # the kernel has no huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would be dirty as a whole
    return memory


def address_of(memory: mmap.mmap) -> int:
    """Where it is mapped."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _child(work: Callable[[], object], answer: Connection) -> NoReturn:
    """Never returns into the caller's code: no `finally` of it may run twice, nothing that it buffered is written."""
    code = 1
    try:
        _own_group(0)
        _libc.prctl(_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        try:
            answer.send((True, work()))
        except Exception as error:
            answer.send((False, f"{type(error).__name__}: {error}"))
        code = 0
    finally:
        os._exit(code)


def _own_group(pid: int) -> None:
    """By both, as nobody knows who comes first."""
    with suppress(OSError):  # done, or gone
        os.setpgid(pid, pid)


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
