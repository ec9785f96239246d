"""A plain process with memory of its own that does what it is told: the guest of the trackers that look from outside.

Run as a program it is that process: `plain_process.py KIND PAGES,PAGES,... FD FD ...`, a socket for each of its vCPUs,
which are threads. It imports nothing that is slow.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PAGE = 4096
KINDS = ("memfd", "private", "huge", "split")
_COMMAND = struct.Struct("<cIqq")  # what, region, two numbers; then so many i64 for "w"

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

MADV_DONTNEED, MADV_DONTFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 4, 10, 14, 15
_MAP_FIXED = 0x10
_MREMAP_TO = 3  # MREMAP_MAYMOVE | MREMAP_FIXED


class PlainProcess:
    """The side that tells. `addresses`: where its regions are."""

    def __init__(self, process: subprocess.Popen[bytes], sockets: Sequence[socket.socket]) -> None:
        self.process = process
        self.pid = process.pid
        self._sockets = sockets
        count = struct.unpack("<Q", sockets[0].recv(8, socket.MSG_WAITALL))[0]
        self.addresses = list(struct.unpack(f"<{count}Q", sockets[0].recv(8 * count, socket.MSG_WAITALL)))

    def write(self, vcpu: int, region: int, gfns: Sequence[int]) -> None:
        """The vCPU changes these pages; returns when it has."""
        pages = array("q", gfns)
        self._sockets[vcpu].sendall(_COMMAND.pack(b"w", region, len(pages), 0) + pages.tobytes())
        self._done(vcpu)

    def tell(self, what: bytes, region: int = 0, first: int = 0, pages: int = 0, *, vcpu: int = 0) -> None:
        """See `_obey`."""
        self.begin(what, region, first, pages, vcpu=vcpu)
        self._done(vcpu)

    def begin(self, what: bytes, region: int = 0, first: int = 0, pages: int = 0, *, vcpu: int = 0) -> None:
        """Without waiting."""
        self._sockets[vcpu].sendall(_COMMAND.pack(what, region, first, pages))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def descriptors(self) -> list[str]:
        return sorted(os.listdir(f"/proc/{self.pid}/fd"))

    def vm_flags(self) -> set[str]:
        """Those of all its mappings: "uw" is write protection by userfaultfd."""
        lines = Path(f"/proc/{self.pid}/smaps").read_text().splitlines()
        return {flag for line in lines if line.startswith("VmFlags:") for flag in line.split()[1:]}

    def _done(self, vcpu: int) -> None:
        assert self._sockets[vcpu].recv(1) == b".", "the process ended"


@contextmanager
def plain_process(kind: str, pages: Sequence[int], vcpus: int = 1) -> Iterator[PlainProcess]:
    pairs = [socket.socketpair() for _ in range(vcpus)]
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    fds = [one.fileno() for one in theirs]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, kind, ",".join(map(str, pages)), *map(str, fds)], pass_fds=fds
    )
    for one in theirs:
        one.close()
    try:
        yield PlainProcess(process, ours)
    finally:
        process.kill()
        process.wait()
        for one in ours:
            one.close()


class _Memory:
    def __init__(self, kind: str, pages: Sequence[int]) -> None:
        self.kind = kind
        self.sizes = [PAGE * one for one in pages]
        self.fds = [os.memfd_create("guest") if kind == "memfd" else -1 for _ in pages]
        for fd, size in zip(self.fds, self.sizes, strict=True):
            if fd >= 0:
                os.truncate(fd, size)
        self.addresses = [_map(size, fd) for fd, size in zip(self.fds, self.sizes, strict=True)]
        for address, size in zip(self.addresses, self.sizes, strict=True):
            if kind == "huge":
                libc.madvise(address, size, MADV_HUGEPAGE)
                ctypes.memset(address, 1, size)
            elif kind == "private":
                libc.madvise(address, size, MADV_NOHUGEPAGE)
            elif kind == "split" and size > 8 * PAGE:  # three mappings, half of it untouched
                libc.madvise(address + 2 * PAGE, 3 * PAGE, MADV_DONTFORK)
                ctypes.memset(address, 1, size // 2)

    def touch(self, region: int, gfns: Sequence[int]) -> None:
        for gfn in gfns:
            ctypes.c_uint64.from_address(self.addresses[region] + gfn * PAGE).value += 1


def _map(size: int, fd: int, at: int = 0) -> int:
    flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, flags | (_MAP_FIXED if at else 0), fd, 0)
    assert address not in (None, (1 << 64) - 1)
    return int(address)


def _serve(memory: _Memory, link: socket.socket) -> None:
    while data := link.recv(_COMMAND.size, socket.MSG_WAITALL):
        what, region, first, count = _COMMAND.unpack(data)
        if what == b"w":
            gfns = array("q")
            if first:
                gfns.frombytes(link.recv(8 * first, socket.MSG_WAITALL))
            memory.touch(region, gfns)
        else:
            _obey(memory, what, region, memory.addresses[region] + first * PAGE, count * PAGE, link)
        link.sendall(b".")
    os._exit(0)


def _obey(memory: _Memory, what: bytes, region: int, address: int, size: int, link: socket.socket) -> None:
    if what == b"d":  # discard
        libc.madvise(address, size, MADV_DONTNEED)
    elif what == b"u":  # unmap
        libc.munmap(address, size)
    elif what == b"a":  # map the same anew, from the region's start
        _map(size, memory.fds[region], memory.addresses[region])
    elif what == b"o":  # map another file there
        _map(size, os.memfd_create("other"), address)
    elif what == b"m":  # move it away
        libc.mremap(address, size, size, _MREMAP_TO, _map(size, -1))
    elif what == b"x":  # become another program
        os.execv("/bin/sleep", ["sleep", "60"])
    elif what == b"l":  # write here and there until the next command
        state = region + 1
        link.setblocking(False)
        pages = memory.sizes[region] // PAGE
        while True:
            for _ in range(50):
                state = (state * 6364136223846793005 + 1442695040888963407) & ((1 << 64) - 1)
                memory.touch(region, [(state >> 33) % pages])
            try:
                link.recv(_COMMAND.size)
                break
            except BlockingIOError:
                continue
        link.setblocking(True)


def main() -> None:
    memory = _Memory(sys.argv[1], [int(one) for one in sys.argv[2].split(",")])
    links = [socket.socket(fileno=int(fd)) for fd in sys.argv[3:]]
    links[0].sendall(struct.pack(f"<{1 + len(memory.addresses)}Q", len(memory.addresses), *memory.addresses))
    for link in links[1:]:
        threading.Thread(target=_serve, args=(memory, link), daemon=True).start()
    _serve(memory, links[0])


if __name__ == "__main__":
    main()
