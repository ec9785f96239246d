"""The VMM is killed at any point of an epoch: the secondary promotes one whole epoch (P2), proved by the model."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.config import PrimaryConfig, SecondaryConfig
from ckptd.daemon.primary import PrimaryDaemon
from ckptd.daemon.secondary import SecondaryDaemon
from ckptd.demo.children import kill_guest
from ckptd.demo.proof import Proof
from ckptd.demo.prove_kvm import KvmProver
from ckptd.errors import CkptdError
from ckptd.guests.kvm import spec_from
from ckptd.guests.kvm.machine import TRACKERS
from tests.e2e.pair import free_port

from .dying import POINTS, DyingGuest
from .machines import needs_kvm, ring_here

pytestmark = [pytest.mark.kvm, needs_kvm]


class Stage:
    """Both daemons in this process, and the guest between them."""

    def __init__(self, place: Path, replicas: Path, tracker: str) -> None:
        self.place, self.replicas = place, replicas
        port = free_port()
        self.config = PrimaryConfig.model_validate({
            "guest": {
                "name": "vm", "kind": "kvm", "memory": "8MiB", "dirty_rate": 100_000, "output_every": 2,
                "tracker": tracker, "ring_entries": 4096,
            },
            "secondary": {"address": f"127.0.0.1:{port}"}, "checkpoint": {"interval": "5ms", "stage": "8MiB"},
            "link": {"backoff_min": "10ms"}, "runtime": {"dir": str(place / "p")},
        })  # fmt: skip
        self.there = SecondaryConfig.model_validate({
            "listen": {"address": f"127.0.0.1:{port}"},
            "replica": {"dir": str(replicas), "history": 4, "history_bytes": "32MiB", "reserve": "4MiB"},
            "guest": [{"name": "vm", "kind": "kvm"}], "runtime": {"dir": str(place / "s")},
        })  # fmt: skip
        guest = self.config.guest
        self.guest = DyingGuest(
            "vm", spec_from(guest), place / "p", tracker=tracker, ring_entries=4096, output=Path(guest.output)
        )
        self.epoch = 0

    async def run(self) -> CkptdError:
        """Until the guest is dead and the secondary has promoted it and let it run a little."""
        secondary = SecondaryDaemon(self.there)
        serving = asyncio.create_task(secondary.run())
        await asyncio.sleep(0.05)
        primary = PrimaryDaemon(self.config, self.guest)
        try:
            await asyncio.wait_for(primary.run(), 60)
            raise AssertionError("the primary ended well")
        except CkptdError as error:
            died = error
        try:
            while secondary.guests["vm"].session is not None:
                await asyncio.sleep(0.005)
            promoted = await secondary.promote(None)
            self.epoch = promoted["epoch"]
            assert self.epoch >= primary.acknowledged_epoch > 0
            await asyncio.sleep(0.1)
        finally:
            secondary.stop()
            await serving
        return died

    def prove(self) -> Proof:
        outputs = Path(self.config.guest.output), self.place / "s" / "vm.output"
        proof = KvmProver().prove(self.config.guest, self.place / "s" / "vm", [self.replicas / "vm/image-ram"], outputs)
        assert proof is not None
        return proof

    def close(self) -> None:
        for runtime in (self.place / "p", self.place / "s" / "vm"):
            kill_guest(runtime)


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    replicas = Path(f"/dev/shm/ckptd-test-{os.getpid()}-{free_port()}")
    replicas.mkdir()
    yield tmp_path, replicas
    shutil.rmtree(replicas)


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
        copies += stage.guest._now.paused
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
