"""The sim guest: a computer in miniature in a process of its own, whose every state can be proved right."""

from __future__ import annotations

from pathlib import Path

from ckptd.guests.base import GuestSettings, StandbySettings
from ckptd.guests.sim.guest import SimGuest
from ckptd.guests.sim.machine import Params
from ckptd.guests.sim.standby import SimStandby
from ckptd.memory.regions import Geometry

__all__ = ["KIND", "SimGuest", "SimKind", "SimStandby", "params_from"]


def params_from(settings: GuestSettings) -> Params:
    """The machine's parameters from a [guest] section."""
    return Params(
        geometry=Geometry.of(**settings.pages),
        seed=settings.seed,
        vcpus=settings.vcpus,
        workload=settings.workload,
        output_every=settings.output_every,
        rate=settings.dirty_rate,
    )


class SimKind:
    """Makes both sides of a sim guest."""

    def make_guest(self, settings: GuestSettings, runtime: Path) -> SimGuest:
        return SimGuest(
            settings.name,
            params_from(settings),
            runtime,
            tracker="bitmap" if settings.tracker == "auto" else settings.tracker,
            ring_entries=settings.ring_entries,
            gate_capacity=settings.gate_capacity,
            output=None if settings.output is None else Path(settings.output),
        )

    def make_standby(self, settings: StandbySettings, runtime: Path) -> SimStandby:
        return SimStandby(settings.name, runtime, output=None if settings.output is None else Path(settings.output))


KIND = SimKind()
