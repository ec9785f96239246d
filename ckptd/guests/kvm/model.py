"""What a kvm guest must be: the programs once more, in numpy, over plain arrays.

At a mark every byte of memory and every general register is a pure function of (description, batches that each vCPU
has done): vCPUs write to places of their own, and the console's lock is free. `kv` depends on its requests instead,
and `Store` answers them. A vCPU of 0 batches is where it enters the program.

`patterns` can be checked by itself, too, at any mark: its pages say what they are. Pure, but for the assembler.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError
from ckptd.guests.kvm.devices import COMMAND, Command
from ckptd.guests.kvm.programs import image_of
from ckptd.guests.kvm.spec import (
    BATCH,
    BOOT_BLOCK,
    CODE,
    LINE_BYTES,
    LINES,
    LOCK,
    VCPU_BLOCK_BYTES,
    VCPU_BLOCKS,
    WORK,
    KvmSpec,
)
from ckptd.units import PAGE_SIZE

__all__ = ["Expected", "Store", "batches_of", "check_patterns", "differing", "predict"]

U32 = npt.NDArray[np.uint32]
Numbers = npt.NDArray[np.int64]
Memory = Sequence[npt.NDArray[np.uint8]]

_MASK = 0xFFFFFFFF
_AREAS = BOOT_BLOCK + 32  # in the boot block: gpa, pages of each area
_MOST_NAMED = 10
_SLOT = VCPU_BLOCK_BYTES // 4  # u32 of a vCPU in a page of `counter` and `random`


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
    pages = _Pages(spec)
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
    return [int(done) for done in low.view(np.uint32)[::_SLOT]]


# --- where pages are


class _Part(NamedTuple):
    """An area: pages `first` ... `end` - 1 of the program are the rows from `row` on of a region."""

    first: int
    end: int
    gpa: int
    region: int
    row: int


class _Pages:
    """The pages that a program works on, by their numbers."""

    def __init__(self, spec: KvmSpec) -> None:
        self.parts: list[_Part] = []
        self.total = 0
        places = spec.places
        for gpa, count in spec.areas:
            region = max(index for index, place in enumerate(places) if place <= gpa)
            row = (gpa - places[region]) // PAGE_SIZE
            self.parts.append(_Part(self.total, self.total + count, gpa, region, row))
            self.total += count

    def index(self, number: int) -> int:
        """The area of a page."""
        return next(index for index, part in enumerate(self.parts) if number < part.end)

    def gpa(self, number: int) -> int:
        part = self.parts[self.index(number)]
        return part.gpa + (number - part.first) * PAGE_SIZE

    def number(self, region: int, gfn: int) -> int | None:
        """Of the page at this place; None where the program does not work."""
        for part in self.parts:
            if part.region == region and part.row <= gfn < part.row + part.end - part.first:
                return part.first + gfn - part.row
        return None

    def name(self, spec: KvmSpec, number: int) -> str:
        part = self.parts[self.index(number)]
        return f"{spec.geometry[part.region].name} gfn {part.row + number - part.first}: page {number}"

    def store(self, memory: Memory, numbers: Numbers, word: int, values: U32) -> None:
        """(n, k) u32 to the pages of these numbers, which ascend, from u32 `word` of the page on."""
        for part in self.parts:
            start, end = np.searchsorted(numbers, (part.first, part.end))
            rows = numbers[start:end] + (part.row - part.first)
            memory[part.region].view(np.uint32)[rows, word : word + values.shape[1]] = values[start:end]

    def load(self, memory: Memory, word: int, count: int) -> U32:
        """(total, count) u32 from u32 `word` of every page on."""
        return np.concatenate([
            memory[part.region][part.row : part.row + part.end - part.first].view(np.uint32)[:, word : word + count]
            for part in self.parts
        ])  # fmt: skip


# --- the programs


class _End(NamedTuple):
    """What a vCPU leaves beside its pages: its block from byte 8 on, its registers, its lines."""

    block: list[int]
    registers: dict[str, int]
    lines: list[bytes]


def _counter(spec: KvmSpec, pages: _Pages, vcpu: int, done: int, memory: Memory) -> _End:
    most = min(pages.total, 1024)
    rounds, position = divmod(done * BATCH, most)
    numbers = np.arange(most if rounds else position)
    counts = np.where(numbers < position, rounds + 1, rounds) & _MASK
    pages.store(memory, numbers, _SLOT * vcpu, counts.astype(np.uint32)[:, None])

    index = pages.index(position)
    end = min(pages.parts[index].end, most)
    cursor = pages.gpa(position) + VCPU_BLOCK_BYTES * vcpu
    block = [cursor, end - position, most - end, _AREAS + 8 * (index + 1)]
    registers = dict(zip(("rdi", "rsi", "rcx", "rbx"), block, strict=True))
    return _End(block, registers, _lines(b"C", spec, vcpu, done, lambda batch: -(-batch * BATCH // most)))


_K1, _K2, _K3, _K4 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F


def _patterns(spec: KvmSpec, pages: _Pages, vcpu: int, done: int, memory: Memory) -> _End:
    numbers = np.arange(vcpu, pages.total, spec.vcpus)
    if not len(numbers):
        return _End([], {"rbx": vcpu}, _lines(b"P", spec, vcpu, done, lambda batch: 0))
    rounds = _rounds(len(numbers), done * BATCH)
    written = np.flatnonzero(rounds)
    header = np.empty((len(written), 4), dtype=np.uint32)
    header[:, 0], header[:, 1], header[:, 2] = numbers[written], rounds[written], vcpu
    header[:, 3] = _checksums(header)
    for word in _HEADERS:
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


_HEADERS = (0, (PAGE_SIZE - 16) // 4)  # the u32 at which the two headers of a page begin


def _rounds(owned: int, writes: int) -> Numbers:
    """The rounds of a vCPU's pages after so many writes."""
    before, position = divmod(writes, owned)
    return np.where(np.arange(owned) < position, before + 1, before)


def _key(number: int, vcpu: int) -> int:
    return (_rotated(number * _K2 & _MASK, 13) + vcpu * _K3) & _MASK


def _checksums(header: U32) -> U32:
    """The checksum that each of these headers must have."""
    number, rounds, vcpu = header[:, 0], header[:, 1], header[:, 2]
    keys = _rotated_all(rounds * np.uint32(_K2), 13) + vcpu * np.uint32(_K3)
    sums: U32 = _rotated_all((number * np.uint32(_K1)) ^ keys, 15) * np.uint32(_K4)
    return sums


_A, _C = 1664525, 1013904223
_CHUNK = 1 << 20


def _random(spec: KvmSpec, pages: _Pages, vcpu: int, done: int, memory: Memory) -> _End:
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
    pages.store(memory, touched, _SLOT * vcpu, slots[:, touched].T)

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


_PROGRAMS: Mapping[str, Callable[[KvmSpec, _Pages, int, int, Memory], _End]] = {
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


# --- what is wrong


def differing(expected: Expected, memory: Memory, spec: KvmSpec) -> list[str]:
    """At most 10 sentences that name pages of `memory` that are not as expected; none if all are. Raises GuestError if
    it is not the memory of such a guest."""
    shapes = [rows.shape for rows in memory]
    if shapes != [rows.shape for rows in expected.memory]:
        raise GuestError(f"memory of {shapes} is not that of {spec.geometry}")
    pages = _Pages(spec)
    found = []
    for region, (right, given) in enumerate(zip(expected.memory, memory, strict=True)):
        for gfn in _wrong_rows(right, given):
            number = pages.number(region, gfn)
            if number is None:
                name = f"{spec.geometry[region].name} gfn {gfn}: {_low_name(region, gfn)}"
            else:
                name = pages.name(spec, number)
            found.append(f"{name} {_difference(spec, number, right[gfn], given[gfn])}")
            if len(found) == _MOST_NAMED:
                return found
    return found


def check_patterns(spec: KvmSpec, memory: Memory) -> list[str]:
    """At most 10 sentences that name pages of a `patterns` guest which cannot be at any mark; none if all can.

    The pages of a vCPU are in its round up to where it is, from there on in the round before. Where it is, its own
    block says to a batch. Raises GuestError for other programs.
    """
    if spec.program != "patterns":
        raise GuestError(f"pages of the program {spec.program} do not say what they are")
    pages = _Pages(spec)
    headers, copies = (pages.load(memory, word, 4) for word in _HEADERS)
    numbers = np.arange(pages.total)
    blank = ~headers.any(axis=1)
    rounds = headers[:, 1].astype(np.int64)
    right = headers == np.stack([numbers, rounds, numbers % spec.vcpus, _checksums(headers)], axis=1)
    torn = (headers != copies).any(axis=1)
    sound = ~torn & (blank | right.all(axis=1))
    problems: dict[int, str] = {}
    for number in np.flatnonzero(~sound)[:_MOST_NAMED]:
        if torn[number]:
            problems[int(number)] = "has two headers that differ"
        else:
            wrong = [name for name, good in zip(_FIELDS, right[number], strict=True) if not good]
            problems[int(number)] = f"has the wrong {' and '.join(wrong)}"
    for vcpu, done in enumerate(batches_of(spec, memory)):
        own = numbers[vcpu :: spec.vcpus]
        _check_rounds(problems, vcpu, own, rounds[own], sound[own], done * BATCH)
    return [
        f"{pages.name(spec, number)} {problem}; {_claim(headers[number])}"
        for number, problem in sorted(problems.items())[:_MOST_NAMED]
    ]


_FIELDS = ("number", "round", "vCPU", "checksum")


def _check_rounds(
    problems: dict[int, str], vcpu: int, numbers: Numbers, rounds: Numbers, sound: npt.NDArray[np.bool_], writes: int
) -> None:
    """Those of a vCPU's sound pages whose rounds cannot be, when it had made `writes` writes at its last mark."""
    if not len(numbers):
        return
    at_mark, at_next = _rounds(len(numbers), writes), _rounds(len(numbers), writes + BATCH)
    possible = sound & (rounds <= at_next)
    newest = int(rounds[possible].max(initial=0))
    last = int(np.flatnonzero(possible & (rounds == newest)).max(initial=0))
    places = np.arange(len(numbers))
    for wrong, problem in (
        (rounds < at_mark, f"is too old: vCPU {vcpu} had written it anew before its last mark"),
        (rounds > at_next, f"is too new: vCPU {vcpu} cannot have come to it again"),
        (rounds < newest - 1, f"is too old: vCPU {vcpu} is in round {newest}"),
        ((rounds < newest) & (places < last), f"is too old: page {numbers[last]} after it is in round {newest}"),
    ):
        for place in np.flatnonzero(sound & wrong)[:_MOST_NAMED]:
            problems.setdefault(int(numbers[place]), problem)


def _wrong_rows(right: npt.NDArray[np.uint8], given: npt.NDArray[np.uint8]) -> list[int]:
    found: list[int] = []
    step = 4096
    for start in range(0, len(right), step):
        one, other = right[start : start + step].view(np.uint64), given[start : start + step].view(np.uint64)
        if not np.array_equal(one, other):
            found += (np.flatnonzero((one != other).any(axis=1)) + start).tolist()
        if len(found) >= _MOST_NAMED:
            break
    return found[:_MOST_NAMED]


def _low_name(region: int, gfn: int) -> str:
    """What is kept on a page that no program works on."""
    gpa = gfn * PAGE_SIZE
    if region or gpa < BOOT_BLOCK or gpa >= WORK:
        return "an unused page"
    starts = ((LINES, "line buffers"), (CODE, "code"), (LOCK, "lock"), (VCPU_BLOCKS, "vCPU blocks"))
    return next((name for start, name in starts if gpa >= start), "boot block")


def _difference(spec: KvmSpec, number: int | None, right: npt.NDArray[np.uint8], given: npt.NDArray[np.uint8]) -> str:
    """How a page differs from the right one."""
    byte = int(np.flatnonzero(right != given)[0])
    text = f"differs from byte {byte} on: {given[byte]:#04x}, not {right[byte]:#04x}"
    if number is None:
        return text
    words, given_words = right.view(np.uint32), given.view(np.uint32)
    if spec.program == "patterns":
        first, second = (given_words[word : word + 4] for word in _HEADERS)
        claim = _claim(first) if np.array_equal(first, second) else f"{_claim(first)}, below {_claim(second)}"
        return f"{text}; {claim}, and must be in round {words[1]}"
    vcpu, word = divmod(byte // 4, _SLOT)
    if spec.program == "counter" and vcpu < spec.vcpus and word == 0:
        return f"{text}; vCPU {vcpu} has counted to {given_words[byte // 4]}, not {words[byte // 4]}"
    if spec.program == "random" and vcpu < spec.vcpus and word < 4:
        (writes, last), (all_writes, end) = (of[_SLOT * vcpu + 2 : _SLOT * vcpu + 4] for of in (given_words, words))
        return (
            f"{text}; vCPU {vcpu} has written it {writes} times, last in round {last}, not {all_writes} times, last in"
            f" round {end}"
        )
    return text


def _claim(header: U32) -> str:
    """What a page of `patterns` says of itself."""
    if not header.any():
        return "it says nothing"
    good = "good" if _checksums(header[None])[0] == header[3] else "bad"
    return f"it says page {header[0]}, round {header[1]}, vCPU {header[2]}, checksum {good}"


# --- kv


_ID = re.compile(rb". ([0-9a-f]{8})", re.DOTALL)
_SET = re.compile(rb"S [0-9a-f]{8} ([0-9a-f]{8}) ([0-9a-f]{8})\n")
_GET = re.compile(rb"G [0-9a-f]{8} ([0-9a-f]{8})\n")
_ENTRIES = 256  # keys of a page


class Store:
    """What `kv` must answer, request by request. `entries`: key to (value, times set)."""

    def __init__(self, spec: KvmSpec) -> None:
        self.entries: dict[int, tuple[int, int]] = {}
        self._keys = _Pages(spec).total * _ENTRIES

    def answer(self, line: bytes) -> bytes:
        """The reply to one line of input, which has its end."""
        named = _ID.match(line)
        if not named:
            return b"! --------\n"
        setting = _SET.fullmatch(line)
        request = setting or _GET.fullmatch(line)
        key = int(request[1], 16) if request else -1
        if not 0 <= key < self._keys:
            return b"! %s\n" % named[1]
        value, times = self.entries.get(key, (0, 0))
        if setting:
            value, times = self.entries[key] = int(setting[2], 16), times + 1
        return b"= %s %08x %08x %08x\n" % (named[1], key, value, times)
