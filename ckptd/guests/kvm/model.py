"""What a kvm guest must be: the programs once more, in numpy, over plain arrays.

At a mark every byte of memory and every general register is a pure function of (description, batches that each vCPU
has done): vCPUs write to places of their own, and the console's lock is free. `kv` depends on its requests instead,
which store.py answers. A vCPU of 0 batches is where it enters the program.

Pure, but for the assembler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError
from ckptd.guests.kvm.devices import COMMAND, Command
from ckptd.guests.kvm.pages import U32, Memory, Numbers, Pages
from ckptd.guests.kvm.programs import image_of
from ckptd.guests.kvm.spec import (
    BATCH,
    BOOT_BLOCK,
    LINE_BYTES,
    LINES,
    VCPU_BLOCK_BYTES,
    VCPU_BLOCKS,
    KvmSpec,
)
from ckptd.units import PAGE_SIZE

__all__ = ["HEADERS", "SLOT", "Expected", "batches_of", "checksums", "predict", "rounds_of"]

_MASK = 0xFFFFFFFF
_AREAS = BOOT_BLOCK + 32  # in the boot block: gpa, pages of each area
SLOT = VCPU_BLOCK_BYTES // 4  # u32 of a vCPU in a page of `counter` and `random`


class Expected(NamedTuple):
    """`memory`: (pages, 4096) for each region. `registers` and `lines`, for each vCPU: general registers by KVM's
    names, and what it has written to the console since its start."""

    memory: list[npt.NDArray[np.uint8]]
    registers: list[dict[str, int]]
    lines: list[list[bytes]]


def predict(spec: KvmSpec, batches: Sequence[int]) -> Expected:
    """The guest whose vCPU v has done batches[v] batches and is at its mark. Raises GuestError for `kv`."""
    program = _PROGRAMS.get(spec.program)
    if program is None:
        raise GuestError(f"the program {spec.program} does not run by itself", hint="Store answers its requests")
    if len(batches) != spec.vcpus or min(batches) < 0:
        raise GuestError(f"{list(batches)} are no batches of {spec.vcpus} vCPUs")
    expected = Expected([np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in spec.geometry], [], [])
    low = expected.memory[0].reshape(-1)
    for gpa, data in image_of(spec):
        low[gpa : gpa + len(data)] = np.frombuffer(data, dtype=np.uint8)
    pages = Pages(spec)
    for vcpu, done in enumerate(batches):
        if not done:
            expected.registers.append(_registers(rax=vcpu, rbx=BOOT_BLOCK))
            expected.lines.append([])
            continue
        end = program(spec, pages, vcpu, done, expected.memory)
        block = VCPU_BLOCKS + VCPU_BLOCK_BYTES * vcpu
        words = np.array([done & _MASK, spec.output_every - done % spec.output_every, *end.block], dtype=np.uint32)
        low[block : block + words.nbytes] = words.view(np.uint8)
        if end.lines:
            line = LINES + LINE_BYTES * vcpu
            low[line : line + len(end.lines[-1])] = np.frombuffer(end.lines[-1], dtype=np.uint8)
        common = {"rax": int(Command.MARK), "rdx": COMMAND, "rbp": block}
        expected.registers.append(_registers(**common, **end.registers))
        expected.lines.append(end.lines)
    return expected


def batches_of(spec: KvmSpec, memory: Memory) -> list[int]:
    """The batches that each vCPU has done (requests, with `kv`), as its own block says."""
    low = memory[0].reshape(-1)[VCPU_BLOCKS : VCPU_BLOCKS + VCPU_BLOCK_BYTES * spec.vcpus]
    return [int(done) for done in low.view(np.uint32)[::SLOT]]


# --- the programs


class _End(NamedTuple):
    """What a vCPU leaves beside its pages: its block from byte 8 on, its registers, its lines."""

    block: list[int]
    registers: dict[str, int]
    lines: list[bytes]


def _counter(spec: KvmSpec, pages: Pages, vcpu: int, done: int, memory: Memory) -> _End:
    most = min(pages.total, 1024)
    rounds, position = divmod(done * BATCH, most)
    numbers = np.arange(most if rounds else position)
    counts = np.where(numbers < position, rounds + 1, rounds) & _MASK
    pages.store(memory, numbers, SLOT * vcpu, counts.astype(np.uint32)[:, None])

    index = pages.index(position)
    end = min(pages.parts[index].end, most)
    cursor = pages.gpa(position) + VCPU_BLOCK_BYTES * vcpu
    block = [cursor, end - position, most - end, _AREAS + 8 * (index + 1)]
    registers = dict(zip(("rdi", "rsi", "rcx", "rbx"), block, strict=True))
    return _End(block, registers, _lines(b"C", spec, vcpu, done, lambda batch: -(-batch * BATCH // most)))


_K1, _K2, _K3, _K4 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F


def _patterns(spec: KvmSpec, pages: Pages, vcpu: int, done: int, memory: Memory) -> _End:
    numbers = np.arange(vcpu, pages.total, spec.vcpus)
    if not len(numbers):
        return _End([], {"rbx": vcpu}, _lines(b"P", spec, vcpu, done, lambda batch: 0))
    rounds = rounds_of(len(numbers), done * BATCH)
    written = np.flatnonzero(rounds)
    header = np.empty((len(written), 4), dtype=np.uint32)
    header[:, 0], header[:, 1], header[:, 2] = numbers[written], rounds[written], vcpu
    header[:, 3] = checksums(header)
    for word in HEADERS:
        pages.store(memory, numbers[written], word, header)

    before, position = divmod(done * BATCH, len(numbers))
    number, current = vcpu + position * spec.vcpus, (before + 1) & _MASK
    index = pages.index(number)
    place = [_AREAS + 8 * index, pages.parts[index].end, PAGE_SIZE * spec.vcpus]
    keys = [_key(current, vcpu), _key(before, vcpu) if before else 0]
    block = [pages.gpa(number), number, current, *keys, *place]
    registers = {"rdi": block[0], "rsi": number, "rcx": current, "rbx": vcpu}
    lines = _lines(b"P", spec, vcpu, done, lambda batch: batch * BATCH // len(numbers) + 1)
    return _End(block, registers, lines)


HEADERS = (0, (PAGE_SIZE - 16) // 4)  # the u32 at which the two headers of a page begin


def rounds_of(owned: int, writes: int) -> Numbers:
    """The rounds of a vCPU's pages after so many writes."""
    before, position = divmod(writes, owned)
    return np.where(np.arange(owned) < position, before + 1, before)


def _key(number: int, vcpu: int) -> int:
    return (_rotated(number * _K2 & _MASK, 13) + vcpu * _K3) & _MASK


def checksums(header: U32) -> U32:
    """The checksum that each of these headers must have."""
    number, rounds, vcpu = header[:, 0], header[:, 1], header[:, 2]
    keys = _rotated_all(rounds * np.uint32(_K2), 13) + vcpu * np.uint32(_K3)
    sums: U32 = _rotated_all((number * np.uint32(_K1)) ^ keys, 15) * np.uint32(_K4)
    return sums


_A, _C = 1664525, 1013904223
_CHUNK = 1 << 20


def _random(spec: KvmSpec, pages: Pages, vcpu: int, done: int, memory: Memory) -> _End:
    first = x = _start(spec.seed_word, vcpu)
    total = pages.total
    sums, marks, counts, last = slots = np.zeros((4, total), dtype=np.uint32)
    for start in range(0, done * BATCH, _CHUNK):
        xs = _sequence(x, min(_CHUNK, done * BATCH - start))
        x = int(xs[-1])
        rounds = np.arange(start + 1, start + 1 + len(xs)).astype(np.uint32)
        chosen = (xs.astype(np.uint64) * np.uint64(total) >> np.uint64(32)).astype(np.int64)
        np.add.at(sums, chosen, xs)
        np.bitwise_xor.at(marks, chosen, _rotated_all(rounds, 16))
        counts += np.bincount(chosen, minlength=total).astype(np.uint32)
        last[chosen] = rounds  # numpy assigns in order: the last one stays
    touched = np.flatnonzero(counts)
    pages.store(memory, touched, SLOT * vcpu, slots[:, touched].T)

    says = first
    a, c = _jump(spec.output_every * BATCH)

    def value(batch: int) -> int:
        nonlocal says
        says = (says * a + c) & _MASK
        return says

    block = [x, done * BATCH & _MASK]
    registers = {"rsi": block[0], "rdi": block[1], "rbx": VCPU_BLOCK_BYTES * vcpu}
    return _End(block, registers, _lines(b"R", spec, vcpu, done, value))


def _start(seed: int, vcpu: int) -> int:
    """The finalizer of MurmurHash3 (Appleby, public domain) over seed and vCPU."""
    x = (seed + vcpu * 0x9E3779B9) & _MASK
    x = (x ^ x >> 16) * 0x85EBCA6B & _MASK
    x = (x ^ x >> 13) * 0xC2B2AE35 & _MASK
    return x ^ x >> 16


def _jump(count: int) -> tuple[int, int]:
    """(a, c) such that x * a + c is the generator's state `count` steps after x."""
    a, c = 1, 0
    power, added = _A, _C
    while count:
        if count & 1:
            a, c = a * power & _MASK, (c * power + added) & _MASK
        power, added, count = power * power & _MASK, (added * power + added) & _MASK, count >> 1
    return a, c


def _sequence(x: int, count: int) -> U32:
    """The `count` states that follow x: the first half, and the same half a jump further, and so on."""
    states = np.empty(count, dtype=np.uint32)
    states[0] = (x * _A + _C) & _MASK
    have = 1
    while have < count:
        a, c = _jump(have)
        more = min(have, count - have)
        states[have : have + more] = states[:more] * np.uint32(a) + np.uint32(c)
        have += more
    return states


_PROGRAMS: Mapping[str, Callable[[KvmSpec, Pages, int, int, Memory], _End]] = {
    "counter": _counter,
    "patterns": _patterns,
    "random": _random,
}


def _lines(letter: bytes, spec: KvmSpec, vcpu: int, done: int, value: Callable[[int], int]) -> list[bytes]:
    """The lines of a vCPU; `value` is asked for those batches after which there is one, in order."""
    return [
        b"%s %02x %08x %08x\n" % (letter, vcpu, batch & _MASK, value(batch) & _MASK)
        for batch in range(spec.output_every, done + 1, spec.output_every)
    ]


def _registers(**known: int) -> dict[str, int]:
    return {name: known.get(name, 0) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")}


def _rotated(x: int, by: int) -> int:
    return (x << by | x >> 32 - by) & _MASK


def _rotated_all(x: U32, by: int) -> U32:
    rotated: U32 = x << np.uint32(by) | x >> np.uint32(32 - by)
    return rotated
