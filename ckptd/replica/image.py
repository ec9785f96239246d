"""The image: the committed memory of a guest, one mapped file for each region.

Pages go in and out in numpy batches, never one by one. The files are allocated in full before they are mapped, so
that a store cannot end in SIGBUS. Knows no epoch.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ckptd.memory.batch import RAW, ZERO
from ckptd.memory.dirtyset import Gfns
from ckptd.memory.hashing import Rows
from ckptd.memory.regions import Geometry
from ckptd.protocol.pages import Pages
from ckptd.replica.files import allocate, image_names, map_file, populate, saying, sync_file
from ckptd.replica.segment import rows_of
from ckptd.units import PAGE_SIZE

__all__ = ["Image", "gather"]


class Image:
    """The mapped files. `rows` are writable arrays (pages, 4096), one for each region."""

    def __init__(self, directory: Path, geometry: Geometry, *, create: bool) -> None:
        """Create the files, all zeros, or map existing ones. Raises NoSpace, leaving nothing, and ReplicaError."""
        self.geometry = geometry
        self.paths = [directory / name for name in image_names(geometry)]
        self.fds: list[int] = []
        self._maps: list[mmap.mmap] = []
        self.rows: list[Rows] = []
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
        try:
            for region, path in zip(geometry, self.paths, strict=True):
                with saying("open an image file", path):
                    fd = os.open(path, flags, 0o600)
                self.fds.append(fd)
                if create:
                    allocate(fd, 0, region.size_bytes, path)
                with saying("map an image file", path):
                    self._maps.append(map_file(fd, region.size_bytes))
                populate(self._maps[-1], 0, region.size_bytes, write=create)
                self.rows.append(np.frombuffer(self._maps[-1], dtype=np.uint8).reshape(-1, PAGE_SIZE))
        except BaseException:
            self.close()
            if create:
                self.unlink()
            raise

    @staticmethod
    def missing(directory: Path, geometry: Geometry) -> str:
        """What of the image's files is not there, in words; empty if all are. Raises OSError if nobody can tell."""
        for region, name in zip(geometry, image_names(geometry), strict=True):
            try:
                size = (directory / name).stat().st_size
            except FileNotFoundError:
                return f"{name} is missing"
            if size != region.size_bytes:
                return f"{name} has {size} bytes, not {region.size_bytes}"
        return ""

    def scatter(self, pages: Pages, payload: memoryview) -> None:
        """Put the pages of a frame where they belong."""
        image = self.rows[pages.region]
        if pages.contiguous:
            image[pages.gfns[0] : pages.gfns[0] + len(pages.gfns)] = rows_of(payload)
        elif pages.raw == len(pages.gfns):
            image[pages.gfns] = rows_of(payload)
        else:
            image[pages.gfns[pages.kinds == RAW]] = rows_of(payload)
            image[pages.gfns[pages.kinds == ZERO]] = 0

    def sync(self) -> None:
        """The image as it is, on stable storage. Pages that are written meanwhile may or may not be."""
        for path, mapped, fd in zip(self.paths, self._maps, self.fds, strict=True):
            with saying("write the image to stable storage", path):
                mapped.flush()
            sync_file(fd, path)

    def copy_from(self, rows: Sequence[Rows]) -> None:
        """Every page of another memory of the same geometry, 16 MiB at a time."""
        for mine, theirs in zip(self.rows, rows, strict=True):
            for start in range(0, len(mine), 4096):
                mine[start : start + 4096] = theirs[start : start + 4096]

    def close(self) -> None:
        """Let go. The mappings live on while somebody has an array of them."""
        for fd in self.fds:
            os.close(fd)
        self.fds, self.rows, self._maps = [], [], []

    def unlink(self) -> None:
        for path in self.paths:
            path.unlink(missing_ok=True)


def gather(rows: Rows, gfns: Gfns, out: memoryview) -> None:
    """Copy these pages, in order, into `out`. mode="clip" because any other buffers the whole output once more."""
    if int(gfns[-1]) - int(gfns[0]) + 1 == len(gfns):
        rows_of(out)[:] = rows[gfns[0] : gfns[0] + len(gfns)]
    else:
        np.take(rows, gfns, axis=0, out=rows_of(out), mode="clip")
