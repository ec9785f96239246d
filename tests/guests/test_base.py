"""Kinds are found by name; the built-in one keeps the protocols."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckptd.errors import ConfigError
from ckptd.guests import base
from ckptd.guests.base import Gate, Guest, GuestKind, Standby, guest_kind, guest_kinds
from ckptd.guests.sim import KIND, SimGuest, SimStandby
from ckptd.guests.sim.gate import SimGate

SETTINGS = SimpleNamespace(
    name="one", pages={"ram": 16, "rom": 4}, vcpus=3, workload="kv", seed=9, tracker="auto", ring_entries=256,
    dirty_rate=100, output_every=7, output="/nowhere/output", gate_capacity=4096,
)  # fmt: skip


def test_the_sim_is_built_in() -> None:
    assert "sim" in guest_kinds()
    assert guest_kind("sim") is KIND


def test_an_unknown_kind_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'moon'.*sim"):
        guest_kind("moon")


def test_other_kinds_come_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", "ckptd.guests.sim:KIND", "ckptd.guests")

    def installed(**wanted: str) -> EntryPoints:
        return EntryPoints([entry]).select(**wanted)

    monkeypatch.setattr(base, "entry_points", installed)
    assert guest_kinds() == ("kvm", "mine", "qemu", "sim")
    assert guest_kind("mine") is KIND


def test_both_sides_from_their_settings(tmp_path: Path) -> None:
    guest: Any = KIND.make_guest(SETTINGS, tmp_path)
    params = guest.params
    assert [(region.name, region.pages) for region in guest.geometry] == [("ram", 16), ("rom", 4)]
    assert (params.seed, params.vcpus, params.workload, params.output_every, params.rate) == (9, 3, "kv", 7, 100)
    assert (guest.name, guest.kind, guest.vcpus) == ("one", "sim", 3)
    assert not guest.alive()
    assert KIND.make_standby(SETTINGS, tmp_path).facts()["active"] is False


def _checked_by_mypy(guest: SimGuest, standby: SimStandby, gate: SimGate) -> tuple[Guest, Standby, Gate, GuestKind]:
    return guest, standby, gate, KIND
