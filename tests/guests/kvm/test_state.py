"""A blob is refused whole, or taken whole: whatever byte, size, key or version is wrong. No KVM is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import GuestError
from ckptd.guests.kvm import abi
from ckptd.guests.kvm import state as module
from ckptd.guests.kvm.cpuid import lacking
from ckptd.guests.kvm.registers import Layout
from ckptd.guests.kvm.spec import KvmSpec
from ckptd.guests.kvm.state import State, VcpuState, decode, encode
from ckptd.memory.regions import Geometry


def cpuid(*entries: tuple[int, int, int, int, int, int]) -> bytes:
    """struct kvm_cpuid2 of (leaf, subleaf, eax, ebx, ecx, edx)."""
    packed = b"".join(abi.CPUID_ENTRY.pack(leaf, sub, 0, *rest) for leaf, sub, *rest in entries)
    return abi.CPUID_HEAD.pack(len(entries), 0) + packed


def vcpu(index: int) -> VcpuState:
    parts = {name: bytes([index + 1]) * size for name, size in Layout(4096, (0x10, 0x174)).sizes.items()}
    parts["msrs"] = abi.MSRS_HEAD.pack(2, 0) + abi.MSR_ENTRY.pack(0x10, 0, 5) + abi.MSR_ENTRY.pack(0x174, 0, 6)
    return VcpuState(parts, latch=7, pending=b"p", marks=3, halted=bool(index))


STATE = State(
    KvmSpec(Geometry.of(ram=64, rom=1), "patterns", 2, seed=9), cpuid((1, 0, 1, 2, 3, 4)), bytes(48), b"typed", 1234,
    "", (vcpu(0), vcpu(1)),
)  # fmt: skip
BLOB = encode(STATE)


def test_it_comes_back_as_it_was() -> None:
    assert decode(BLOB) == STATE


@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_a_changed_byte_anywhere_is_refused(at: int, change: int) -> None:
    damaged = bytearray(BLOB)
    damaged[at] ^= change
    with pytest.raises(GuestError):
        decode(bytes(damaged))


@given(st.integers(0, len(BLOB) - 1))
def test_a_blob_that_is_cut_or_has_a_tail_is_refused(length: int) -> None:
    with pytest.raises(GuestError):
        decode(BLOB[:length])
    with pytest.raises(GuestError):
        decode(BLOB + BLOB[:length] + b"x")


def test_another_version_says_so() -> None:
    other = BLOB[:8] + (2).to_bytes(2, "little") + BLOB[10:]
    with pytest.raises(GuestError, match="version 2, not 1") as raised:
        decode(other)
    assert raised.value.hint == "run the same ckptd on both hosts"


def sealed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The state with something changed, and a sum that fits: what a forger or another release would send."""
    raw = msgpack.unpackb(BLOB[module._PAYLOAD_AT :])
    change(raw)
    payload = msgpack.packb(raw)
    head = module._HEAD.pack(BLOB[:8], module.VERSION, 0, len(payload))
    return head + module._sum(head, payload) + payload


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a key lacks": (lambda raw: raw.pop("clock"), "clock"),
    "a key too many": (lambda raw: raw.update(more=1), "more"),
    "too few vCPUs": (lambda raw: raw["vcpus"].pop(), "1 vCPUs, its guest 2"),
    "a part lacks": (lambda raw: raw["vcpus"][1]["parts"].pop("sregs"), "vCPU 1 lacks or adds sregs"),
    "a part is short": (lambda raw: raw["vcpus"][1]["parts"].update(regs=b"12"), "regs of vCPU 1 is 2 bytes, not 144"),
    "a part is text": (lambda raw: raw["vcpus"][0]["parts"].update(xcrs="x"), "xcrs of vCPU 0 is str"),
    "xsave is short": (lambda raw: raw["vcpus"][0]["parts"].update(xsave=b""), "xsave of vCPU 0 is 0 bytes"),
    "MSRs lie about their number": (
        lambda raw: raw["vcpus"][0]["parts"].update(msrs=abi.MSRS_HEAD.pack(1 << 30, 0)), "wrong"
    ),
    "cpuid lies about its number": (lambda raw: raw.update(cpuid=abi.CPUID_HEAD.pack(3, 0)), "another length"),
    "the clock is short": (lambda raw: raw.update(clock=b""), "clock is 0 bytes, not 48"),
    "a count is negative": (lambda raw: raw.update(written=-1), "written is -1"),
    "a count is none": (lambda raw: raw["vcpus"][0].update(marks=None), "marks is None"),
    "halted is a number": (lambda raw: raw["vcpus"][0].update(halted=1), "neither true nor false"),
    "the program is unknown": (lambda raw: raw["spec"].update(program="doom"), "no program 'doom'"),
    "memory lacks": (lambda raw: raw["spec"].update(regions=[]), "wrong"),
    "the spec has another key": (lambda raw: raw["spec"].update(turbo=True), "turbo"),
    "it is a list": (lambda raw: raw.update(vcpus=7), "wrong"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_sealed_but_wrong_is_refused_by_name(what: str) -> None:
    change, said = WRONG[what]
    with pytest.raises(GuestError, match=said) as raised:
        decode(sealed(change))
    assert raised.value.hint == "nothing of it was loaded"


def test_a_host_that_lacks_what_the_guest_has_seen_is_told_apart() -> None:
    seen = cpuid((1, 0, 0xF0, 0, 0b1011, 0b11), (7, 0, 0, 0b100, 0, 0), (0x16, 0, 9, 9, 9, 9))
    assert lacking(seen, seen) == []
    richer = cpuid((1, 0, 0xE0, 5, 0b1111, 0b111), (7, 0, 0, 0b110, 1, 1))
    assert lacking(seen, richer) == []  # models and frequencies may differ
    poorer = cpuid((1, 0, 0xF0, 0, 0b1010, 0b11))
    assert lacking(seen, poorer) == ["leaf 0x1 ecx 0x1", "leaf 0x7 ebx 0x4"]
