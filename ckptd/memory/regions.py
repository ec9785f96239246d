"""Regions: what a guest's memory is made of.

A region is one contiguous range of guest memory (a KVM memslot, a QEMU RAM block). Pages are named by region index and
gfn, the page's number within its region. Rules: pages are 4,096 bytes; a region has at most 2**32 pages.
Knows nothing of where the bytes are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptd.errors import ConfigError
from ckptd.units import PAGE_SIZE, format_size

__all__ = ["Geometry", "Region"]

MAX_REGIONS = 1024
MAX_REGION_PAGES = 1 << 32


@dataclass(frozen=True, slots=True)
class Region:
    """One contiguous range of guest memory: a name and a number of pages."""

    name: str
    pages: int

    def __post_init__(self) -> None:
        if not 0 < self.pages <= MAX_REGION_PAGES:
            raise ConfigError(f"a region must have 1 to {MAX_REGION_PAGES} pages, not {self.pages}", region=self.name)

    @property
    def size_bytes(self) -> int:
        return self.pages * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Geometry:
    """All regions of a guest, in the order in which both sides number them."""

    regions: tuple[Region, ...]

    def __post_init__(self) -> None:
        names = [region.name for region in self.regions]
        if not 0 < len(names) <= MAX_REGIONS:
            raise ConfigError(f"a guest must have 1 to {MAX_REGIONS} regions, not {len(names)}")
        if len(set(names)) != len(names):
            raise ConfigError(f"region names must differ: {', '.join(names)}")

    @classmethod
    def of(cls, **pages: int) -> Geometry:
        """`Geometry.of(ram=256)`: regions by name and number of pages."""
        return cls(tuple(Region(name, count) for name, count in pages.items()))

    @property
    def pages(self) -> int:
        return sum(region.pages for region in self.regions)

    @property
    def size_bytes(self) -> int:
        return self.pages * PAGE_SIZE

    def __len__(self) -> int:
        return len(self.regions)

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

    def __getitem__(self, index: int) -> Region:
        return self.regions[index]

    def __str__(self) -> str:
        return " + ".join(f"{region.name} {format_size(region.size_bytes)}" for region in self.regions)
