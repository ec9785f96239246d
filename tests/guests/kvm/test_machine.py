"""A machine over a real KVM: paused anywhere, saved whole, gone on elsewhere; and guests that do not behave."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import ConfigError, GuestError, StateError, TrackerUnavailable
from ckptd.guests.kvm import abi
from ckptd.guests.kvm.differences import differing
from ckptd.guests.kvm.gate import KvmGate, gate_bytes
from ckptd.guests.kvm.machine import TRACKERS, Machine
from ckptd.guests.kvm.model import batches_of, predict
from ckptd.guests.kvm.spec import CODE, VCPU_BLOCKS, WORK, KvmSpec
from ckptd.guests.kvm.state import decode, encode
from ckptd.memory.regions import Geometry
from ckptd.units import PAGE_SIZE

from .machines import assembled, machine_over, needs_kvm, new_memory, registers_of

pytestmark = [pytest.mark.kvm, needs_kvm]

SMALL = Geometry.of(ram=64)


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "in vain"
        time.sleep(0.001)


def gone_on(state: bytes, memory: list[np.ndarray]) -> tuple[Machine, list[np.ndarray]]:  # type: ignore[type-arg]
    """Another machine, over a copy of the memory, where the first one was saved."""
    found = decode(state)
    copy = new_memory(found.spec)
    for mine, theirs in zip(copy, memory, strict=True):
        mine[:] = theirs
    gate = KvmGate(np.zeros(gate_bytes(1 << 16), dtype=np.uint8))
    gate.fill(b"", found.written)
    machine = Machine(found.spec, copy, gate)
    machine.restore(found)
    return machine, copy


def test_a_vcpu_in_an_endless_loop_is_paused_saved_and_goes_on(tmp_path: Path) -> None:
    spec, source = KvmSpec(SMALL), "mov $77, %ebx; spin: jmp spin"
    memory = new_memory(spec)
    with machine_over(spec, assembled(source, tmp_path), memory) as machine:
        machine.resume()
        time.sleep(0.02)
        machine.pause()
        before = registers_of(machine, 0)
        assert (before["rbx"], before["rip"]) == (77, CODE + 5)
        other, _ = gone_on(encode(machine.save()), memory)
        try:
            assert registers_of(other, 0) == before
            other.resume()
            time.sleep(0.02)
            other.pause()
            assert registers_of(other, 0) == before and not other.trouble
        finally:
            other.end()


def test_a_halted_vcpu_does_not_stop_the_others_and_stays_halted(tmp_path: Path) -> None:
    source = f"""
        test %eax, %eax
        jnz count
        hlt
    count:
        incl {WORK:#x}
        jmp count
    """
    spec = KvmSpec(SMALL, vcpus=2)
    memory = new_memory(spec)
    count = memory[0][WORK : WORK + 4].view(np.uint32)
    with machine_over(spec, assembled(source, tmp_path), memory) as machine:
        machine.resume()
        wait_for(lambda: count[0] > 100 and machine.vcpus[0].halted)
        machine.pause()
        assert machine.trouble == "halted: vCPU 0"
        other, copy = gone_on(encode(machine.save()), memory)
        try:
            there, before = copy[0][WORK : WORK + 4].view(np.uint32), int(count[0])
            other.resume()
            wait_for(lambda: there[0] > before + 100)
            assert other.trouble == "halted: vCPU 0"
            assert registers_of(other, 0)["rip"] == registers_of(machine, 0)["rip"]
        finally:
            other.end()


ENDS = {
    "triple fault": ("ud2", "vCPU 0: shut down (a triple fault)"),
    "jump to nowhere": ("mov $0x7f000000, %eax; jmp *%eax", "vCPU 0: "),
    "end": ("mov $0x600, %edx; mov $4, %eax; outl %eax, %dx", "vCPU 0: the guest has ended itself"),
    "fault": (
        "mov $0x604, %edx; mov $0x42, %eax; outl %eax, %dx; mov $0x600, %edx; mov $5, %eax; outl %eax, %dx",
        "vCPU 0: the program reports a fault at 0x42",
    ),
    "a device told to write nowhere": (
        "mov $0x604, %edx; mov $0x7f000000, %eax; outl %eax, %dx; mov $0x600, %edx; mov $3, %eax; outl %eax, %dx",
        "a device was told to write 4 bytes at 0x7f000000, where there is no memory",
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_guest_that_ends_says_why_and_can_still_be_saved(how: str, tmp_path: Path) -> None:
    source, why = ENDS[how]
    spec = KvmSpec(SMALL, vcpus=2)
    memory = new_memory(spec)
    code = assembled(f"test %eax, %eax\n jnz spin\n {source}\n spin: jmp spin", tmp_path)
    with machine_over(spec, code, memory) as machine:
        machine.use_tracker("kvm-bitmap").start()
        machine.resume()
        wait_for(lambda: machine.stopped)
        assert machine.stopped.startswith(why) and machine.trouble == f"the guest runs no more: {machine.stopped}"
        machine.pause()
        assert machine.tracker is not None
        machine.tracker.harvest()
        other, _ = gone_on(encode(machine.save()), memory)
        try:
            other.resume()
            assert other.stopped == machine.stopped
        finally:
            other.end()


def test_debug_and_model_specific_registers_come_along(tmp_path: Path) -> None:
    """The first part is done in one machine, the second in another: breakpoint address and MSR are still there."""
    source = f"""
        mov $0x1234, %eax
        mov %eax, %dr0
        mov $0x174, %ecx
        mov $0x5678, %eax
        xor %edx, %edx
        wrmsr
    wait:
        cmpl $0, {WORK:#x}
        je wait
        mov %dr0, %eax
        mov %eax, {WORK + 32:#x}
        mov $0x174, %ecx
        rdmsr
        mov %eax, {WORK + 36:#x}
        movl $1, {WORK + 4:#x}
    spin:
        jmp spin
    """
    spec = KvmSpec(SMALL)
    memory = new_memory(spec)
    with machine_over(spec, assembled(source, tmp_path), memory) as machine:
        wait_for(lambda: _moved(machine) and registers_of(machine, 0)["rip"] > CODE + 20)
        other, copy = gone_on(encode(machine.save()), memory)
        try:
            words = copy[0][WORK : WORK + 64].view(np.uint32)
            words[0] = 1
            other.resume()
            wait_for(lambda: words[1])
            assert (words[8], words[9]) == (0x1234, 0x5678)
        finally:
            other.end()


def test_floating_point_registers_come_along(tmp_path: Path) -> None:
    """Given by hand, since an emulating KVM does not run the instructions: ST0 and XMM0, in the XSAVE area's layout
    (Intel SDM volume 1, 13.4): ST0 at 32, XMM0 at 160, which of them count at 512."""
    spec = KvmSpec(SMALL)
    memory = new_memory(spec)
    with machine_over(spec, assembled("spin: jmp spin", tmp_path), memory) as machine:
        state = machine.save()
        xsave = bytearray(state.vcpus[0].parts["xsave"])
        st0, xmm0 = bytes.fromhex("35c26821a2da0fc90040"), bytes(range(16))
        xsave[32:42], xsave[160:176] = st0, xmm0
        xsave[512] |= 3
        vcpu = replace(state.vcpus[0], parts={**state.vcpus[0].parts, "xsave": bytes(xsave)})
        other, _ = gone_on(encode(replace(state, vcpus=(vcpu,))), memory)
        try:
            assert _moved(other)
            found = other.save().vcpus[0].parts["xsave"]
            assert (found[32:42], found[160:176]) == (st0, xmm0)
        finally:
            other.end()


def _moved(machine: Machine) -> bool:
    machine.resume()
    time.sleep(0.005)
    machine.pause()
    return True


def test_every_part_of_a_vcpu_is_the_same_after_a_restore() -> None:
    spec = KvmSpec(Geometry.of(ram=512, more=100), vcpus=3)
    memory = new_memory(spec)
    with machine_over(spec, None, memory) as machine:
        machine.resume()
        time.sleep(0.02)
        machine.pause()
        state = machine.save()
        other, _ = gone_on(encode(state), memory)
        try:
            again = other.save()
        finally:
            other.end()
    for mine, theirs in zip(state.vcpus, again.vcpus, strict=True):
        for name, part in mine.parts.items():
            if name == "msrs":
                tsc = _without_clocks(part)
                assert tsc == _without_clocks(theirs.parts[name])
            else:
                assert part == theirs.parts[name], name
        assert (mine.latch, mine.pending, mine.marks, mine.halted) == (
            theirs.latch, theirs.pending, theirs.marks, theirs.halted,
        )  # fmt: skip


def _without_clocks(msrs: bytes) -> dict[int, int]:
    count = abi.MSRS_HEAD.unpack_from(msrs)[0]
    entries = (abi.MSR_ENTRY.unpack_from(msrs, abi.MSRS_HEAD.size + n * abi.MSR_ENTRY.size) for n in range(count))
    return {index: value for index, _, value in entries if index != abi.MSR_IA32_TSC}


@pytest.mark.parametrize("program", ["random", "patterns", "counter"])
@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_guest_moved_at_random_moments_ends_as_its_model_says(program: str, vcpus: int) -> None:
    """Paused between any two instructions, saved, and gone on in another VM over a copy of its memory, again and
    again: at the end every byte, the registers and the console are what an uninterrupted run has."""
    chance = random.Random(vcpus)
    spec = KvmSpec(Geometry.of(ram=300, video=50, high=200), program, vcpus, seed=vcpus + 7, output_every=2)
    memory = new_memory(spec)
    with machine_over(spec, None, memory) as first:
        machine, said = first, b""
        for _ in range(12):
            machine.resume()
            time.sleep(chance.random() * 0.01)
            machine.pause()
            said += machine.gate.held(machine.gate.mark())[: machine.gate.written]
            machine.gate.release(machine.gate.mark())
            moved, memory = gone_on(encode(machine.save()), memory)
            if machine is not first:
                machine.end()
            machine = moved
        machine.resume()
        machine.pause_at_marks(30)
        said += machine.gate.held(machine.gate.mark())
        batches = batches_of(spec, memory)
        registers = [registers_of(machine, index) for index in range(vcpus)]
        machine.end()
    assert min(batches) > 0
    expected = predict(spec, batches)
    rows = [one.reshape(-1, PAGE_SIZE) for one in memory]
    assert differing(expected, rows, spec) == []
    for wanted, found in zip(expected.registers, registers, strict=True):
        assert {name: found[name] & 0xFFFFFFFF for name in wanted} == wanted
    for index, lines in enumerate(expected.lines):
        letter = b" %02x " % index
        assert [line for line in said.splitlines(keepends=True) if line[1:5] == letter] == lines


def test_no_port_access_is_done_twice_or_left_out_when_a_guest_is_moved_in_the_middle_of_it(tmp_path: Path) -> None:
    """The guest passes on what it reads: numbers that a device counts, each of which exists once."""
    source = """
    next:
        mov $0x700, %edx
        inb %dx, %al
        mov $0x3f8, %edx
        outb %al, %dx
        jmp next
    """
    spec, chance, given = KvmSpec(SMALL), random.Random(1), 0
    memory = new_memory(spec)

    def count(port: int, size: int, count: int) -> bytes:
        nonlocal given
        given += 1
        return bytes([given & 0xFF])

    with machine_over(spec, assembled(source, tmp_path), memory) as first:
        machine, said = first, b""
        for _ in range(40):
            machine.vcpus[0].devices.read = count  # type: ignore[method-assign]
            machine.resume()
            time.sleep(chance.random() * 0.002)
            machine.pause()
            said += machine.gate.held(machine.gate.mark())
            machine.gate.release(machine.gate.mark())
            moved, memory = gone_on(encode(machine.save()), memory)
            if machine is not first:
                machine.end()
            machine = moved
        said += machine.vcpus[0].pending
        machine.end()
    assert len(said) > 100 and given - len(said) in (0, 1)
    assert said == bytes(number & 0xFF for number in range(1, len(said) + 1))


@pytest.mark.parametrize("tracker", TRACKERS)
def test_another_vm_over_the_same_memory_changes_nothing(tracker: str) -> None:
    spec = KvmSpec(Geometry.of(ram=300), vcpus=2)
    memory = new_memory(spec)
    with machine_over(spec, None, memory) as machine:
        machine.resume()
        for _ in range(5):
            time.sleep(0.003)
            machine.use_tracker(tracker, 4096).start()
            assert not machine.paused
        machine.pause_at_marks(30)
        batches = batches_of(spec, memory)
        assert differing(predict(spec, batches), [memory[0].reshape(-1, PAGE_SIZE)], spec) == []


@pytest.mark.parametrize("paused", [False, True])
def test_a_vm_that_cannot_be_made_leaves_the_old_one_as_it_was(paused: bool) -> None:
    with machine_over(KvmSpec(Geometry.of(ram=300), vcpus=2)) as machine:
        if not paused:
            machine.resume()
        with pytest.raises(ConfigError, match="at most"):
            machine.use_tracker("kvm-ring", 1 << 20)
        assert machine.paused == paused
        machine.resume()
        machine.pause_at_marks(30)


def test_a_full_gate_stalls_the_vcpu_which_can_be_paused_and_loses_nothing(tmp_path: Path) -> None:
    source = """
        mov $0x3f8, %edx
        xor %eax, %eax
    next:
        outb %al, %dx
        inc %eax
        jmp next
    """
    spec = KvmSpec(SMALL)
    memory, waits = new_memory(spec), []
    gate = KvmGate(np.zeros(gate_bytes(100), dtype=np.uint8))
    machine = Machine(spec, memory, gate, attend=lambda: waits.append(1))
    try:
        machine.begin([(CODE, assembled(source, tmp_path))])
        said = b""
        for _ in range(5):
            machine.resume()
            wait_for(lambda: gate.full and waits)
            time.sleep(0.005)
            machine.pause()
            assert gate.room == 0
            said += gate.held(gate.mark())
            gate.release(gate.mark())
            gate.passed_on(gate.released - gate.sent)
            waits.clear()
        other, _ = gone_on(encode(machine.save()), memory)
        try:
            other.resume()
            wait_for(lambda: other.gate.written >= 1000)
            other.pause()
            said += other.gate.held(other.gate.mark())
        finally:
            other.end()
    finally:
        machine.end()
    assert said == bytes(number & 0xFF for number in range(len(said))) and len(said) >= 1000


@pytest.mark.parametrize("tracker", TRACKERS)
def test_what_the_vmm_itself_writes_is_in_the_harvest(tracker: str) -> None:
    spec = KvmSpec(Geometry.of(ram=64, more=64))
    with machine_over(spec) as machine:
        used = machine.use_tracker(tracker)
        used.start()
        used.harvest()
        machine.store(spec.places[1] + 5 * PAGE_SIZE - 2, b"over two pages")
        machine.store(VCPU_BLOCKS, b"x")
        dirty = used.harvest()
        assert {2} <= set(dirty.gfns[0].tolist()) and {4, 5} <= set(dirty.gfns[1].tolist())
        assert not {4, 5} & set(used.harvest().gfns[1].tolist())


def test_state_is_saved_while_paused_only_and_unknown_trackers_are_refused() -> None:
    with machine_over(KvmSpec(SMALL)) as machine:
        with pytest.raises(TrackerUnavailable, match="no tracker 'bitmap'"):
            machine.use_tracker("bitmap")
        machine.resume()
        with pytest.raises(StateError, match="while the guest is paused"):
            machine.save()


def test_marks_that_never_come_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    with machine_over(KvmSpec(SMALL), assembled("spin: jmp spin", tmp_path)) as machine:
        machine.resume()
        with pytest.raises(GuestError, match="not all come to a mark"):
            machine.pause_at_marks(0.05)
        machine.pause()


def test_the_rate_is_held(tmp_path: Path) -> None:
    """A guest that may write 6,400 pages a second makes about 100 marks in a second, and not thousands."""
    with machine_over(KvmSpec(Geometry.of(ram=512), vcpus=2, rate=6400)) as machine:
        began = time.monotonic()
        machine.resume()
        wait_for(lambda: sum(vcpu.marks for vcpu in machine.vcpus) >= 30)
        machine.pause()
        marks = sum(vcpu.marks for vcpu in machine.vcpus)
        assert marks <= 100 * (time.monotonic() - began) + 10
