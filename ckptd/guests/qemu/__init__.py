"""The qemu guest: a VM that runs already, in stock QEMU; protected from outside, and left as it was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ckptd.guests.qemu.cmdline import Overrides
from ckptd.guests.qemu.guest import QemuGuest
from ckptd.guests.qemu.spec import QemuSpec
from ckptd.guests.qemu.standby import QemuStandby

__all__ = ["KIND", "QemuGuest", "QemuKind", "QemuStandby"]


class _GuestSettings(Protocol):
    """What this kind reads of the primary's [guest] section."""

    @property
    def name(self) -> str: ...
    @property
    def qmp(self) -> Path | None: ...
    @property
    def disks(self) -> str: ...
    @property
    def ignore_ram(self) -> Sequence[str]: ...
    @property
    def chardevs(self) -> Mapping[str, Path]: ...
    @property
    def tracker(self) -> str: ...
    @property
    def gate_capacity(self) -> int: ...


class _OverrideSettings(Protocol):
    @property
    def command(self) -> Sequence[str]: ...
    @property
    def binary(self) -> str | None: ...
    @property
    def replace(self) -> Mapping[str, str]: ...
    @property
    def drop(self) -> Sequence[str]: ...
    @property
    def append(self) -> Sequence[str]: ...


class _StandbySettings(Protocol):
    """What this kind reads of the secondary's [[guest]] section."""

    @property
    def name(self) -> str: ...
    @property
    def output(self) -> Path | str | None: ...
    @property
    def chardevs(self) -> Mapping[str, Path]: ...
    @property
    def standby(self) -> _OverrideSettings: ...


class QemuKind:
    """Makes both sides of a QEMU guest."""

    def make_guest(self, settings: _GuestSettings, runtime: Path) -> QemuGuest:
        assert settings.qmp is not None  # the configuration has seen to it
        spec = QemuSpec(
            Path(settings.qmp), settings.disks, tuple(settings.ignore_ram), tuple(settings.chardevs.items())
        )
        return QemuGuest(settings.name, spec, runtime, tracker=settings.tracker, gate_capacity=settings.gate_capacity)

    def make_standby(self, settings: _StandbySettings, runtime: Path) -> QemuStandby:
        one = settings.standby
        overrides = Overrides(tuple(one.command), one.binary, dict(one.replace), tuple(one.drop), tuple(one.append))
        output = None if settings.output is None else Path(settings.output)
        return QemuStandby(settings.name, runtime, overrides, output, settings.chardevs)


KIND = QemuKind()
