"""The saved state of a kvm guest as bytes: all that is not memory, nor output in the gate.

    0    8  magic "CKPTKVM\\0"
    8    2  version           little-endian, as all numbers
    10   2  0
    12   4  length of what follows the header
    16  16  BLAKE2b-128 of the 16 bytes above and of what follows the header
    32      msgpack map: spec, cpuid, clock, input, written, stopped, vcpus

A blob is checked whole before any of it is given to KVM: magic, version, length, sum, every key, every size. The sum is
against damage; it does not tell who wrote the blob. Pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from ckptd.errors import CkptdError, GuestError
from ckptd.guests.kvm import abi
from ckptd.guests.kvm.cpuid import lacking
from ckptd.guests.kvm.registers import Layout
from ckptd.guests.kvm.spec import KvmSpec

__all__ = ["State", "VcpuState", "decode", "encode", "unfit"]

VERSION = 1
_MAGIC = b"CKPTKVM\0"
_HEAD = struct.Struct("<8sHHI")
_SUM_BYTES = 16
_PAYLOAD_AT = _HEAD.size + _SUM_BYTES
_MAX_PART = 1 << 20


@dataclass(frozen=True, slots=True)
class VcpuState:
    """One vCPU: what KVM holds of it (registers.py), and what our own devices do.

    `latch`: the argument on its control port; `pending`: bytes that it has transmitted and the gate has not taken;
    `marks`: how often it has passed one; `halted`: it has executed HLT.
    """

    parts: Mapping[str, bytes]
    latch: int = 0
    pending: bytes = b""
    marks: int = 0
    halted: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """A guest between two instructions. `input`: console input that it has not fetched; `written`: bytes that it has
    emitted; `stopped`: why it runs no more, empty if it runs."""

    spec: KvmSpec
    cpuid: bytes
    clock: bytes
    input: bytes
    written: int
    stopped: str
    vcpus: tuple[VcpuState, ...]


def encode(state: State) -> bytes:
    """The blob. About 6 KiB for each vCPU."""
    payload: bytes = msgpack.packb({
        "spec": state.spec.as_dict(), "cpuid": state.cpuid, "clock": state.clock, "input": state.input,
        "written": state.written, "stopped": state.stopped,
        "vcpus": [
            {"parts": dict(one.parts), "latch": one.latch, "pending": one.pending, "marks": one.marks,
             "halted": one.halted}
            for one in state.vcpus
        ],
    })  # fmt: skip
    head = _HEAD.pack(_MAGIC, VERSION, 0, len(payload))
    return head + _sum(head, payload) + payload


def decode(blob: bytes) -> State:
    """The state in a blob. Raises GuestError, naming the first thing that is wrong, if it is damaged or none."""
    if len(blob) < _PAYLOAD_AT or blob[:8] != _MAGIC:
        raise GuestError("this is not the saved state of a kvm guest")
    _, version, reserved, length = _HEAD.unpack_from(blob)
    if version != VERSION:
        raise GuestError(
            f"the saved state has version {version}, not {VERSION}", hint="run the same ckptd on both hosts"
        )
    head, payload = blob[: _HEAD.size], blob[_PAYLOAD_AT:]
    if reserved or length != len(payload) or _sum(head, payload) != blob[_HEAD.size : _PAYLOAD_AT]:
        raise GuestError("the saved state is damaged: its sum or length differs", hint="nothing of it was loaded")
    try:
        raw = msgpack.unpackb(payload, max_map_len=64, max_array_len=4096, max_str_len=4096, max_bin_len=_MAX_PART)
        return _checked(raw)
    except CkptdError as error:
        raise GuestError(f"the saved state is wrong: {error.message}", hint="nothing of it was loaded") from error
    except Exception as error:  # msgpack raises many kinds; a key that lacks, a type that differs
        raise GuestError(f"the saved state is wrong: {error!r}", hint="nothing of it was loaded") from error


def unfit(state: State, cpuid: bytes, xsave_bytes: int) -> str:
    """Why a host with this CPUID and XSAVE area cannot go on with the guest; empty if it can."""
    if missing := lacking(state.cpuid, cpuid):
        return f"this host's CPU or KVM lacks what the guest has seen: {', '.join(missing)}"
    for vcpu in state.vcpus:
        if (size := len(vcpu.parts["xsave"])) > xsave_bytes:
            return f"the vCPUs' XSAVE area has {size} bytes, and here {xsave_bytes}"
    return ""


def _checked(raw: dict[str, Any]) -> State:
    _keys(raw, {"spec", "cpuid", "clock", "input", "written", "stopped", "vcpus"}, "the state")
    spec = KvmSpec.from_dict(raw["spec"])
    cpuid, clock = _bytes(raw["cpuid"], "cpuid"), _bytes(raw["clock"], "clock", abi.CLOCK_SIZE)
    if len(cpuid) < abi.CPUID_HEAD.size or len(cpuid) != (
        abi.CPUID_HEAD.size + abi.CPUID_HEAD.unpack_from(cpuid)[0] * abi.CPUID_ENTRY.size
    ):
        raise GuestError("cpuid has another length than it says")
    vcpus = tuple(_vcpu(one, index) for index, one in enumerate(raw["vcpus"]))
    if len(vcpus) != spec.vcpus:
        raise GuestError(f"it has {len(vcpus)} vCPUs, its guest {spec.vcpus}")
    if not isinstance(raw["stopped"], str):
        raise GuestError("stopped is no text")
    return State(
        spec, cpuid, clock, _bytes(raw["input"], "input"), _number(raw["written"], "written"), raw["stopped"], vcpus
    )


def _vcpu(raw: dict[str, Any], index: int) -> VcpuState:
    _keys(raw, {"parts", "latch", "pending", "marks", "halted"}, f"vCPU {index}")
    parts = raw["parts"]
    msrs = _bytes(parts.get("msrs"), "msrs")
    count = abi.MSRS_HEAD.unpack_from(msrs)[0]
    indices = [
        abi.MSR_ENTRY.unpack_from(msrs, abi.MSRS_HEAD.size + number * abi.MSR_ENTRY.size)[0] for number in range(count)
    ]
    xsave = max(len(_bytes(parts.get("xsave"), "xsave")), abi.XSAVE_SIZE)
    sizes = Layout(xsave, tuple(indices)).sizes
    _keys(parts, set(sizes), f"vCPU {index}")
    for name, size in sizes.items():
        _bytes(parts[name], f"{name} of vCPU {index}", size)
    if not isinstance(raw["halted"], bool):
        raise GuestError(f"halted of vCPU {index} is neither true nor false")
    return VcpuState(
        parts,
        _number(raw["latch"], "latch") & 0xFFFFFFFF,
        _bytes(raw["pending"], "pending"),
        _number(raw["marks"], "marks"),
        raw["halted"],
    )


def _keys(raw: Mapping[str, object], wanted: set[str], where: str) -> None:
    if set(raw) != wanted:
        raise GuestError(f"{where} lacks or adds {', '.join(sorted(set(raw) ^ wanted))}")


def _bytes(value: object, name: str, size: int | None = None) -> bytes:
    if not isinstance(value, bytes) or (size is not None and len(value) != size):
        found = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise GuestError(f"{name} is {found}" + (f", not {size} bytes" if size is not None else ""))
    return value


def _number(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GuestError(f"{name} is {value!r}")
    return value


def _sum(head: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(head + payload, digest_size=_SUM_BYTES).digest()
