"""Is the promoted sim guest right? From seed and parameters alone: the same machine, never interrupted, and all it
said."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ckptd.config import GuestConfig
from ckptd.demo.proof import OutputsFound, Proof, compare_memory, read_image
from ckptd.guests.process.link import GuestLink
from ckptd.guests.sim import SimGuest, params_from
from ckptd.guests.sim.machine import Output, Params, header_of
from ckptd.guests.sim.oracle import run_to
from ckptd.memory.hashing import Rows

__all__ = ["SimProver", "compare_outputs", "prove", "read_outputs"]


class SimProver:
    unit = "outputs"

    def released(self, output: Path) -> int:
        outputs = read_outputs(output)
        return outputs[-1].number if outputs else 0

    def prove(
        self, guest: GuestConfig, runtime: Path, images: Sequence[Path], outputs: tuple[Path, Path]
    ) -> Proof | None:
        stopped = asyncio.run(_stop_guest(runtime))
        if stopped is None:
            return None
        step, state = stopped
        sides = [read_outputs(path) for path in outputs]
        return prove(params_from(guest), step, state, read_image(images), sides)


def read_outputs(path: Path) -> list[Output]:
    """The lines of an output file, `number step content`; none if it is not there.

    A last line without its end was never released: its writer was killed in the middle. Raises ValueError for any
    other line that is none.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text("ascii").split("\n")
    parts = [line.split(" ") for line in lines]
    return [Output(int(number), int(step), bytes.fromhex(content)) for number, step, content in parts]


def compare_outputs(sides: Sequence[Sequence[Output]], expected: Sequence[Output]) -> OutputsFound:
    """Everything that was released, in the order of the sides, against what an uninterrupted run says."""
    found = OutputsFound()
    first: dict[int, Output] = {}
    for output in (one for side in sides for one in side):
        before = first.setdefault(output.number, output)
        if before is not output:
            found.repeated += 1
            if before != output and output.number not in found.contradicted:
                found.contradicted.append(output.number)
    found.released = len(first)
    right = {output.number: output for output in expected}
    found.lost = [number for number in range(1, max([*first, *right], default=0) + 1) if number not in first]
    found.wrong = [number for number, output in sorted(first.items()) if right.get(number) != output]
    return found


def prove(params: Params, step: int, state: bytes, image: Sequence[Rows], sides: Sequence[Sequence[Output]]) -> Proof:
    """Run the machine anew to `step` and compare: memory, state and outputs. Takes as long as the guest's steps do."""
    expected = run_to(params, step)
    return Proof(
        step=step, memory=compare_memory(params.geometry, expected.memory, image),
        state_equal=state == expected.state, outputs=compare_outputs(sides, expected.outputs),
    )  # fmt: skip


async def _stop_guest(runtime: Path) -> tuple[int, bytes] | None:
    """Pause the guest's process between two steps, take its state, and end it. Its memory stays in the image."""
    link = await GuestLink.open(runtime, SimGuest.module)
    try:
        if link.started:
            return None
        state: bytes = link.ask({"op": "pause"})[0]["state"]
    finally:
        await link.end()
    return header_of(state).step, state
