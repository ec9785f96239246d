"""What a proof of a promoted guest is, whatever its kind: memory, registers and outputs beside an uninterrupted run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ckptd.config import GuestConfig
from ckptd.errors import ConfigError
from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import PageHasher, Rows
from ckptd.memory.regions import Geometry
from ckptd.units import PAGE_SIZE

__all__ = ["Compared", "OutputsFound", "Proof", "Prover", "compare_memory", "prover_of", "read_image"]


@dataclass(slots=True)
class OutputsFound:
    """What left the guest, on all sides together. The lists are of output numbers."""

    released: int = 0
    repeated: int = 0
    lost: list[int] = field(default_factory=list)  # between 1 and the last one, and nowhere
    contradicted: list[int] = field(default_factory=list)  # with two different contents
    wrong: list[int] = field(default_factory=list)  # not what the uninterrupted run says


@dataclass(slots=True)
class Compared:
    """An image beside what it must be."""

    digest: str
    expected_digest: str
    differing_pages: int


@dataclass(slots=True)
class Proof:
    """The end of a promoted guest beside an uninterrupted run of as many steps. `named`: some wrong pages, in words."""

    step: int
    memory: Compared
    state_equal: bool
    outputs: OutputsFound
    named: list[str] = field(default_factory=list)

    @property
    def digest_equal(self) -> bool:
        return self.memory.digest == self.memory.expected_digest


class Prover(Protocol):
    """What a kind of guest knows of its own truth."""

    unit: str
    """What outputs are counted in until they are compared."""

    def released(self, output: Path) -> int:
        """The number of the last output in a file."""

    def prove(
        self, guest: GuestConfig, runtime: Path, images: Sequence[Path], outputs: tuple[Path, Path]
    ) -> Proof | None:
        """Stop the guest whose process is in `runtime`, compare it and what both sides let out, and end it.

        None: the guest does not run.
        """


def prover_of(kind: str) -> Prover:
    """The prover of a kind of guest. Raises ConfigError for one that is not deterministic."""
    if kind == "sim":
        from ckptd.demo.prove_sim import SimProver

        return SimProver()
    if kind == "kvm":
        from ckptd.demo.prove_kvm import KvmProver

        return KvmProver()
    raise ConfigError(f"nothing can prove a guest of kind {kind!r}")


def compare_memory(geometry: Geometry, expected: Sequence[Rows], found: Sequence[Rows]) -> Compared:
    """Both hashed whole, page by page."""
    table = HashTable(geometry, PageHasher(0))
    table.rehash(expected)
    wanted = table.digest.hex()
    differing = table.rehash(found)
    return Compared(table.digest.hex(), wanted, differing.pages)


def read_image(files: Sequence[Path]) -> list[Rows]:
    """The image files, mapped; (pages, 4096) each."""
    return [np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, PAGE_SIZE) for path in files]
