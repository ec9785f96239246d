"""The VMM is killed at any point of an epoch: the secondary promotes one whole epoch (P2), proved by the model."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from ckptd.errors import CkptdError
from ckptd.guests.kvm.machine import TRACKERS

from .dying import POINTS
from .machines import needs_kvm, ring_here
from .stage import Stage

pytestmark = [pytest.mark.kvm, needs_kvm]


def proved(stage: Stage) -> None:
    try:
        died = asyncio.run(stage.run())
        assert "guest" in str(died)
        proof = stage.prove()
        assert proof.digest_equal and proof.state_equal and not proof.named, proof
        outputs = proof.outputs
        assert not (outputs.lost or outputs.contradicted or outputs.wrong), outputs
        assert proof.step > 0
    finally:
        stage.close()


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(
    point: str, tracker: str, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if tracker == "kvm-ring" and (why := ring_here()):
        pytest.skip(why)
    monkeypatch.setenv("DIE_AT", f"{point}:20")
    proved(Stage(*places, tracker))


@pytest.mark.parametrize("epoch", [1, 12])
def test_killed_while_its_pages_are_copied(
    epoch: int, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIE_AT", "never:1")
    stage = Stage(*places, "kvm-manual")
    copies, copy = 0, stage.guest.read_pages

    def dying(region: int, gfns: object, out: object) -> None:
        nonlocal copies
        copies += stage.guest._now.paused or epoch == 1  # the first is copied from the running guest, for the most part
        if copies == epoch:
            os.kill(int(stage.guest.facts()["pid"]), signal.SIGKILL)  # type: ignore[call-overload]
        copy(region, gfns, out)  # type: ignore[arg-type]

    stage.guest.read_pages = dying  # type: ignore[method-assign,assignment]
    if epoch > 1:
        proved(stage)
        return
    try:  # nothing was ever committed: nothing can be promoted
        with pytest.raises(CkptdError, match="no committed epoch"):
            asyncio.run(stage.run())
    finally:
        stage.close()
