"""Which pages of a kvm guest are wrong, in words: beside its model, or (`patterns`) by what they say of themselves.

Pure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError
from ckptd.guests.kvm.model import HEADERS, SLOT, Expected, batches_of, checksums, rounds_of
from ckptd.guests.kvm.pages import U32, Memory, Numbers, Pages
from ckptd.guests.kvm.spec import BATCH, BOOT_BLOCK, CODE, LINES, LOCK, VCPU_BLOCKS, WORK, KvmSpec
from ckptd.units import PAGE_SIZE

__all__ = ["check_patterns", "differing"]

_MOST_NAMED = 10


def differing(expected: Expected, memory: Memory, spec: KvmSpec) -> list[str]:
    """At most 10 sentences that name pages of `memory` that are not as expected; none if all are. Raises GuestError if
    it is not the memory of such a guest."""
    shapes = [rows.shape for rows in memory]
    if shapes != [rows.shape for rows in expected.memory]:
        raise GuestError(f"memory of {shapes} is not that of {spec.geometry}")
    pages = Pages(spec)
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
    pages = Pages(spec)
    headers, copies = (pages.load(memory, word, 4) for word in HEADERS)
    numbers = np.arange(pages.total)
    blank = ~headers.any(axis=1)
    rounds = headers[:, 1].astype(np.int64)
    right = headers == np.stack([numbers, rounds, numbers % spec.vcpus, checksums(headers)], axis=1)
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
    at_mark, at_next = rounds_of(len(numbers), writes), rounds_of(len(numbers), writes + BATCH)
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
        first, second = (given_words[word : word + 4] for word in HEADERS)
        claim = _claim(first) if np.array_equal(first, second) else f"{_claim(first)}, below {_claim(second)}"
        return f"{text}; {claim}, and must be in round {words[1]}"
    vcpu, word = divmod(byte // 4, SLOT)
    if spec.program == "counter" and vcpu < spec.vcpus and word == 0:
        return f"{text}; vCPU {vcpu} has counted to {given_words[byte // 4]}, not {words[byte // 4]}"
    if spec.program == "random" and vcpu < spec.vcpus and word < 4:
        (writes, last), (all_writes, end) = (of[SLOT * vcpu + 2 : SLOT * vcpu + 4] for of in (given_words, words))
        return (
            f"{text}; vCPU {vcpu} has written it {writes} times, last in round {last}, not {all_writes} times, last in"
            f" round {end}"
        )
    return text


def _claim(header: U32) -> str:
    """What a page of `patterns` says of itself."""
    if not header.any():
        return "it says nothing"
    good = "good" if checksums(header[None])[0] == header[3] else "bad"
    return f"it says page {header[0]}, round {header[1]}, vCPU {header[2]}, checksum {good}"
