"""Private memory, read out of another process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from mmap import mmap

import numpy as np
import pytest

from ckptd.errors import GuestError
from ckptd.guests.process.shared import map_file
from ckptd.guests.qemu.ram import PrivateRam, map_backing, open_backing
from ckptd.guests.qemu.survey import Backend
from ckptd.units import PAGE_SIZE

PAGES = 5000

_CHILD = """
import ctypes, mmap, os, sys
memory = mmap.mmap(int(sys.argv[1]), int(sys.argv[2]))
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def child() -> Iterator[tuple[int, int, int, np.ndarray]]:  # type: ignore[type-arg]
    """Its pid, where it has a file mapped, that file, and the same bytes as we see them."""
    file = os.memfd_create("ram")
    os.ftruncate(file, PAGES * PAGE_SIZE)
    rows = map_file(file).reshape(-1, PAGE_SIZE)
    rows[:] = np.random.default_rng(1).integers(0, 256, rows.shape, dtype=np.uint8)
    command = [sys.executable, "-c", _CHILD, str(file), str(PAGES * PAGE_SIZE)]
    with subprocess.Popen(command, pass_fds=[file], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield process.pid, int(process.stdout.readline()), file, rows
        finally:
            process.kill()


def test_it_reads_what_the_process_has(child: tuple[int, int, int, np.ndarray]) -> None:  # type: ignore[type-arg]
    pid, address, _, rows = child
    ram = PrivateRam(pid, address, PAGES, "ram")
    assert len(ram) == PAGES and ram.shape == rows.shape
    assert np.array_equal(ram[100:300], rows[100:300]) and len(ram[7:7]) == 0
    chance = np.random.default_rng(2)
    every_other = np.arange(0, PAGES, 2)  # 2,500 runs: three calls
    for gfns in (every_other, np.flatnonzero(chance.random(PAGES) < 0.7), np.arange(PAGES), np.array([PAGES - 1])):
        out = np.zeros((len(gfns), PAGE_SIZE), dtype=np.uint8)
        ram.read_pages(gfns, out)
        assert np.array_equal(out, rows[gfns])
    ram.read_pages(np.empty(0, dtype=np.int64), np.empty((0, PAGE_SIZE), dtype=np.uint8))


def test_the_file_behind_it_is_found_by_its_inode(
    child: tuple[int, int, int, np.ndarray],  # type: ignore[type-arg]
) -> None:
    pid, address, file, rows = child
    found = os.fstat(file)
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    size = 100 * PAGE_SIZE
    backend = Backend(
        "ram", "memory-backend-memfd", size, True, True, "ram", PAGE_SIZE, address, device, found.st_ino, PAGE_SIZE * 8
    )
    opened = open_backing(pid, backend)
    try:
        assert os.path.samestat(os.fstat(opened), found) and np.array_equal(map_backing(opened, backend), rows[8:108])
        with pytest.raises(ValueError, match="read-only"):
            map_backing(opened, backend)[0] = 1
    finally:
        os.close(opened)
    private = Backend("ram", "memory-backend-ram", size, False, True, "ram", PAGE_SIZE, address)
    assert open_backing(pid, private) == -1
    other = Backend("ram", "", size, True, True, "ram", PAGE_SIZE, address, device, found.st_ino + 10**6)
    with pytest.raises(GuestError, match="cannot be opened"):
        open_backing(pid, other)


def test_what_cannot_be_read_is_an_error_and_no_zeros() -> None:
    memory = mmap(-1, 3 * PAGE_SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    page = np.array([1], dtype=np.int64)
    out = np.empty((1, PAGE_SIZE), dtype=np.uint8)
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(GuestError, match=r"cannot be read: No such process .*region ram, gfn 1"):
        PrivateRam(process.pid, address, 3, "ram").read_pages(page, out)
    with pytest.raises(GuestError, match="Bad address"):
        PrivateRam(os.getpid(), PAGE_SIZE, 3, "ram").read_pages(page, out)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(address + PAGE_SIZE), ctypes.c_size_t(PAGE_SIZE), 0) == 0
    with pytest.raises(GuestError, match="of 12288 bytes"):  # the first page can be read
        PrivateRam(os.getpid(), address, 3, "ram")[0:3]
