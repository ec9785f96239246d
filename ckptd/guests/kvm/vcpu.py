"""One vCPU: a thread around KVM_RUN, and what it does with each exit.

The thread asks its machine before each entry (`admit`), and stays there while the guest is paused or this vCPU is held.
An `in` or `out` is completed by the next KVM_RUN, so before a pause it is entered once more with immediate_exit, which
completes it and leaves at once (api.rst 5, "pending operations"). A kick is that flag, for a vCPU on its way in, and a
signal, for one that is in.
"""

from __future__ import annotations

import fcntl
import signal
import threading
import time
from contextlib import suppress
from mmap import mmap
from typing import Protocol

from ckptd.guests.kvm import abi
from ckptd.guests.kvm.abi import Exit
from ckptd.guests.kvm.devices import Command, Console, Devices
from ckptd.guests.kvm.spec import BATCH
from ckptd.guests.kvm.vm import VcpuFile

__all__ = ["KICK", "Vcpu", "VcpuHost", "seconds_between_marks"]

KICK = signal.SIGUSR1
_WAIT = 0.02  # seconds that WAIT waits for input
_MAX_DEBT = 0.05  # seconds of lost time that a rate-limited vCPU makes up for


class VcpuHost(Protocol):
    """What a vCPU needs of its machine. Called in the vCPU's thread."""

    def admit(self, vcpu: Vcpu) -> bool:
        """Returns when it may enter the guest; False: never again."""

    def attend(self) -> None:
        """This vCPU waits for a harvest or for the gate."""

    def stop(self, why: str) -> None:
        """The guest runs no more; it can still be saved."""

    def store(self, gpa: int, data: bytes) -> None:
        """Write guest memory and tell the tracker."""


class Vcpu:
    """`seconds`: between two marks, for its rate; 0: flat out."""

    def __init__(self, index: int, file: VcpuFile, host: VcpuHost, console: Console, seconds: float) -> None:
        self.index = index
        self.file = file
        self.devices = Devices(console, self._transmit, self._command, host.store)
        self.pending = b""  # transmitted, and not yet taken by the gate
        self.marks = 0
        self.halted = False
        self.at_mark = False  # and held there
        self.hold_at_mark = False
        self.ring_full = False
        self.unfinished = False  # its last exit is to be completed by one more entry
        self.parked = False
        self.until = 0.0  # monotonic seconds: not before
        self.waits_for_input = False
        self._host = host
        self._seconds = seconds
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._run, name=f"vcpu-{index}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the end of its thread, if it has begun."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def kick(self) -> None:
        """Get it out of the guest, and keep it out until `let_in`."""
        self.file.run[abi.IMMEDIATE_EXIT_AT] = 1
        if self._thread.is_alive() and self._thread.ident is not None:
            with suppress(ProcessLookupError):
                signal.pthread_kill(self._thread.ident, KICK)

    def let_in(self) -> None:
        self.file.run[abi.IMMEDIATE_EXIT_AT] = 0

    def _run(self) -> None:
        while self._host.admit(self):
            try:
                fcntl.ioctl(self.file.fd, abi.RUN, 0)
            except InterruptedError:
                self.unfinished = False
                continue
            except OSError as error:
                self.unfinished = False
                self._host.stop(f"vCPU {self.index}: KVM_RUN failed: {error.strerror}{self._where()}")
                continue
            self._exit()

    def _exit(self) -> None:
        run = self.file.run
        (reason,) = abi.EXIT_REASON.unpack_from(run)
        self.unfinished = False
        if reason == Exit.IO:
            self._port(run)
        elif reason == Exit.MMIO:
            self.unfinished = True
            _, _, size, is_write = abi.EXIT_MMIO.unpack_from(run)
            if not is_write:  # nothing answers there
                run[40 : 40 + size] = b"\xff" * size
        elif reason == Exit.HLT:
            self.halted = True  # there is no device that interrupts, so nothing wakes it
        elif reason == Exit.DIRTY_RING_FULL:
            self.ring_full = True
            self._host.attend()
        elif reason not in (Exit.INTR, Exit.IRQ_WINDOW_OPEN):
            self._host.stop(f"vCPU {self.index}: {_reason(reason, run)}{self._where()}")

    def _port(self, run: mmap) -> None:
        self.unfinished = True
        direction, size, port, count, offset = abi.EXIT_IO.unpack_from(run)
        end = offset + size * count
        if direction == abi.IO_OUT:
            self.devices.write(port, size, run[offset:end])
        else:
            run[offset:end] = self.devices.read(port, size, count)

    def _transmit(self, data: bytes) -> None:
        self.pending += data

    def _command(self, command: Command) -> None:
        match command:
            case Command.MARK:
                self.marks += 1
                self.at_mark = self.hold_at_mark
                if self._seconds:
                    self._keep_rate()
            case Command.WAIT:
                self.until, self.waits_for_input = time.monotonic() + _WAIT, True
            case Command.END:
                self._host.stop(f"vCPU {self.index}: the guest has ended itself")
            case Command.FAULT:
                self._host.stop(f"vCPU {self.index}: the program reports a fault at {self.devices.latch:#x}")
            case _:
                pass

    def _keep_rate(self) -> None:
        # absolute deadlines keep the rate; what was lost beyond the debt (a pause, a stall) is forgiven
        now = time.monotonic()
        self._deadline = max(self._deadline, now - _MAX_DEBT) + self._seconds
        self.until = self._deadline

    def _where(self) -> str:
        regs = bytearray(abi.REGS_SIZE)
        try:
            fcntl.ioctl(self.file.fd, abi.GET_REGS, regs)
        except OSError:
            return ""
        return f", at {abi.REGS.unpack(regs)[abi.REG_NAMES.index('rip')]:#x}"


def seconds_between_marks(rate: int, vcpus: int) -> float:
    """For `rate` pages a second that all vCPUs write together."""
    return BATCH * vcpus / rate if rate else 0.0


def _reason(reason: int, run: mmap) -> str:
    if reason == Exit.SHUTDOWN:
        return "shut down (a triple fault)"
    if reason == Exit.FAIL_ENTRY:
        return f"KVM could not enter the guest, hardware reason {abi.EXIT_FAIL_ENTRY.unpack_from(run)[0]:#x}"
    if reason == Exit.INTERNAL_ERROR:
        return f"KVM gave up, internal error {abi.EXIT_INTERNAL.unpack_from(run)[0]}"
    known = {int(one): one.name for one in Exit}
    return f"KVM_EXIT_{known.get(reason, reason)}, which this machine does not know"
