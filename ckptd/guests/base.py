"""What a guest is, where it runs (Guest, Gate) and where it is taken over (Standby), and where kinds come from.

A kind is an object with `make_guest` and `make_standby`. `sim`, `kvm` and `qemu` are built in; others come by entry
points of the group `ckptd.guests`:

    [project.entry-points."ckptd.guests"]
    mykind = "my.package:KIND"

A guest knows nothing of epochs, links or replicas: it pauses, is read, and goes on. When the daemon dies, the guest
goes on and its output stays in the gate (P5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ckptd.errors import ConfigError
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Tracker

__all__ = [
    "Gate", "Guest", "GuestKind", "GuestSettings", "Memory", "Standby", "StandbySettings", "Still", "guest_kind",
    "guest_kinds",
]  # fmt: skip

Memory = Sequence[npt.NDArray[np.uint8]]
"""One array for each region, shape (pages, 4096)."""

_GROUP = "ckptd.guests"


class Gate(Protocol):
    """Holds output back until nobody could be told otherwise. Outputs are numbered 1, 2, ... since the guest's
    start."""

    @property
    def written(self) -> int:
        """Outputs that the guest has emitted."""

    @property
    def released(self) -> int:
        """Outputs that have left."""

    @property
    def full(self) -> bool:
        """No more fits: the guest stalls until something is released. It never drops."""

    def mark(self) -> int:
        """While paused: the number of the last output emitted."""

    def held(self, mark: int) -> bytes:
        """The outputs in (released, mark], encoded for the standby: goes whole into every checkpoint."""

    def release(self, mark: int) -> int:
        """Let go of everything up to `mark`, in order; returns how many. Raises GuestError; then nothing is
        forgotten."""


class Guest(Protocol):
    """A guest on the side where it runs."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def vcpus(self) -> int: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def run(self) -> bytes:
        """16 random bytes, made when the guest was started: a guest started anew is another one."""

    @property
    def copies_early(self) -> bool:
        """A harvest and its copies take long beside the rest of a pause: worth doing once before it, too."""

    @property
    def tracker(self) -> Tracker: ...
    @property
    def gate(self) -> Gate: ...

    @property
    def memory(self) -> Memory:
        """Live views, read-only."""

    async def attach(self) -> None:
        """Start it, or attach to the one that runs already. Raises GuestError if that one is another guest."""

    async def pause(self) -> None:
        """Returns when no vCPU writes any more. May block for the time that takes."""

    async def save_state(self, *, go_on: bool = False) -> bytes:
        """While paused: everything that is not memory, nor output in the gate.

        `go_on`: nothing more is wanted of this pause, unless `late` has pages, so the guest may go on at once. `resume`
        is called all the same.
        """

    def late(self) -> DirtySet | None:
        """After `save_state`: pages that were written since the harvest of this pause, by devices that were saved
        beside the copying. None where nothing is saved beside it."""

    async def resume(self) -> None:
        """The vCPUs go on."""

    def read_pages(self, region: int, gfns: Gfns, out: npt.NDArray[np.uint8]) -> None:
        """Gather pages into `out`, shape (len(gfns), 4096)."""

    def attention(self) -> int | None:
        """A descriptor that is readable while the guest waits for a harvest or for the gate; None if it never
        does."""

    def clear_attention(self) -> None:
        """Make `attention` unreadable; it comes back while the guest still waits."""

    def alive(self) -> bool: ...

    @property
    def opens_at_detach(self) -> bool:
        """`detach` lets go of what is held, and nothing holds anything back afterwards; False: it stays held."""

    async def detach(self) -> None:
        """Leave it running; its gate as `opens_at_detach` says."""

    async def end(self) -> None:
        """End the guest."""

    def facts(self) -> dict[str, object]:
        """For the status."""


Still = Callable[[], AbstractAsyncContextManager[bytes]]
"""While its block runs the image stands still, and is that of the state which it gives. No epoch is committed then."""


class Standby(Protocol):
    """A guest on the side that takes over: waiting, then running over the image."""

    async def prepare(self) -> None:
        """Have all that can be ready, so that `activate` takes milliseconds."""

    async def fit(self, geometry: Geometry, images: Sequence[int], state: bytes, still: Still) -> str:
        """What the guest needs is known now: have it ready, and say why this host could not go on with it; empty if
        it could.

        For the operator, early. The image changes meanwhile, and must not be written.
        """

    async def activate(
        self, geometry: Geometry, images: Sequence[int], state: bytes, held: bytes, released: int
    ) -> None:
        """Let go of the outputs in `held`, which follow number `released`, then run over the image; nothing is held
        from then on.

        `images` are descriptors of one file for each region, mapped MAP_SHARED. Raises GuestError.
        """

    async def detach(self) -> None:
        """Leave a guest that runs here running; what only waits may end."""

    async def end(self) -> None: ...
    def alive(self) -> bool: ...
    def facts(self) -> dict[str, object]: ...


class GuestSettings(Protocol):
    """What a kind reads of the primary's [guest] section."""

    @property
    def name(self) -> str: ...
    @property
    def pages(self) -> Mapping[str, int]: ...
    @property
    def vcpus(self) -> int: ...
    @property
    def workload(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def tracker(self) -> str: ...
    @property
    def ring_entries(self) -> int: ...
    @property
    def dirty_rate(self) -> int: ...
    @property
    def output_every(self) -> int: ...
    @property
    def output(self) -> Path | str | None: ...
    @property
    def gate_capacity(self) -> int: ...


class StandbySettings(Protocol):
    """What a kind reads of the secondary's [[guest]] section. All else comes with the guest's state."""

    @property
    def name(self) -> str: ...
    @property
    def output(self) -> Path | str | None: ...


class GuestKind(Protocol):
    """A kind of guest: makes both sides from their descriptions. `runtime` is a directory of this guest's own."""

    def make_guest(self, settings: Any, runtime: Path) -> Guest: ...
    def make_standby(self, settings: Any, runtime: Path) -> Standby: ...


def guest_kinds() -> tuple[str, ...]:
    """The names of all kinds that are installed."""
    return tuple(sorted({"kvm", "qemu", "sim", *(entry.name for entry in entry_points(group=_GROUP))}))


def guest_kind(name: str) -> GuestKind:
    """The kind of that name, imported now. Raises ConfigError naming the kinds there are."""
    if name == "sim":
        from ckptd.guests.sim import KIND

        return KIND
    if name == "kvm":
        from ckptd.guests.kvm import KIND as KVM

        return KVM
    if name == "qemu":
        from ckptd.guests.qemu import KIND as QEMU

        return QEMU
    for entry in entry_points(group=_GROUP, name=name):
        kind: GuestKind = entry.load()
        return kind
    raise ConfigError(f"there is no guest kind {name!r}", hint=f"kinds: {', '.join(guest_kinds())}")
