"""ProcessGuest: starts a guest's process or finds it running, maps what it shares, and drives it.

The daemon reads guest memory through read-only mappings; the release of output works on shared memory too, so a pause
is one packet each way. What is special to a kind is in its subclass.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError, StateError
from ckptd.guests.base import Gate, Memory
from ckptd.guests.process.link import GuestLink
from ckptd.guests.process.shared import ControlPage, map_file
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Tracker
from ckptd.units import PAGE_SIZE

__all__ = ["Attached", "Description", "ProcessGuest", "mapped"]


class Description(Protocol):
    """What a guest is: two processes with equal `as_dict` run the same guest."""

    def as_dict(self) -> dict[str, Any]: ...


D = TypeVar("D", bound=Description)
G = TypeVar("G", bound=Gate)


@dataclass(slots=True)
class Attached(Generic[G]):
    """All that exists only while attached."""

    link: GuestLink
    page: ControlPage
    gate: G
    tracker: Tracker
    memory: Memory
    attention: int
    run: bytes
    paused: bool = False
    state: bytes | None = None  # as the reply to the pause had it, where the kind sends it there

    def close(self) -> None:
        self.link.close()
        if self.attention >= 0:
            os.close(self.attention)
            self.attention = -1


class ProcessGuest(Generic[D, G]):
    """One guest; `attach` before anything else."""

    kind: ClassVar[str]
    opens_at_detach: ClassVar[bool] = False
    copies_early: ClassVar[bool] = False
    module: ClassVar[str]
    """What `python -m` runs as the guest's process."""

    def __init__(self, name: str, params: D, runtime: Path, *, gate_capacity: int, output: Path | None) -> None:
        self.name = name
        self.params = params
        self._runtime = runtime
        self._gate_capacity = gate_capacity
        self._output = output
        self._attached: Attached[G] | None = None

    # --- what a kind adds

    def _log(self) -> dict[str, Any]:
        """What `attach` says of the dirty log that is wanted."""
        raise NotImplementedError

    def _parts(self, link: GuestLink, reply: dict[str, Any], fds: list[int]) -> tuple[G, Tracker, Memory]:
        """Gate, tracker, and memory; `fds` is what follows the common descriptors, and is closed afterwards."""
        raise NotImplementedError

    def _facts(self, now: Attached[G] | None) -> dict[str, object]:
        """What the status says beside the common."""
        raise NotImplementedError

    # --- the guest

    @property
    def geometry(self) -> Geometry:
        raise NotImplementedError

    @property
    def vcpus(self) -> int:
        raise NotImplementedError

    @property
    def run(self) -> bytes:
        return self._now.run

    @property
    def tracker(self) -> Tracker:
        return self._now.tracker

    @property
    def gate(self) -> G:
        return self._now.gate

    @property
    def memory(self) -> Memory:
        return self._now.memory

    @property
    def resumed(self) -> bool:
        """`attach` found the guest running; False: it began with `attach`."""
        return not self._now.link.started

    async def attach(self) -> None:
        if self._attached is not None:
            raise StateError("the guest is attached already", guest=self.name)
        link = await GuestLink.open(self._runtime, self.module)
        try:
            if not link.active:
                link.ask({"op": "create", "params": self.params.as_dict(), "gate_capacity": self._gate_capacity})
            reply, fds = link.ask({"op": "attach", **self._log()})
            try:
                self._check(reply["params"])
                page_fd, attention, *rest = fds
                gate, tracker, memory = self._parts(link, reply, rest)
                self._attached = Attached(
                    link=link,
                    page=ControlPage(map_file(page_fd)),
                    gate=gate,
                    tracker=tracker,
                    memory=memory,
                    attention=os.dup(attention),
                    run=reply["run"],
                )
            finally:
                for fd in fds:
                    os.close(fd)
        except BaseException:
            if link.started:
                await link.end()
            link.close()
            raise

    async def pause(self) -> None:
        now = self._now
        if now.paused:
            raise StateError("the guest is paused already", guest=self.name)
        now.page.pause = True  # seen before the next step; the packet wakes it where it sleeps
        reply, _ = await now.link.ask_soon({"op": "pause"})
        now.paused, now.state = True, reply.get("state")

    async def save_state(self, *, go_on: bool = False) -> bytes:
        if not self._now.paused:
            raise StateError("the state is saved while the guest is paused", guest=self.name)
        if self._now.state is None:
            self._now.state = await self._saved()
        return self._now.state

    async def _saved(self) -> bytes:
        """The state, where the reply to the pause does not carry it."""
        raise NotImplementedError

    def late(self) -> DirtySet | None:
        return None

    async def resume(self) -> None:
        now = self._now
        if not now.paused:
            raise StateError("the guest is not paused", guest=self.name)
        now.paused, now.state = False, None
        now.page.pause = False
        now.link.tell({"op": "resume"})

    def read_pages(self, region: int, gfns: Gfns, out: npt.NDArray[np.uint8]) -> None:
        # mode="raise", the default, would gather into a buffer first
        np.take(self._now.memory[region], gfns, axis=0, out=out, mode="clip")

    def attention(self) -> int | None:
        return self._now.attention

    def clear_attention(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._now.attention)

    def alive(self) -> bool:
        return self._attached is not None and self._attached.link.alive()

    async def detach(self) -> None:
        if self._attached is not None:
            self._attached.close()
            self._attached = None

    async def end(self) -> None:
        if self._attached is not None:
            attached, self._attached = self._attached, None
            await attached.link.end()
            attached.close()

    def facts(self) -> dict[str, object]:
        now = self._attached
        if now is None:
            return {"attached": False, **self._facts(None)}
        return {
            "attached": True,
            "pid": now.link.pid,
            "paused": now.paused,
            "steps": now.page.step,
            "outputs": now.gate.written,
            "released": now.gate.released,
            "tracker": now.tracker.name,
            **self._facts(now),
        }

    @property
    def _now(self) -> Attached[G]:
        if self._attached is None:
            raise StateError("the guest is not attached", guest=self.name)
        return self._attached

    def _check(self, found: dict[str, Any]) -> None:
        wanted = self.params.as_dict()
        different = [f"{key} {wanted[key]} and not {found.get(key)}" for key in wanted if wanted[key] != found.get(key)]
        if different:
            raise GuestError(
                f"the guest that runs in {self._runtime} is another one: wanted {', '.join(different)}",
                hint="end that guest, or change the configuration back",
                guest=self.name,
            )


def mapped(fds: Sequence[int]) -> Memory:
    """The files of the regions, whole, to be read."""
    return [map_file(fd, writable=False).reshape(-1, PAGE_SIZE) for fd in fds]
