"""A secondary that could not run the guest says so from the first epoch on, and holds the replica all the same."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ckptd.daemon.secondary import SecondaryDaemon
from ckptd.guests.kvm import standby
from ckptd.guests.kvm.abi import CPUID_HEAD

from .machines import needs_kvm
from .stage import Stage

pytestmark = [pytest.mark.kvm, needs_kvm]


@pytest.mark.parametrize("fits", [True, False])
def test_is_said_early(fits: bool, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIE_AT", "never:1")
    if not fits:
        monkeypatch.setattr(standby, "cpuid_of", lambda _: CPUID_HEAD.pack(0, 0))
    stage = Stage(*places, "auto")
    said = ""

    def some_epochs(secondary: SecondaryDaemon) -> bool:
        nonlocal said
        said = str(secondary.guests["vm"].status()["reason"])
        return secondary.guests["vm"].replica.epoch >= 3

    try:
        asyncio.run(stage.until(some_epochs))
    finally:
        stage.close()
    assert said.startswith("from the primary at 127.0.0.1:")
    assert ("could NOT be resumed here: this host's CPU or KVM lacks" in said) == (not fits)
