"""Is the promoted guest right? From seed and parameters alone: the same machine, never interrupted, and all it said.

Pure but for the files that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ckptd.guests.sim.machine import Output, Params
from ckptd.guests.sim.oracle import run_to
from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import PageHasher, Rows
from ckptd.units import PAGE_SIZE

__all__ = ["OutputsFound", "Proof", "compare_outputs", "prove", "read_image", "read_outputs"]


@dataclass(slots=True)
class OutputsFound:
    """What left the guest, on all sides together. The lists are of output numbers."""

    released: int = 0
    repeated: int = 0
    lost: list[int] = field(default_factory=list)  # between 1 and the last one, and nowhere
    contradicted: list[int] = field(default_factory=list)  # with two different contents
    wrong: list[int] = field(default_factory=list)  # not what the uninterrupted run says


@dataclass(slots=True)
class Proof:
    """The end of a promoted guest beside an uninterrupted run of as many steps."""

    step: int
    digest: str
    expected_digest: str
    differing_pages: int
    state_equal: bool
    outputs: OutputsFound

    @property
    def digest_equal(self) -> bool:
        return self.digest == self.expected_digest


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
    table = HashTable(params.geometry, PageHasher(0))
    table.rehash(expected.memory)
    expected_digest = table.digest
    differing = table.rehash(image)
    return Proof(
        step=step, digest=table.digest.hex(), expected_digest=expected_digest.hex(), differing_pages=differing.pages,
        state_equal=state == expected.state, outputs=compare_outputs(sides, expected.outputs),
    )  # fmt: skip


def read_image(files: Sequence[Path]) -> list[Rows]:
    """The image files, mapped; (pages, 4096) each."""
    return [np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, PAGE_SIZE) for path in files]
