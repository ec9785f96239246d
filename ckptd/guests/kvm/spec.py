"""What a kvm guest is, and its map of guest-physical memory.

    0x01000   boot block     written once, see `boot_block`
    0x02000   vCPU blocks    64 bytes for each vCPU, the program's own
    0x03000   lock           one u32
    0x04000   code           the program, entered at its first byte, at most 16 KiB
    0x08000   line buffers   256 bytes for each vCPU
    0x10000   work area      from here to the end of the first region; every other region whole

A region is a memslot. The first begins at 0, each next one at the following multiple of 2 MiB after a hole of 2 MiB,
or at 4 GiB where it would reach into the last GiB below that (devices, the TSS). vCPUs start in flat 32-bit protected
mode without paging, so programs use what lies below 4 GiB. Pure.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from ckptd.errors import ConfigError
from ckptd.memory.regions import Geometry, Region
from ckptd.units import PAGE_SIZE

__all__ = [
    "BATCH", "BOOT_BLOCK", "CODE", "CODE_BYTES", "LINES", "LINE_BYTES", "LOCK", "MAX_VCPUS", "PROGRAMS",
    "VCPU_BLOCKS", "VCPU_BLOCK_BYTES", "WORK", "KvmSpec",
]  # fmt: skip

BOOT_BLOCK, VCPU_BLOCKS, LOCK, CODE, LINES, WORK = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000, 0x10000
CODE_BYTES = LINES - CODE
VCPU_BLOCK_BYTES, LINE_BYTES = 64, 256
MAX_VCPUS = 64
BATCH = 64
"""Pages that a program writes between two marks on the control port."""

PROGRAMS = ("counter", "patterns", "random", "kv")
_MAGIC = 0x44545043  # "CPTD"
_STEP = 2 << 20
_BELOW = 3 << 30  # regions that begin under 4 GiB end here
_HIGH = 4 << 30
_MIN_FIRST = 2 * WORK // PAGE_SIZE
_MAX_AREAS = 64


@dataclass(frozen=True, slots=True)
class KvmSpec:
    """A guest: its memory, program and vCPUs. `rate` in pages a second, 0 for flat out; it changes no state.

    `output_every`: batches of a vCPU between two lines that it writes to its console.
    """

    geometry: Geometry
    program: str = "random"
    vcpus: int = 1
    seed: int = 1
    output_every: int = 16
    rate: int = 0

    def __post_init__(self) -> None:
        if self.program not in PROGRAMS:
            raise ConfigError(
                f"no program {self.program!r} for a kvm guest", hint=f"one of {', '.join(PROGRAMS)}", field="workload"
            )
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise ConfigError(f"a kvm guest has 1 to {MAX_VCPUS} vCPUs, not {self.vcpus}", field="vcpus")
        if self.output_every < 1 or self.rate < 0 or not 0 <= self.seed < 1 << 63:
            raise ConfigError("output_every must be at least 1, rate and seed at least 0")
        if self.geometry[0].pages < _MIN_FIRST:
            raise ConfigError(
                f"the first region of a kvm guest has at least {_MIN_FIRST} pages, not {self.geometry[0].pages}",
                region=self.geometry[0].name,
            )
        if len(self.areas) > _MAX_AREAS:
            raise ConfigError(f"a program of a kvm guest uses at most {_MAX_AREAS} regions")

    @property
    def places(self) -> list[int]:
        """The guest-physical address of each region."""
        places: list[int] = []
        end = 0
        for region in self.geometry:
            start = 0 if not places else -(-end // _STEP) * _STEP + _STEP
            if places and start < _HIGH and start + region.size_bytes > _BELOW:
                start = _HIGH
            places.append(start)
            end = start + region.size_bytes
        return places

    @property
    def areas(self) -> list[tuple[int, int]]:
        """(gpa, pages) of what the program works on, in the order of the regions."""
        found = []
        for index, (region, place) in enumerate(zip(self.geometry, self.places, strict=True)):
            start = WORK if index == 0 else place
            end = min(place + region.size_bytes, _BELOW)
            if start < end:
                found.append((start, (end - start) // PAGE_SIZE))
        return found

    @property
    def seed_word(self) -> int:
        """The seed as programs of 32 bits have it."""
        return (self.seed ^ self.seed >> 32) & 0xFFFFFFFF

    def boot_block(self) -> bytes:
        """What a program finds at BOOT_BLOCK, all u32:

        0 magic | 4 vcpus | 8 seed, in one word | 12 output_every | 16 batch | 20 areas | 24 pages of all areas
        28 0 | 32 ... gpa | pages, for each area
        """
        areas = self.areas
        head = (_MAGIC, self.vcpus, self.seed_word, self.output_every, BATCH, len(areas))
        flat = [value for area in areas for value in area]
        return struct.pack(f"<{8 + len(flat)}I", *head, sum(pages for _, pages in areas), 0, *flat)

    def as_dict(self) -> dict[str, Any]:
        return {
            "regions": [[region.name, region.pages] for region in self.geometry],
            "program": self.program,
            "vcpus": self.vcpus,
            "seed": self.seed,
            "output_every": self.output_every,
            "rate": self.rate,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> KvmSpec:
        rest = {key: value for key, value in raw.items() if key != "regions"}
        return cls(Geometry(tuple(Region(name, pages) for name, pages in raw["regions"])), **rest)
