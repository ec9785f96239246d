"""What a sim guest must be after n steps: the same machine over plain arrays, never paused, moved or interrupted.

The demo, the tests and replay prove a guest right by it. Costs as many steps as the guest made; pages that no step
touched stay zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError
from ckptd.guests.sim.machine import Machine, Output, Params
from ckptd.units import PAGE_SIZE

__all__ = ["Run", "continue_from", "run_to"]


class Run(NamedTuple):
    """The end of a run: memory (pages, 4096) for each region, saved state, and the outputs of this run."""

    memory: list[npt.NDArray[np.uint8]]
    state: bytes
    outputs: list[Output]


def run_to(params: Params, step: int) -> Run:
    """The guest after `step` steps from its start."""
    memory = [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in params.geometry]
    return _run(Machine(params, _words(memory)), memory, step)


def continue_from(memory: Sequence[npt.NDArray[np.uint8]], state: bytes, step: int) -> Run:
    """The guest after `step` steps, going on from a saved state over a copy of `memory`. Raises GuestError if it is
    past that."""
    copies = [rows.copy() for rows in memory]
    return _run(Machine.restored(state, _words(copies)), copies, step)


def _words(memory: Sequence[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.uint64]]:
    return [rows.reshape(-1).view(np.uint64) for rows in memory]


def _run(machine: Machine, memory: list[npt.NDArray[np.uint8]], step: int) -> Run:
    if step < machine.step:
        raise GuestError(f"the state is at step {machine.step}, past step {step}")
    outputs = []
    while machine.step < step:
        output = machine.run_step()
        if output is not None:
            outputs.append(output)
    return Run(memory, machine.save(), outputs)
