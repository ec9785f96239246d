"""Without KVM, without permission, or without a capability: the error names the cure, and nothing else breaks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import ConfigError, GuestError, TrackerUnavailable
from ckptd.guests.base import guest_kind, guest_kinds
from ckptd.guests.kvm import host
from ckptd.guests.kvm.gate import KvmGate, gate_bytes
from ckptd.guests.kvm.host import features_of, open_kvm
from ckptd.guests.kvm.machine import Machine
from ckptd.guests.kvm.spec import KvmSpec
from ckptd.guests.kvm.vm import LogMode, Vm
from ckptd.memory.regions import Geometry

from .machines import needs_kvm, new_memory

SPEC = KvmSpec(Geometry.of(ram=64))


def test_no_device() -> None:
    with pytest.raises(TrackerUnavailable, match="cannot be opened: No such file") as raised:
        open_kvm(Path("/nowhere/kvm"))
    assert "kvm_intel or kvm_amd" in (raised.value.hint or "")


def test_a_file_that_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    with pytest.raises(TrackerUnavailable, match="is not KVM's device"):
        open_kvm(tmp_path / "kvm")


def denied(device: Path) -> str:
    """The hint that a process without rights gets: in a child, since rights are not easily taken back."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.close(open_kvm(device))
            said = "opened"
        except TrackerUnavailable as error:
            said = str(error)
        except BaseException as error:
            said = repr(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_no_permission(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0)
    for place in (tmp_path, *tmp_path.parents[:3]):
        if place != Path("/tmp"):
            place.chmod(0o755)
    said = denied(device)
    assert "Permission denied" in said and "run as root" in said


@needs_kvm
@pytest.mark.kvm
def test_this_host_says_what_it_has() -> None:
    fd = open_kvm()
    try:
        found = features_of(fd)
        assert found.max_vcpus >= 1 and found.xsave_bytes >= 4096 and found.ring_reserve >= 64
        assert len(host.cpuid_of(fd)) > 100 and 0x10 in host.msrs_of(fd)
    finally:
        os.close(fd)


@needs_kvm
@pytest.mark.kvm
@pytest.mark.parametrize(
    ("lacks", "mode", "said", "cure"),
    [
        ({"ring_entries": 0}, LogMode(ring_entries=4096), "lacks KVM_CAP_DIRTY_LOG_RING", "kvm-manual"),
        ({"manual_clear": False}, LogMode(manual=True), "lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "kvm-bitmap"),
    ],
)
def test_a_capability_that_lacks(lacks: dict[str, int], mode: LogMode, said: str, cure: str) -> None:
    fd = open_kvm()
    try:
        with pytest.raises(TrackerUnavailable, match=said) as raised:
            Vm(fd, replace(features_of(fd), **lacks), new_memory(SPEC), SPEC.places, mode, 1)  # type: ignore[arg-type]
        assert cure in (raised.value.hint or "")
    finally:
        os.close(fd)


@needs_kvm
@pytest.mark.kvm
def test_a_ring_that_is_too_large_or_refused_by_the_kernel() -> None:
    fd = open_kvm()
    try:
        features = features_of(fd)
        if not features.ring_entries:
            pytest.skip("this kernel's KVM has no dirty ring")
        with pytest.raises(ConfigError, match="at most 65536 entries"):
            Vm(fd, features, new_memory(SPEC), SPEC.places, LogMode(ring_entries=1 << 20), 1)
        with pytest.raises(TrackerUnavailable, match="refuses a dirty ring of 300"):
            Vm(fd, features, new_memory(SPEC), SPEC.places, LogMode(ring_entries=300), 1)
    finally:
        os.close(fd)


@needs_kvm
@pytest.mark.kvm
def test_memory_that_is_not_that_of_the_guest_is_refused() -> None:
    gate = KvmGate(np.zeros(gate_bytes(16), dtype=np.uint8))
    with pytest.raises(GuestError, match="is not that of ram 256 KiB"):
        Machine(SPEC, [np.zeros(4096, dtype=np.uint8)], gate)
    with pytest.raises(GuestError, match="KVM refuses memory"):
        Machine(SPEC, [np.zeros((64 << 12) + 64, dtype=np.uint8)[64:]], gate)  # not on a page's boundary


def test_both_kinds_are_there_without_kvm() -> None:
    assert {"sim", "kvm"} <= set(guest_kinds())
    assert guest_kind("sim") is not guest_kind("kvm")
