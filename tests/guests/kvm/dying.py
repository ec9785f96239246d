"""The VMM's process, which kills itself at the n-th passage of a named point: DIE_AT="point:n"."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from ckptd.guests.kvm import machine
from ckptd.guests.kvm.guest import KvmGuest
from ckptd.guests.kvm.machine import Machine
from ckptd.guests.kvm.process import KvmProcess, main

__all__ = ["POINTS", "DyingGuest"]

POINTS = (
    "pause: asked", "pause: done", "harvest: asked", "harvest: read", "harvest: taken", "save: asked",
    "save: one vCPU", "save: written", "resume: asked",
)  # fmt: skip


class DyingGuest(KvmGuest):
    module = "tests.guests.kvm.dying"


def _at(point: str) -> None:
    wanted, _, count = os.environ["DIE_AT"].rpartition(":")
    if point == wanted:
        os.environ["DIE_AT"] = f"{wanted}:{int(count) - 1}"
        if int(count) <= 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: Any, name: str, before: str = "", after: str = "") -> None:
    inner: Callable[..., Any] = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if before:
            _at(before)
        result = inner(*arguments, **named)
        if after:
            _at(after)
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    _wrap(Machine, "pause", "pause: asked", "pause: done")
    _wrap(Machine, "get_dirty_log", after="harvest: read")  # and, with manual clear, nothing is reset yet
    _wrap(Machine, "reset_rings", after="harvest: read")
    _wrap(KvmProcess, "_harvest", "harvest: asked", "harvest: taken")
    _wrap(KvmProcess, "_save", "save: asked", "save: written")
    _wrap(machine, "save_vcpu", after="save: one vCPU")
    _wrap(Machine, "resume", "resume: asked")
    main()
