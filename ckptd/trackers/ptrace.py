"""One thread of another process, held by ptrace: stopped, made to run system calls, and let go as it was. x86-64.

    struct user_regs_struct, 27 u64
    r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs

How it stays unharmed:

- PTRACE_SEIZE sends no signal. A signal that arrives first is handed on; those that arrive while it is held wait, as
  PTRACE_SETSIGMASK blocks them.
- A call runs from a `syscall` instruction that the program has anyway, from one syscall stop to the next: no memory is
  written, no stack is used, no instruction of the program runs.
- It is let go from a PTRACE_EVENT_STOP, not from the syscall stop: only on that way does the kernel look at the
  restored registers and restart the system call (poll, nanosleep, futex) that the stop interrupted. What is never
  restarted (epoll_wait, signal(7) "Interruption of system calls by stop signals") returns EINTR, as after any stop.
- A thread inside a restartable sequence runs on first: its commit must not outlive our visit.

Every call must come from the thread that seized: the kernel lets go of what a thread held when that thread ends, which
is the last safety net. Sources: ptrace(2); Linux kernel/ptrace.c, arch/x86/kernel/signal.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import time
from types import TracebackType

__all__ = ["SUSPEND_SECCOMP", "Gone", "NotStopped", "Tracee"]

SUSPEND_SECCOMP = 1 << 21  # PTRACE_O_SUSPEND_SECCOMP: its filters sleep while it is traced; needs CAP_SYS_ADMIN

_CONT, _GETREGS, _SETREGS, _DETACH, _SYSCALL = 7, 12, 13, 17, 24
_SEIZE, _INTERRUPT, _GETSIGMASK, _SETSIGMASK, _GET_RSEQ = 0x4206, 0x4207, 0x420A, 0x420B, 0x420F
_TRACESYSGOOD = 1
_WALL = 0x40000000
_EVENT_STOP = 128
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_EVERY_SIGNAL = (1 << 64) - 1
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS}
_STOP_SECONDS = 5.0  # a thread that sleeps in a device cannot be stopped before it wakes
_RSEQ_TRIES = 100

_RAX, _ORIG_RAX, _RIP, _CS = 10, 15, 16, 17
_ARGUMENTS = (14, 13, 12, 7, 9, 8)  # rdi, rsi, rdx, r10, r8, r9
_USER_CS = 0x33  # __USER_CS: 64-bit code; 0x23 would be 32-bit
_NO_CALL = (1 << 64) - 1
_SYSCALL_BYTES = b"\x0f\x05"

Registers = list[int]

# PyDLL keeps the GIL: these calls take a microsecond, and while another thread had it the process would stand still.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Gone(OSError):
    """The thread ended, or was killed, while it was held."""


class NotStopped(OSError):
    """The thread could not be stopped in time, and runs on."""


class Tracee:
    """A seized thread. As a context: let go in the end, its registers and signal mask as they were."""

    def __init__(self, tid: int, options: int = 0) -> None:
        """Raises OSError (EPERM, ESRCH) as ptrace(2) does."""
        self.tid = tid
        self._mem = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._saved: Registers | None = None
        self._mask = 0
        self._trapped = False
        try:
            self._ptrace(_SEIZE, 0, _TRACESYSGOOD | options)
        except BaseException:
            os.close(self._mem)
            raise

    def __enter__(self) -> Tracee:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if not isinstance(error, Gone | NotStopped):
                self._let_go()
        finally:
            os.close(self._mem)

    def stop(self) -> None:
        """Stop it where its registers may be changed. Raises NotStopped, Gone."""
        for _ in range(_RSEQ_TRIES):
            self._trap(_STOP_SECONDS)
            if not self._in_restartable_sequence():
                break
            self._resume(_CONT)
            time.sleep(0)
        else:
            raise OSError(errno.EBUSY, f"thread {self.tid} does not leave a restartable sequence")
        saved = self._registers()
        if saved[_CS] != _USER_CS:
            raise OSError(errno.ENOEXEC, f"thread {self.tid} runs no 64-bit code (cs {saved[_CS]:#x})")
        mask = ctypes.c_uint64()
        self._ptrace(_GETSIGMASK, ctypes.sizeof(mask), ctypes.addressof(mask))
        self._saved, self._mask = saved, mask.value
        self._set_mask(_EVERY_SIGNAL)

    def call(self, site: int, number: int, *arguments: int) -> int:
        """Run one system call from the `syscall` instruction at `site`; what it returns, -errno included."""
        assert self._saved is not None, "stop() comes first"
        if (found := os.pread(self._mem, 2, site)) != _SYSCALL_BYTES:
            raise OSError(errno.ENOEXEC, f"there is no syscall instruction at {site:#x} any more, but {found.hex()}")
        registers = self._saved.copy()
        registers[_RIP], registers[_RAX], registers[_ORIG_RAX] = site, number, _NO_CALL
        for index, value in zip(_ARGUMENTS, arguments, strict=False):
            registers[index] = value
        self._set_registers(registers)
        self._to_syscall_stop()
        entered = self._registers()
        if (entered[_ORIG_RAX], entered[_RIP]) != (number, site + 2):
            raise OSError(errno.EPROTO, f"call {entered[_ORIG_RAX]} began at {entered[_RIP]:#x}, not {number}")
        self._to_syscall_stop()
        return _signed(self._registers()[_RAX])

    def _let_go(self) -> None:
        if self._saved is None:  # nothing was changed
            if not self._trapped:
                self._trap(_STOP_SECONDS)
        else:
            if not self._trapped:
                self._trap(None)
            self._set_registers(self._saved)
            found = self._registers()
            self._set_mask(self._mask)
            if found != self._saved:
                raise OSError(errno.EIO, f"the registers of thread {self.tid} were not restored: {found}")
        self._ptrace(_DETACH)

    def _trap(self, seconds: float | None) -> None:
        """To a PTRACE_EVENT_STOP, from wherever it is."""
        self._ptrace(_INTERRUPT)
        if self._at_syscall:
            self._resume(_CONT)
        while True:
            status = self._wait(seconds)
            if status >> 8 == _EVENT_STOP:  # ours, or the process was stopped by a signal before and still is
                self._trapped = True
                return
            # A signal on its way: it goes on its way. A fault in our own call is none of the program's.
            ours = status == _SYSCALL_STOP or (self._saved is not None and status in _FAULTS)
            self._resume(_CONT, 0 if ours else status & 0xFF)

    _at_syscall = False

    def _to_syscall_stop(self) -> None:
        send = 0
        while True:
            self._resume(_SYSCALL, send)
            status, send = self._wait(None), 0  # there is no way back from here: wait as long as it takes
            if status == _SYSCALL_STOP:
                self._at_syscall = True
                return
            if status in _FAULTS:
                self._at_syscall = True  # stopped, though not in a trap
                raise OSError(errno.EFAULT, f"the call raised {signal.Signals(status).name}")
            if status >> 8 != _EVENT_STOP:
                send = status & 0xFF  # SIGSTOP, which nothing blocks: the process stops when we let go

    def _resume(self, request: int, send: int = 0) -> None:
        self._ptrace(request, 0, send)
        self._trapped = self._at_syscall = False

    def _wait(self, seconds: float | None) -> int:
        """Its next stop: event << 8 | signal. Its end is left to its parent to see, which we may be."""
        deadline = None if seconds is None else time.monotonic() + seconds
        pause = 0.0
        while True:
            try:
                found = os.waitid(os.P_PID, self.tid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL)
            except ChildProcessError as error:
                raise Gone(errno.ESRCH, f"thread {self.tid} is gone") from error
            if found is None:
                if deadline is not None and time.monotonic() > deadline:
                    raise NotStopped(errno.ETIMEDOUT, f"thread {self.tid} did not stop in {seconds:g} s")
                time.sleep(pause)
                pause = min(pause + 1e-5, 1e-3)
            elif found.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                how = "ended with" if found.si_code == os.CLD_EXITED else "was killed by signal"
                raise Gone(errno.ESRCH, f"thread {self.tid} {how} {found.si_status}")
            else:
                os.waitid(os.P_PID, self.tid, os.WSTOPPED | os.WNOHANG | _WALL)
                return found.si_status

    def _in_restartable_sequence(self) -> bool:
        # struct ptrace_rseq_configuration: u64 rseq_abi_pointer | u32 size | u32 signature | u32 flags | u32 pad
        configuration = ctypes.create_string_buffer(24)
        try:
            self._ptrace(_GET_RSEQ, len(configuration), ctypes.addressof(configuration))
            (area,) = struct.unpack_from("<Q", configuration)
            # struct rseq: u32 cpu_id_start | u32 cpu_id | u64 rseq_cs | ...
            return bool(area) and any(os.pread(self._mem, 8, area + 8))
        except OSError:  # a kernel without restartable sequences
            return False

    def _registers(self) -> Registers:
        registers = (ctypes.c_uint64 * 27)()
        self._ptrace(_GETREGS, 0, ctypes.addressof(registers))
        return list(registers)

    def _set_registers(self, values: Registers) -> None:
        registers = (ctypes.c_uint64 * 27)(*values)
        self._ptrace(_SETREGS, 0, ctypes.addressof(registers))

    def _set_mask(self, value: int) -> None:
        mask = ctypes.c_uint64(value)
        self._ptrace(_SETSIGMASK, ctypes.sizeof(mask), ctypes.addressof(mask))

    def _ptrace(self, request: int, address: int = 0, data: int = 0) -> None:
        if _libc.ptrace(request, self.tid, address, data) < 0:
            number = ctypes.get_errno()
            kind = Gone if number == errno.ESRCH else OSError
            raise kind(number, f"ptrace {request:#x} of thread {self.tid}: {os.strerror(number)}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
