"""The machine: memory, a VM of KVM over it, vCPUs in threads, devices, gate, and the tracker that it is logged by.

The owner's thread pauses, saves, harvests and resumes; the vCPUs' threads run the guest. One lock guards what they
share, and nobody holds it within KVM_RUN. Memory outlives the VM: another way of logging, or a ring that was overrun,
is answered by another VM over the same memory, with the vCPUs' state carried over (`rebuild`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError, StateError, TrackerUnavailable
from ckptd.guests.kvm.devices import Console
from ckptd.guests.kvm.gate import KvmGate
from ckptd.guests.kvm.host import cpuid_of, features_of, msrs_of, open_kvm
from ckptd.guests.kvm.registers import Layout, enter_flat, load_vcpu, save_vcpu, usable_msrs
from ckptd.guests.kvm.spec import BOOT_BLOCK, CODE, KvmSpec
from ckptd.guests.kvm.state import State, VcpuState, unfit
from ckptd.guests.kvm.vcpu import Vcpu, seconds_between_marks
from ckptd.guests.kvm.vm import LogMode, Vm
from ckptd.trackers.kvm_bitmap import KvmBitmapTracker
from ckptd.trackers.kvm_log import KvmTracker, Words
from ckptd.trackers.kvm_manual import KvmManualTracker
from ckptd.trackers.kvm_ring import KvmRingTracker
from ckptd.units import PAGE_SIZE

__all__ = ["TRACKERS", "Machine"]

TRACKERS = ("kvm-bitmap", "kvm-manual", "kvm-ring")
_POLL = 0.001  # seconds between two looks at a gate that is full: it is released by shared memory, which wakes nobody
_KICK_AGAIN = 0.01
_PAUSE_LIMIT = 5.0  # seconds


class Machine:
    """Paused at first. `attend` is called, from any thread, while a vCPU waits for a harvest or for its gate;
    `notice` after output went into the gate, or the guest has stopped."""

    def __init__(
        self,
        spec: KvmSpec,
        memory: Sequence[npt.NDArray[np.uint8]],
        gate: KvmGate,
        *,
        attend: Callable[[], None] = lambda: None,
        notice: Callable[[], None] = lambda: None,
    ) -> None:
        sizes, wanted = [len(rows) for rows in memory], [region.size_bytes for region in spec.geometry]
        if sizes != wanted:
            raise GuestError(f"memory of {sizes} bytes is not that of {spec.geometry}")
        self.spec = spec
        self.gate = gate
        self.console = Console()
        self.attend = attend
        self.tracker: KvmTracker | None = None
        self.stopped = ""
        self._notice = notice
        self._memory = list(memory)
        self._places = spec.places
        self._kvm = open_kvm()
        self.features = features_of(self._kvm)
        if spec.vcpus > self.features.max_vcpus:
            raise GuestError(f"KVM runs at most {self.features.max_vcpus} vCPUs here, not {spec.vcpus}")
        self._cpuid = cpuid_of(self._kvm)
        self._layout = Layout(0, ())
        self._changed = threading.Condition()
        self._paused = True
        self._ended = False
        self._vm = self._build(LogMode())
        seconds = seconds_between_marks(spec.rate, spec.vcpus)
        self.vcpus = [Vcpu(index, file, self, self.console, seconds) for index, file in enumerate(self._vm.vcpus)]
        for vcpu in self.vcpus:
            vcpu.parked = True

    def begin(self, image: Sequence[tuple[int, bytes]]) -> None:
        """Load these bytes at these addresses, and stand before the first instruction."""
        for gpa, data in image:
            self.store(gpa, data)
        for vcpu in self.vcpus:
            enter_flat(vcpu.file.fd, CODE, self._cpuid, {"rax": vcpu.index, "rbx": BOOT_BLOCK})
            vcpu.start()

    def restore(self, state: State) -> None:
        """Stand where `state` was saved, over the memory of that moment. Raises GuestError if this host cannot."""
        try:
            self._load(state)
        except BaseException:
            self.end()
            raise
        for vcpu in self.vcpus:
            vcpu.start()

    # --- pausing

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """Returns when no vCPU is in the guest, and each has completed its last exit. Raises GuestError."""
        with self._changed:
            self._paused = True
            for vcpu in self.vcpus:
                vcpu.kick()
            self._changed.notify_all()
            until = time.monotonic() + _PAUSE_LIMIT
            while not all(vcpu.parked for vcpu in self.vcpus):
                if not self._changed.wait(_KICK_AGAIN):
                    for vcpu in self.vcpus:
                        vcpu.kick()
                    if time.monotonic() > until:
                        stuck = [vcpu.index for vcpu in self.vcpus if not vcpu.parked]
                        raise GuestError(f"vCPUs {stuck} do not leave the guest within {_PAUSE_LIMIT:g} s")

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            for vcpu in self.vcpus:
                vcpu.parked = vcpu.at_mark = vcpu.hold_at_mark = False
                vcpu.let_in()
            self._changed.notify_all()

    def pause_at_marks(self, seconds: float) -> None:
        """Pause with every vCPU right behind a mark (or halted). Raises GuestError after so many seconds."""
        until = time.monotonic() + seconds
        with self._changed:
            for vcpu in self.vcpus:
                vcpu.hold_at_mark = True
            while not (self.stopped or all(vcpu.at_mark or vcpu.halted for vcpu in self.vcpus)):
                left = until - time.monotonic()
                if left <= 0:
                    raise GuestError(f"the vCPUs have not all come to a mark within {seconds:g} s")
                self._changed.wait(min(left, 0.05))
        self.pause()

    def admit(self, vcpu: Vcpu) -> bool:
        told = False
        with self._changed:
            while not self._ended:
                if self._paused and vcpu.unfinished:
                    return True  # once more, to complete its exit: immediate_exit is set
                wait = None if self._paused else self._hold(vcpu)
                if wait == 0.0:
                    return True
                if self._paused and not vcpu.parked:
                    vcpu.parked = True
                    self._changed.notify_all()
                elif vcpu.at_mark and not told:
                    told = True
                    self._changed.notify_all()
                self._changed.wait(wait)
            return False

    def _hold(self, vcpu: Vcpu) -> float | None:
        """How long this vCPU must stay out: 0 not at all, None until something changes."""
        if vcpu.pending:
            taken = self.gate.emit(vcpu.pending)
            vcpu.pending = vcpu.pending[taken:]
            if taken:
                self._notice()
            if vcpu.pending:
                self.attend()
                return _POLL
        if vcpu.ring_full:
            self.attend()
            return _POLL
        if self.stopped or vcpu.halted or vcpu.at_mark:
            return None
        if vcpu.waits_for_input and self.console:
            vcpu.waits_for_input, vcpu.until = False, 0.0
        if vcpu.until:
            left = vcpu.until - time.monotonic()
            if left > 0:
                return left
            vcpu.until, vcpu.waits_for_input = 0.0, False
        return 0.0

    def stop(self, why: str) -> None:
        with self._changed:
            self.stopped = self.stopped or why
            for vcpu in self.vcpus:
                vcpu.kick()
            self._changed.notify_all()
        self._notice()

    @property
    def trouble(self) -> str:
        """What an operator should know: why the guest, or which of its vCPUs, runs no more."""
        if self.stopped:
            return f"the guest runs no more: {self.stopped}"
        halted = [str(vcpu.index) for vcpu in self.vcpus if vcpu.halted]
        return f"halted: vCPU {', '.join(halted)}" if halted else ""

    def wake(self) -> None:
        """Something that a vCPU may wait for has changed."""
        with self._changed:
            self._changed.notify_all()

    def end(self) -> None:
        """The vCPUs' threads end; the memory stays."""
        with self._changed:
            self._ended = True
            for vcpu in self.vcpus:
                vcpu.kick()
            self._changed.notify_all()
        for vcpu in self.vcpus:
            vcpu.join(_PAUSE_LIMIT)
        self.tracker = None
        self._vm.close()
        if self._kvm >= 0:
            os.close(self._kvm)
            self._kvm = -1

    # --- memory

    def store(self, gpa: int, data: bytes) -> None:
        """Write guest memory: what KVM's log does not see, and so the tracker is told."""
        for region, (place, rows) in enumerate(zip(self._places, self._memory, strict=True)):
            if place <= gpa and gpa + len(data) <= place + len(rows):
                at = gpa - place
                rows[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)
                if self.tracker is not None and data:
                    first, last = at // PAGE_SIZE, (at + len(data) - 1) // PAGE_SIZE
                    self.tracker.wrote(region, first, last - first + 1)
                return
        self.stop(f"a device was told to write {len(data)} bytes at {gpa:#x}, where there is no memory")

    # --- state

    def save(self) -> State:
        """While paused. Raises GuestError."""
        if not self._paused:
            raise StateError("the state is saved while the guest is paused")
        vcpus = tuple(
            VcpuState(save_vcpu(vcpu.file.fd, self._layout), vcpu.devices.latch, vcpu.pending, vcpu.marks, vcpu.halted)
            for vcpu in self.vcpus
        )
        clock = self._vm.clock()
        return State(self.spec, self._cpuid, clock, self.console.waiting, self.gate.written, self.stopped, vcpus)

    def _load(self, state: State) -> None:
        if why := unfit(state, self._cpuid, self._layout.xsave_bytes):
            raise GuestError(why, hint="use hosts of one model")
        self._cpuid = state.cpuid
        self.stopped = state.stopped
        self.console.typed(state.input)
        for vcpu, saved in zip(self.vcpus, state.vcpus, strict=True):
            load_vcpu(vcpu.file.fd, saved.parts, state.cpuid)
            vcpu.devices.latch, vcpu.pending = saved.latch, saved.pending
            vcpu.marks, vcpu.halted = saved.marks, saved.halted
        self._vm.set_clock(state.clock)

    # --- logging

    def use_tracker(self, name: str, ring_entries: int = 65536) -> KvmTracker:
        """Log by this tracker from now on; it is not started yet. Raises TrackerUnavailable with the cure."""
        features, geometry, exact = self.features, self.spec.geometry, self.features.exact
        mode = LogMode()
        tracker: KvmTracker
        if name == "kvm-bitmap":
            tracker = KvmBitmapTracker(geometry, self, exact=exact)
        elif name == "kvm-manual":
            initially_set = features.initially_set
            mode = LogMode(manual=True, initially_set=initially_set)
            tracker = KvmManualTracker(geometry, self, exact=exact, initially_set=initially_set)
        elif name == "kvm-ring":
            mode = LogMode(ring_entries=ring_entries)
            tracker = KvmRingTracker(geometry, self, exact=exact, entries=ring_entries, reserve=features.ring_reserve)
        else:
            raise TrackerUnavailable(
                f"a kvm guest has no tracker {name!r}", hint=f"one of {', '.join(TRACKERS)}, or auto"
            )
        if self.tracker is not None:
            self.tracker.stop()
            self.tracker = None
        self.rebuild(mode)
        self.tracker = tracker
        return tracker

    @property
    def chosen_tracker(self) -> KvmTracker:
        """The tracker in use. Raises StateError if there is none."""
        if self.tracker is None:
            raise StateError("no tracker is chosen: a daemon that attaches chooses one")
        return self.tracker

    def rebuild(self, mode: LogMode | None = None) -> None:
        """Another VM over the same memory, its log empty and off; the vCPUs go on in it where they were, or, if it
        cannot be made, in the old one."""
        was_paused = self._paused
        self.pause()
        try:
            state, old = self.save(), self._vm
            vm = self._build(mode or old.mode)
            try:
                for file, saved in zip(vm.vcpus, state.vcpus, strict=True):
                    load_vcpu(file.fd, saved.parts, state.cpuid)
                vm.set_clock(state.clock)
            except BaseException:
                vm.close()
                raise
            for vcpu, file in zip(self.vcpus, vm.vcpus, strict=True):
                vcpu.file, vcpu.ring_full = file, False
            self._vm = vm
            old.close()
        finally:
            if not was_paused:
                self.resume()

    def _build(self, mode: LogMode) -> Vm:
        vm = Vm(self._kvm, self.features, self._memory, self._places, mode, self.spec.vcpus)
        if not self._layout.xsave_bytes:
            msrs = usable_msrs(vm.vcpus[0].fd, msrs_of(self._kvm))
            self._layout = Layout.of(self.features, msrs)
        return vm

    # the seam of the trackers (trackers/kvm_log.py)

    def arm(self, logging: bool) -> None:
        self._vm.arm(logging)

    def get_dirty_log(self, region: int, words: Words) -> None:
        self._vm.get_dirty_log(region, words)

    def clear_dirty_log(self, region: int, first: int, pages: int, words: Words) -> None:
        self._vm.clear_dirty_log(region, first, pages, words)

    @property
    def rings(self) -> Sequence[npt.NDArray[np.void]]:
        return [vcpu.ring for vcpu in self._vm.vcpus if vcpu.ring is not None]

    def waiting_on_full(self) -> bool:
        for vcpu in self.vcpus:  # noqa: SIM110
            if vcpu.ring_full:
                return True
        return False

    def reset_rings(self) -> int:
        count = self._vm.reset_rings()
        if self.waiting_on_full():
            with self._changed:
                for vcpu in self.vcpus:
                    vcpu.ring_full = False
                self._changed.notify_all()
        return count
