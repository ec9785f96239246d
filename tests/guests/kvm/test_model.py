"""The model against the programs written down once more, write by write; and what it says of wrong memory."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import GuestError
from ckptd.guests.kvm.differences import check_patterns, differing
from ckptd.guests.kvm.model import Expected, batches_of, predict
from ckptd.guests.kvm.programs import image_of
from ckptd.guests.kvm.spec import BATCH, LINES, VCPU_BLOCKS, KvmSpec
from ckptd.guests.kvm.store import Store
from ckptd.memory.regions import Geometry, Region
from ckptd.units import PAGE_SIZE

pytestmark = pytest.mark.skipif(
    not (shutil.which("as") and shutil.which("ld")), reason="GNU as and ld are not here (apt-get install binutils)"
)

M = 0xFFFFFFFF
AREAS = 0x1020


def rol(x: int, by: int) -> int:
    return (x << by | x >> (32 - by)) & M


class Naive:
    """One vCPU after the other, one write after the other, as the sources say."""

    def __init__(self, spec: KvmSpec, batches: list[int]) -> None:
        self.spec = spec
        self.memory: defaultdict[int, int] = defaultdict(int)  # u32 by address
        self.text: dict[int, bytes] = {}
        self.pages = [(gpa + PAGE_SIZE * page) for gpa, count in spec.areas for page in range(count)]
        self.areas = [index for index, (_, count) in enumerate(spec.areas) for _ in range(count)]
        self.registers: list[dict[str, int]] = []
        self.lines: list[list[bytes]] = []
        for vcpu, done in enumerate(batches):
            self.lines.append([])
            registers = dict.fromkeys(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"), 0)
            if done:
                found = getattr(self, spec.program)(vcpu, done)
                registers |= {"rax": 1, "rdx": 0x600, "rbp": VCPU_BLOCKS + 64 * vcpu, **found}
            else:
                registers |= {"rax": vcpu, "rbx": 0x1000}
            self.registers.append(registers)

    def end_batch(self, vcpu: int, batch: int, letter: str, value: int, *block: int) -> None:
        every = self.spec.output_every
        for index, word in enumerate((batch, every - batch % every, *block)):
            self.memory[VCPU_BLOCKS + 64 * vcpu + 4 * index] = word
        if batch % every == 0:
            line = f"{letter} {vcpu:02x} {batch:08x} {value:08x}\n".encode()
            self.lines[vcpu].append(line)
            self.text[LINES + 256 * vcpu] = line

    def counter(self, vcpu: int, done: int) -> dict[str, int]:
        pages = self.pages[:1024]
        at = 0
        state: tuple[int, int, int, int] = (0, 0, 0, 0)
        for batch in range(1, done + 1):
            for _ in range(BATCH):
                self.memory[pages[at] + 64 * vcpu] += 1
                at = (at + 1) % len(pages)
            area = self.areas[at]
            left = sum(1 for page in range(at, len(pages)) if self.areas[page] == area)
            state = (pages[at] + 64 * vcpu, left, len(pages) - at - left, AREAS + 8 * (area + 1))
            self.end_batch(vcpu, batch, "C", self.memory[pages[0] + 64 * vcpu], *state)
        return dict(zip(("rdi", "rsi", "rcx", "rbx"), state, strict=True))

    def patterns(self, vcpu: int, done: int) -> dict[str, int]:
        def key(number: int) -> int:
            return (rol(number * 0x85EBCA6B & M, 13) + vcpu * 0xC2B2AE35) & M if number else 0

        number, current = vcpu, 1
        if vcpu >= len(self.pages):
            for batch in range(1, done + 1):
                self.end_batch(vcpu, batch, "P", 0)
            return {"rbx": vcpu}
        for batch in range(1, done + 1):
            for _ in range(BATCH):
                checksum = rol((number * 0x9E3779B1 & M) ^ key(current), 15) * 0x27D4EB2F & M
                for copy in (0, 4080):
                    for index, word in enumerate((number, current, vcpu, checksum)):
                        self.memory[self.pages[number] + copy + 4 * index] = word
                number += self.spec.vcpus
                if number >= len(self.pages):
                    number, current = vcpu, current + 1
            area = self.areas[number]
            end = sum(count for _, count in self.spec.areas[: area + 1])
            words = (self.pages[number], number, current, key(current), key(current - 1), AREAS + 8 * area, end)
            self.end_batch(vcpu, batch, "P", current, *words, PAGE_SIZE * self.spec.vcpus)
        return {"rdi": self.pages[number], "rsi": number, "rcx": current, "rbx": vcpu}

    def random(self, vcpu: int, done: int) -> dict[str, int]:
        x = (self.spec.seed_word + vcpu * 0x9E3779B9) & M
        x ^= x >> 16
        x = x * 0x85EBCA6B & M
        x ^= x >> 13
        x = x * 0xC2B2AE35 & M
        x ^= x >> 16
        count = 0
        for batch in range(1, done + 1):
            for _ in range(BATCH):
                x = (x * 1664525 + 1013904223) & M
                count += 1
                slot = self.pages[x * len(self.pages) >> 32] + 64 * vcpu
                self.memory[slot] = (self.memory[slot] + x) & M
                self.memory[slot + 4] ^= rol(count, 16)
                self.memory[slot + 8] += 1
                self.memory[slot + 12] = count
            self.end_batch(vcpu, batch, "R", x, x, count)
        return {"rsi": x, "rdi": count, "rbx": 64 * vcpu}

    def arrays(self) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
        found = [bytearray(region.size_bytes) for region in self.spec.geometry]
        pieces = [(gpa, struct.pack("<I", word)) for gpa, word in self.memory.items()]
        for gpa, data in [*image_of(self.spec), *self.text.items(), *pieces]:
            region = max(index for index, place in enumerate(self.spec.places) if place <= gpa)
            start = gpa - self.spec.places[region]
            found[region][start : start + len(data)] = data
        return [np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_SIZE) for data in found]


@st.composite
def guests(draw: st.DrawFn, *programs: str) -> tuple[KvmSpec, list[int]]:
    first = draw(st.integers(32, 80))
    more = draw(st.lists(st.integers(1, 70), max_size=3))
    geometry = Geometry((Region("low", first), *(Region(f"r{index}", pages) for index, pages in enumerate(more))))
    vcpus = draw(st.sampled_from((1, 1, 2, 3, 20)))
    spec = KvmSpec(
        geometry,
        draw(st.sampled_from(programs or ("counter", "patterns", "random"))),
        vcpus,
        draw(st.integers(0, (1 << 63) - 1)),
        output_every=draw(st.integers(1, 5)),
    )
    batches = draw(st.lists(st.integers(0, 12 if vcpus < 4 else 3), min_size=vcpus, max_size=vcpus))
    return spec, batches


@settings(deadline=None, max_examples=100)
@given(guests())
def test_the_model_is_the_program_write_by_write(guest: tuple[KvmSpec, list[int]]) -> None:
    spec, batches = guest
    expected, naive = predict(spec, batches), Naive(spec, batches)
    assert differing(expected, naive.arrays(), spec) == []
    assert all(np.array_equal(one, other) for one, other in zip(expected.memory, naive.arrays(), strict=True))
    assert expected.registers == naive.registers
    assert expected.lines == naive.lines
    assert batches_of(spec, expected.memory) == batches


def test_more_pages_than_counter_uses() -> None:
    spec = KvmSpec(Geometry.of(low=700, r0=300, r1=400), "counter", 2, output_every=7)
    expected, naive = predict(spec, [40, 15]), Naive(spec, [40, 15])
    assert differing(expected, naive.arrays(), spec) == []
    assert (expected.registers, expected.lines) == (naive.registers, naive.lines)


def test_more_vcpus_than_pages() -> None:
    spec = KvmSpec(Geometry.of(ram=32), "patterns", 18, output_every=2)
    batches = [index % 4 for index in range(18)]
    expected, naive = predict(spec, batches), Naive(spec, batches)
    assert differing(expected, naive.arrays(), spec) == check_patterns(spec, naive.arrays()) == []
    assert (expected.registers, expected.lines) == (naive.registers, naive.lines)
    assert expected.lines[17] == []
    assert predict(spec, [2] * 18).lines[17] == [b"P 11 00000002 00000000\n"]


def test_the_functions_themselves_do_not_change() -> None:
    """A guest of an earlier version must go on as it would have there."""
    digests = {}
    for program in ("counter", "patterns", "random"):
        expected = predict(KvmSpec(Geometry.of(low=60, ram=50), program, 2, seed=5), [100, 37])
        work = np.concatenate([expected.memory[0][16:], expected.memory[1]])
        digests[program] = (zlib.crc32(work.tobytes()), expected.lines[1][-1])
    assert digests == {
        "counter": (2381444287, b"C 01 00000020 00000016\n"),
        "patterns": (1187911901, b"P 01 00000020 0000002c\n"),
        "random": (3411742486, b"R 01 00000020 512079c1\n"),
    }


def test_a_million_rounds() -> None:
    """In a chunk and a bit, so that chunks join."""
    spec = KvmSpec(Geometry.of(ram=4096), "random", seed=9, output_every=1000)
    expected = predict(spec, [(1 << 20) // BATCH + 1000])
    slots = expected.memory[0][16:].view(np.uint32)[:, :4]
    assert int(slots[:, 2].sum()) == (1 << 20) + 1000 * BATCH == int(slots[:, 3].max()) == expected.registers[0]["rdi"]
    x = int(expected.lines[0][-1][-9:-1], 16)
    for _ in range(((1 << 20) // BATCH + 1000) % 1000 * BATCH):  # since the last line
        x = (x * 1664525 + 1013904223) & M
    assert x == expected.registers[0]["rsi"]


def test_what_cannot_be_predicted() -> None:
    geometry = Geometry.of(ram=32)
    with pytest.raises(GuestError, match="kv does not run by itself"):
        predict(KvmSpec(geometry, "kv"), [1])
    for batches in ([], [1, 2, 3], [1, -1]):
        with pytest.raises(GuestError, match="no batches of 2 vCPUs"):
            predict(KvmSpec(geometry, "random", 2), batches)
    with pytest.raises(GuestError, match="is not that of ram 128 KiB"):
        spec = KvmSpec(geometry)
        differing(predict(spec, [1]), predict(KvmSpec(Geometry.of(ram=33)), [1]).memory, spec)
    with pytest.raises(GuestError, match="program counter do not say what they are"):
        check_patterns(KvmSpec(geometry, "counter"), [])


# --- what is wrong


@settings(deadline=None, max_examples=60)
@given(guests(), st.data())
def test_one_wrong_byte_is_named(guest: tuple[KvmSpec, list[int]], data: st.DataObject) -> None:
    spec, batches = guest
    expected = predict(spec, batches)
    memory = [rows.copy() for rows in expected.memory]
    region = data.draw(st.integers(0, len(memory) - 1))
    gfn, byte = data.draw(st.integers(0, len(memory[region]) - 1)), data.draw(st.integers(0, PAGE_SIZE - 1))
    memory[region][gfn, byte] ^= data.draw(st.integers(1, 255))
    found = differing(expected, memory, spec)
    assert len(found) == 1
    assert found[0].startswith(f"{spec.geometry[region].name} gfn {gfn}: ")
    assert f" byte {byte} " in found[0]


@pytest.mark.parametrize(
    ("gfn", "name"),
    [
        (0, "an unused page"), (1, "boot block"), (2, "vCPU blocks"), (3, "lock"), (4, "code"), (7, "code"),
        (8, "line buffers"), (15, "line buffers"), (16, "page 0"),
    ],
)  # fmt: skip
def test_places_have_names(gfn: int, name: str) -> None:
    spec, expected, memory = example("random")
    memory[0][gfn, 9] ^= 1
    assert differing(expected, memory, spec)[0].startswith(f"low gfn {gfn}: {name} differs from byte 9 on: ")


def example(program: str) -> tuple[KvmSpec, Expected, list[np.ndarray[Any, np.dtype[np.uint8]]]]:
    spec = KvmSpec(Geometry.of(low=60, ram=30), program, 2, output_every=4)
    expected = predict(spec, [9, 7])
    return spec, expected, [rows.copy() for rows in expected.memory]


def test_what_differs_is_told_in_the_program_s_own_terms() -> None:
    spec, expected, memory = example("counter")
    memory[1][3] = predict(spec, [8, 7]).memory[1][3]
    assert differing(expected, memory, spec) == [
        "ram gfn 3: page 47 differs from byte 0 on: 0x07, not 0x08; vCPU 0 has counted to 7, not 8"
    ]
    spec, expected, memory = example("patterns")
    memory[1][3] = predict(spec, [7, 6]).memory[1][3]
    assert differing(expected, memory, spec) == [
        "ram gfn 3: page 47 differs from byte 4 on: 0x0a, not 0x0c;"
        " it says page 47, round 10, vCPU 1, checksum good, and must be in round 12"
    ]
    spec, expected, memory = example("random")
    memory[1][3] = predict(spec, [9, 5]).memory[1][3]
    assert "; vCPU 1 has written it " in differing(expected, memory, spec)[0]
    assert " last in round " in differing(expected, memory, spec)[0]


def test_at_most_ten_are_named() -> None:
    spec, expected, memory = example("patterns")
    wrong = [rows ^ np.uint8(1) for rows in memory]
    assert len(differing(expected, wrong, spec)) == 10
    assert len(check_patterns(spec, [memory[0], wrong[1]])) == 10


@settings(deadline=None, max_examples=60)
@given(guests("patterns"), st.data())
def test_patterns_are_checked_without_a_prediction(guest: tuple[KvmSpec, list[int]], data: st.DataObject) -> None:
    """Good at every mark; a wrong bit in a header is found, and so is every page that is missing its last writes."""
    spec, batches = guest
    memory = [rows.copy() for rows in predict(spec, batches).memory]
    assert check_patterns(spec, memory) == []

    at = data.draw(st.integers(0, sum(pages for _, pages in spec.areas) - 1))
    region, gfn = [(r, g) for r, rows in enumerate(memory) for g in range(len(rows)) if r or g >= 16][at]
    byte = data.draw(st.sampled_from([*range(16), *range(4080, 4096)]))
    memory[region][gfn, byte] ^= 1 << data.draw(st.integers(0, 7))
    found = check_patterns(spec, memory)
    assert len(found) == 1
    assert found[0].startswith(f"{name_of(spec, region, gfn)}: page {at} ")


def name_of(spec: KvmSpec, region: int, gfn: int) -> str:
    return f"{spec.geometry[region].name} gfn {gfn}"


@settings(deadline=None, max_examples=40)
@given(guests("patterns"), st.data())
def test_patterns_of_another_time_are_found(guest: tuple[KvmSpec, list[int]], data: st.DataObject) -> None:
    spec, batches = guest
    now, soon = (predict(spec, [done + more for done in batches]).memory for more in (0, 1))
    others = [max(0, done + data.draw(st.sampled_from((-9, -2, -1, 2, 9)))) for done in batches]
    other = predict(spec, others).memory
    # What the batch under way may have written is right, too.
    places = [
        (region, gfn)
        for region, rows in enumerate(now)
        for gfn in range(0 if region else 16, len(rows))
        if all((of[region][gfn] != other[region][gfn]).any() for of in (now, soon))
    ]
    if not places:
        return
    region, gfn = data.draw(st.sampled_from(places))
    memory = [rows.copy() for rows in now]
    memory[region][gfn] = other[region][gfn]
    assert any(text.startswith(f"{name_of(spec, region, gfn)}: ") for text in check_patterns(spec, memory))


def test_what_is_wrong_with_patterns_is_told() -> None:
    spec, _, good = example("patterns")

    def problem(change: Any) -> str:
        memory = [rows.copy() for rows in good]
        change(memory[1])
        (text,) = check_patterns(spec, memory)
        return text

    def other_page(rows: Any) -> None:
        rows[3] = rows[5]

    def torn(rows: Any) -> None:
        rows[3, 4080:] = 0

    def number(rows: Any) -> None:
        rows[3, (0, 4080)] += 2

    def older(rows: Any) -> None:
        rows[3] = predict(spec, [8, 6]).memory[1][3]

    def newer(rows: Any) -> None:
        rows[29] = predict(spec, [11, 9]).memory[1][29]

    start = "ram gfn 3: page 47 "
    assert problem(other_page) == start + "has the wrong number; it says page 49, round 12, vCPU 1, checksum good"
    assert problem(torn) == start + "has two headers that differ; it says page 47, round 12, vCPU 1, checksum good"
    assert problem(number).startswith(start + "has the wrong number and checksum; it says page 49, round 12")
    assert problem(older).startswith(start + "is too old: vCPU 1 had written it anew before its last mark; it says")
    assert problem(newer).startswith("ram gfn 29: page 73 is too new: vCPU 1 cannot have come to it again")


# --- kv


def test_the_store() -> None:
    store = Store(KvmSpec(Geometry.of(low=20 + 16, ram=4), "kv"))
    for request, reply in (
        (b"G 00000001 00000005\n", b"= 00000001 00000005 00000000 00000000\n"),
        (b"S 00000002 00000005 deadbeef\n", b"= 00000002 00000005 deadbeef 00000001\n"),
        (b"S 00000003 00000005 00000000\n", b"= 00000003 00000005 00000000 00000002\n"),
        (b"G ffffffff 00000005\n", b"= ffffffff 00000005 00000000 00000002\n"),
        (b"G 00000004 000017ff\n", b"= 00000004 000017ff 00000000 00000000\n"),
        (b"G 00000005 00001800\n", b"! 00000005\n"),
        (b"S 00000006 ffffffff 00000000\n", b"! 00000006\n"),
    ):
        assert store.answer(request) == reply
    assert store.entries == {5: (0, 2)}


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (b"\n", b"! --------\n"),
        (b"hello\n", b"! --------\n"),
        (b"G 0000000\n", b"! --------\n"),
        (b"G 0000000A 00000005\n", b"! --------\n"),
        (b"G_00000001 00000005\n", b"! --------\n"),
        (b"G 00000001\n", b"! 00000001\n"),
        (b"G 00000001", b"! 00000001\n"),
        (b"X 00000001 00000005\n", b"! 00000001\n"),
        (b"G 00000001 0000000g\n", b"! 00000001\n"),
        (b"G 00000001 00000005 \n", b"! 00000001\n"),
        (b"G 00000001 00000005 00000006\n", b"! 00000001\n"),
        (b"G 00000001 00000005\r\n", b"! 00000001\n"),
        (b"S 00000001 00000005\n", b"! 00000001\n"),
        (b"S 00000001 00000005 0000000\n", b"! 00000001\n"),
        (b"S 00000001_00000005 00000006\n", b"! 00000001\n"),
        (b"S 00000001 00000005 00000006", b"! 00000001\n"),
    ],
)
def test_bad_requests(request_: bytes, reply: bytes) -> None:
    store = Store(KvmSpec(Geometry.of(ram=32), "kv"))
    assert store.answer(request_) == reply
    assert not store.entries
