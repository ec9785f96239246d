"""Both daemons in this process, real VMMs of a guest on either side, and one that can be made to die."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from ckptd.config import PrimaryConfig, SecondaryConfig
from ckptd.daemon.primary import PrimaryDaemon
from ckptd.daemon.secondary import SecondaryDaemon
from ckptd.demo.children import kill_guest
from ckptd.demo.proof import Proof
from ckptd.demo.prove_kvm import KvmProver
from ckptd.errors import CkptdError
from ckptd.guests.kvm import spec_from
from tests.e2e.pair import free_port

from .dying import DyingGuest

__all__ = ["Stage"]


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

    async def until(self, condition: Callable[[SecondaryDaemon], bool]) -> None:
        """Protect the guest until the secondary is as wanted; then both daemons and the guest end."""
        secondary, primary = SecondaryDaemon(self.there), PrimaryDaemon(self.config, self.guest)
        serving, protecting = asyncio.create_task(secondary.run()), asyncio.create_task(primary.run())
        try:
            async with asyncio.timeout(60):
                while "vm" not in secondary.guests or not condition(secondary):
                    assert not serving.done() and not protecting.done(), (serving, protecting)
                    await asyncio.sleep(0.005)
        finally:
            primary.stop()
            await protecting
            secondary.stop()
            await serving

    async def run(self) -> CkptdError:
        """Until the guest is dead and the secondary has promoted it and let it run a little."""
        secondary = SecondaryDaemon(self.there)
        serving = asyncio.create_task(secondary.run())
        while "vm" not in secondary.guests:
            assert not serving.done(), serving.exception()
            await asyncio.sleep(0.005)
        primary = PrimaryDaemon(self.config, self.guest)
        try:
            await asyncio.wait_for(primary.run(), 60)
            raise AssertionError("the primary ended well")
        except CkptdError as error:
            died = error
        try:
            async with asyncio.timeout(60):
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
