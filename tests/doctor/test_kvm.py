"""KVM's checks: on the device of this machine, and on devices that are missing, forbidden or something else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ckptd.doctor import kvm
from ckptd.doctor.findings import Finding
from ckptd.doctor.system import in_child
from ckptd.guests.kvm.host import Features, features_of

needs_kvm = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened here"),
]

INTEL = Features(
    manual_clear=True, initially_set=True, ring_entries=65536, ring_reserve=576, exact=True, xsave_bytes=4096,
    max_vcpus=64, module="kvm_intel",
)  # fmt: skip
SOFTWARE = replace(INTEL, exact=False, module="kvm_pvm", ring_reserve=1088)

Check = Callable[..., Finding]


def offers(features: Features) -> Callable[[int], Features]:
    return lambda _: features


@pytest.fixture
def anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that opens; what it offers is the test's."""
    monkeypatch.setattr(kvm, "open_kvm", lambda _: os.open(os.devnull, os.O_RDWR))


# On this machine.


@pytest.mark.parametrize("check", kvm.CHECKS)
def test_each_check_answers_here_whatever_this_machine_is(check: Callable[[], Finding], settled: Any) -> None:
    settled(check)


class TestWhereThereIsKvm:
    pytestmark = needs_kvm

    def test_the_device_names_its_module(self) -> None:
        found = in_child(kvm.kvm_device)
        assert found.state == "yes"
        assert str(found.data["module"]).startswith("kvm")

    def test_a_guest_writes_and_the_bitmap_has_it(self) -> None:
        assert in_child(kvm.kvm_dirty_bitmap).state == "yes"

    def test_what_the_capability_promises_is_found_by_trying(self) -> None:
        fd = os.open("/dev/kvm", os.O_RDWR)
        features = features_of(fd)
        os.close(fd)
        manual, ring = in_child(kvm.kvm_manual_clear), in_child(kvm.kvm_dirty_ring)
        assert (manual.state == "yes", manual.data["initially_set"]) == (features.manual_clear, features.initially_set)
        assert ring.data.get("entries", 0) == features.ring_entries

    def test_initially_set_is_what_the_first_log_says(self) -> None:
        """Not what was promised: without the flag the first log of fresh memory is empty."""

        def without(fd: int) -> Features:
            return replace(features_of(fd), initially_set=False)

        if in_child(kvm.kvm_manual_clear).state != "yes":
            pytest.skip("this KVM has no manual clear")
        found = in_child(partial(kvm.kvm_manual_clear, features=without))
        assert (found.state, found.data) == ("yes", {"initially_set": False})

    def test_a_ring_that_is_refused_is_no_ring(self) -> None:
        if in_child(kvm.kvm_dirty_ring).state != "yes":
            pytest.skip("this KVM has no ring")
        found = in_child(lambda: kvm.kvm_dirty_ring(features=lambda fd: replace(features_of(fd), ring_entries=300)))
        assert found.state == "no"
        assert "300 entries was refused" in found.detail

    def test_no_descriptor_stays_open(self) -> None:
        def opened() -> tuple[int, int]:
            before = len(os.listdir("/proc/self/fd"))
            for check in kvm.CHECKS:
                check()
            return before, len(os.listdir("/proc/self/fd"))

        before, after = in_child(opened)
        assert before == after


# Where something is missing.


@pytest.mark.parametrize("check", kvm.CHECKS)
def test_without_the_device_nothing_is_offered(check: Check, tmp_path: Path) -> None:
    found = check(device=tmp_path / "kvm")
    assert (found.name, found.state) == (check.__name__, "no")
    assert found.name == "kvm_device" or "see kvm_device" in found.detail


def test_a_device_that_is_missing_wants_a_module(tmp_path: Path) -> None:
    cure = kvm.kvm_device(tmp_path / "kvm").cure
    assert cure is not None and "load the module" in cure and "nested" in cure


def test_a_device_that_is_forbidden_names_who_may(tmp_path: Path, as_nobody: Any) -> None:
    device = tmp_path / "kvm"
    device.touch(0o000)
    found = as_nobody(lambda: kvm.kvm_device(device))
    assert found.state == "no"
    assert "Permission denied" in found.detail and "run as root" in found.cure  # no group may, either


def test_another_device_is_no_kvm() -> None:
    found = kvm.kvm_device(Path(os.devnull))
    assert (found.state, "is not KVM's device" in found.detail) == ("no", True)


def test_an_error_that_nobody_foresaw_is_raised(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="Is a directory"):
        kvm.kvm_device(tmp_path)


@pytest.mark.usefixtures("anything")
def test_what_is_not_offered_is_not_tried() -> None:
    poor = offers(replace(INTEL, manual_clear=False, initially_set=False, ring_entries=0))
    for check in (kvm.kvm_manual_clear, kvm.kvm_dirty_ring):
        found = check(features=poor)
        assert found.state == "no" and found.cure and "kernel" in found.cure
    assert kvm.kvm_ring_bounded(features=poor).state == "no"


@pytest.mark.usefixtures("anything")
def test_a_software_kvm_can_overrun_its_ring_and_hardware_cannot() -> None:
    found = kvm.kvm_ring_bounded(features=offers(SOFTWARE))
    assert found.state == "no" and found.cure
    assert "65536 entries" in found.cure and "64448" in found.cure  # what is left without the reserve
    assert kvm.kvm_ring_bounded(features=offers(INTEL)).state == "yes"
    assert kvm.kvm_ring_bounded(features=offers(replace(INTEL, exact=False))).state == "yes"


@pytest.mark.usefixtures("anything")
def test_shadow_paging_is_cured_by_the_modules_parameter() -> None:
    assert kvm.kvm_hardware_paging(features=offers(INTEL)).state == "yes"
    for module, cure in (("kvm_intel", "ept=1"), ("kvm_amd", "npt=1"), ("kvm_pvm", "use a host with VT-x")):
        found = kvm.kvm_hardware_paging(features=offers(replace(INTEL, exact=False, module=module)))
        assert found.state == "no" and found.cure and cure in found.cure


@pytest.mark.usefixtures("anything")
def test_the_device_says_whether_it_emulates() -> None:
    assert kvm.kvm_device(features=offers(SOFTWARE)).data["emulates"] is True
    assert kvm.kvm_device(features=offers(INTEL)).data["emulates"] is False
