"""The pages that a program works on, by their numbers: the areas of the boot block one after another. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.guests.kvm.spec import KvmSpec
from ckptd.units import PAGE_SIZE

__all__ = ["U32", "Memory", "Numbers", "Pages"]

U32 = npt.NDArray[np.uint32]
Numbers = npt.NDArray[np.int64]
Memory = Sequence[npt.NDArray[np.uint8]]
"""(pages, 4096) for each region."""


class _Part(NamedTuple):
    """An area: pages `first` ... `end` - 1 of the program are the rows from `row` on of a region."""

    first: int
    end: int
    gpa: int
    region: int
    row: int


class Pages:
    """The pages that a program works on, by their numbers."""

    def __init__(self, spec: KvmSpec) -> None:
        self.parts: list[_Part] = []
        self.total = 0
        places = spec.places
        for gpa, count in spec.areas:
            region = max(index for index, place in enumerate(places) if place <= gpa)
            row = (gpa - places[region]) // PAGE_SIZE
            self.parts.append(_Part(self.total, self.total + count, gpa, region, row))
            self.total += count

    def index(self, number: int) -> int:
        """The area of a page."""
        return next(index for index, part in enumerate(self.parts) if number < part.end)

    def gpa(self, number: int) -> int:
        part = self.parts[self.index(number)]
        return part.gpa + (number - part.first) * PAGE_SIZE

    def number(self, region: int, gfn: int) -> int | None:
        """Of the page at this place; None where the program does not work."""
        for part in self.parts:
            if part.region == region and part.row <= gfn < part.row + part.end - part.first:
                return part.first + gfn - part.row
        return None

    def name(self, spec: KvmSpec, number: int) -> str:
        part = self.parts[self.index(number)]
        return f"{spec.geometry[part.region].name} gfn {part.row + number - part.first}: page {number}"

    def store(self, memory: Memory, numbers: Numbers, word: int, values: U32) -> None:
        """(n, k) u32 to the pages of these numbers, which ascend, from u32 `word` of the page on."""
        for part in self.parts:
            start, end = np.searchsorted(numbers, (part.first, part.end))
            rows = numbers[start:end] + (part.row - part.first)
            memory[part.region].view(np.uint32)[rows, word : word + values.shape[1]] = values[start:end]

    def load(self, memory: Memory, word: int, count: int) -> U32:
        """(total, count) u32 from u32 `word` of every page on."""
        return np.concatenate([
            memory[part.region][part.row : part.row + part.end - part.first].view(np.uint32)[:, word : word + count]
            for part in self.parts
        ])  # fmt: skip
