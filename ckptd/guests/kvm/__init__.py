"""The kvm guest: a small VMM in Python over /dev/kvm, in a process of its own, that runs flat programs."""

from __future__ import annotations

from pathlib import Path

from ckptd.guests.base import GuestSettings, StandbySettings
from ckptd.guests.kvm.guest import KvmGuest
from ckptd.guests.kvm.spec import KvmSpec
from ckptd.guests.kvm.standby import KvmStandby
from ckptd.memory.regions import Geometry

__all__ = ["KIND", "KvmGuest", "KvmKind", "KvmStandby", "spec_from"]


def spec_from(settings: GuestSettings) -> KvmSpec:
    """The guest's description from a [guest] section."""
    return KvmSpec(
        geometry=Geometry.of(**settings.pages),
        program=settings.workload,
        vcpus=settings.vcpus,
        seed=settings.seed,
        output_every=settings.output_every,
        rate=settings.dirty_rate,
    )


class KvmKind:
    """Makes both sides of a kvm guest."""

    def make_guest(self, settings: GuestSettings, runtime: Path) -> KvmGuest:
        return KvmGuest(
            settings.name,
            spec_from(settings),
            runtime,
            tracker=settings.tracker,
            ring_entries=settings.ring_entries,
            gate_capacity=settings.gate_capacity,
            output=None if settings.output is None else Path(settings.output),
        )

    def make_standby(self, settings: StandbySettings, runtime: Path) -> KvmStandby:
        return KvmStandby(settings.name, runtime, output=None if settings.output is None else Path(settings.output))


KIND = KvmKind()
