"""What follows from which findings: pure."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ckptd.doctor import GROUPS, Advice, advise
from ckptd.doctor.findings import Finding, no, unknown, yes

ALL = [check.__name__ for group in GROUPS.values() for check in group]


def machine(**changed: Finding | str) -> list[Finding]:
    """Offers everything, with hardware; but what is named is missing ("no", "unknown") or different."""
    found: dict[str, Finding] = {name: yes(name, "works") for name in ALL}
    found["kvm_device"] = yes("kvm_device", "", emulates=False)
    found["kvm_manual_clear"] = yes("kvm_manual_clear", "", initially_set=True)
    found["kvm_dirty_ring"] = yes("kvm_dirty_ring", "", entries=65536, reserve_entries=576)
    for name, other in changed.items():
        assert name in found
        if other == "no":
            other = no(name, f"{name} is missing", f"cure of {name}")
        elif other == "unknown":
            other = unknown(name, "Input/output error")
        assert isinstance(other, Finding)
        found[name] = other
    return list(found.values())


def ratings(advice: Advice) -> dict[str, str]:
    return {one.tracker: one.rating for one in advice.trackers}


def why(advice: Advice, tracker: str) -> str:
    return next(one.why for one in advice.trackers if one.tracker == tracker)


EMULATING: dict[str, Any] = {
    "kvm_device": yes("kvm_device", "", emulates=True),
    "kvm_ring_bounded": no("kvm_ring_bounded", "may be overrun", "keep the ring large"),
    "kvm_hardware_paging": "no",
}


def test_a_simulated_guest_needs_nothing() -> None:
    for findings in ([], machine()):
        advice = advise(findings)["sim"]
        assert (advice.ready, advice.recommended, ratings(advice)["ring"]) == ("yes", "bitmap", "possible")


def test_everything_is_offered() -> None:
    advice = advise(machine())
    assert list(advice) == ["sim", "kvm", "qemu"]
    assert {guest: one.recommended for guest, one in advice.items()} == {
        "sim": "bitmap", "kvm": "kvm-manual", "qemu": "pagemap",
    }  # fmt: skip
    assert all(one.ready == "yes" and not one.cures and not one.notes for one in advice.values())


def test_nothing_was_looked_at() -> None:
    for guest in ("kvm", "qemu"):
        advice = advise([])[guest]
        assert (advice.ready, advice.recommended) == ("unknown", None)
        assert set(ratings(advice).values()) == {"unknown"}


# kvm.


def test_the_ring_is_for_few_pages_of_a_large_memory_on_hardware() -> None:
    advice = advise(machine())["kvm"]
    assert ratings(advice) == {"kvm-manual": "recommended", "kvm-bitmap": "possible", "kvm-ring": "possible"}
    assert "few pages of a large memory" in why(advice, "kvm-ring")


def test_manual_clear_without_initially_set_comes_after_the_bitmap() -> None:
    advice = advise(machine(kvm_manual_clear=yes("kvm_manual_clear", "", initially_set=False)))["kvm"]
    assert advice.recommended == "kvm-bitmap"
    assert ratings(advice)["kvm-manual"] == "possible"


@pytest.mark.parametrize("state", ["no", "unknown"])
def test_without_manual_clear_the_bitmap_is_taken(state: str) -> None:
    advice = advise(machine(kvm_manual_clear=state))["kvm"]
    assert (advice.ready, advice.recommended) == ("yes", "kvm-bitmap")


def test_an_emulating_kvm_never_gets_the_ring_first() -> None:
    for missing in ({}, {"kvm_manual_clear": "no"}, {"kvm_manual_clear": "no", "kvm_dirty_bitmap": "no"}):
        advice = advise(machine(**EMULATING, **missing))["kvm"]
        assert advice.recommended != "kvm-ring"
        assert ratings(advice)["kvm-ring"] == "discouraged"
        assert "keep the ring large" in why(advice, "kvm-ring")
        assert any("emulates" in note for note in advice.notes)


def test_shadow_paging_on_hardware_discourages_the_ring() -> None:
    advice = advise(machine(kvm_hardware_paging="no"))["kvm"]
    assert ratings(advice)["kvm-ring"] == "discouraged" and advice.recommended == "kvm-manual"


def test_without_kvm_its_cure_is_named_once() -> None:
    names = [name for name in ALL if name.startswith("kvm_")]
    findings = machine(**{name: no(name, "there is no KVM to ask") for name in names[1:]}, kvm_device="no")
    advice = advise(findings)["kvm"]
    assert (advice.ready, advice.recommended, advice.cures) == ("no", None, {"kvm_device": "cure of kvm_device"})
    assert set(ratings(advice).values()) == {"unavailable"}


def test_without_binutils_a_tracker_is_still_named() -> None:
    advice = advise(machine(binutils="no"))["kvm"]
    assert (advice.ready, advice.recommended, list(advice.cures)) == ("no", "kvm-manual", ["binutils"])


# qemu.


@pytest.mark.parametrize("missing", ["ptrace", "pidfd_getfd", "page_tracking"])
def test_without_a_part_of_pagemap_soft_dirty_is_taken(missing: str) -> None:
    advice = advise(machine(**{missing: "no"}))["qemu"]
    assert (advice.ready, advice.recommended) == ("yes", "soft-dirty")
    assert ratings(advice)["pagemap"] == "unavailable"
    assert why(advice, "pagemap") == f"{missing}: {missing} is missing"
    assert advice.cures == {missing: f"cure of {missing}"}


def test_one_way_to_a_userfaultfd_is_enough() -> None:
    """And one of user mode only is one; the device makes none inside QEMU."""
    for names in (["userfaultfd_syscall", "userfaultfd_device"], ["userfaultfd_user_mode"], ["userfaultfd_device"]):
        advice = advise(machine(**dict.fromkeys(names, "no")))["qemu"]
        assert (advice.ready, advice.recommended, advice.cures) == ("yes", "pagemap", {})
    advice = advise(machine(userfaultfd_syscall="no", userfaultfd_user_mode="no"))["qemu"]
    assert ratings(advice)["pagemap"] == "unavailable"
    assert list(advice.cures) == ["userfaultfd_user_mode", "userfaultfd_syscall"]


def test_without_any_tracker_a_qemu_cannot_be_protected() -> None:
    advice = advise(machine(page_tracking="no", soft_dirty="no"))["qemu"]
    assert (advice.ready, advice.recommended) == ("no", None)
    assert set(ratings(advice).values()) == {"unavailable"}
    advice = advise(machine(page_tracking="unknown", soft_dirty="no"))["qemu"]
    assert (advice.ready, ratings(advice)["pagemap"]) == ("unknown", "unknown")


def test_without_qemu_the_tracker_is_named_and_the_package() -> None:
    advice = advise(machine(qemu="no", qemu_accel_kvm="no"))["qemu"]
    assert (advice.ready, advice.recommended, list(advice.cures)) == ("no", "pagemap", ["qemu"])
    assert advice.notes == ()


def test_what_slows_or_narrows_is_a_note() -> None:
    advice = advise(machine(qemu_accel_kvm="no", cap_sys_ptrace="no"))["qemu"]
    assert advice.ready == "yes"
    assert advice.notes == ("-accel kvm: qemu_accel_kvm is missing", "only a QEMU of this user can be attached to")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("state", ["no", "unknown"])
def test_any_one_finding_may_be_missing(name: str, state: str) -> None:
    for advice in advise(machine(**{name: state})).values():
        json.dumps(advice.as_dict())
        assert all(one.why for one in advice.trackers)
        recommended = [one.tracker for one in advice.trackers if one.rating == "recommended"]
        assert recommended == ([advice.recommended] if advice.recommended else [])
