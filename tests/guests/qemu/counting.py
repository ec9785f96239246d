"""A QEMU whose guest counts (counting.S): small, started at once, and what it has said can be checked."""

from __future__ import annotations

import functools
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ckptd.demo.children import kill_guest

from .machines import Machine, started

__all__ = ["Counting", "Receiver", "counting", "eventually", "rom"]

_SOURCE = Path(__file__).with_name("counting.S")
_BASE = 0x20000
_WORDS = 0x100000
_SO_RCVBUFFORCE = 33


@functools.cache
def _code() -> bytes:
    for tool in ("as", "ld"):
        if shutil.which(tool) is None:
            pytest.skip(f"the guest is assembled, and there is no {tool} here")
    with tempfile.TemporaryDirectory(prefix="ckq") as place:
        unlinked, linked = f"{place}/o", f"{place}/rom"
        subprocess.run(["as", "--32", "-mx86-used-note=no", "-o", unlinked, str(_SOURCE)], check=True)
        layout = ["-m", "elf_i386", f"-Ttext={_BASE:#x}", "--oformat", "binary"]
        subprocess.run(["ld", *layout, "-o", linked, unlinked], check=True)
        return Path(linked).read_bytes()


def rom(pages: int, steps: int, every: int, size: int = 60, rate: int = 1193) -> bytes:
    """The ROM, with its parameters at its start (see counting.S)."""
    parameters = struct.pack("<5I", pages, steps, every, size, rate)
    return parameters + _code()[len(parameters) :]


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


class Receiver:
    """The world at the end of a `-netdev stream`: the numbers of the packets that came, for each connection.

    It only stores what comes, by TCP and into a large buffer: what a netdev does not get rid of QEMU drops, and that is
    no fault of the gate's.
    """

    def __init__(self) -> None:
        self._listener = socket.socket()
        with suppress(OSError):
            self._listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port = self._listener.getsockname()[1]
        self._came: list[bytearray] = []
        self._socks: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connections(self) -> list[list[int]]:
        return [_numbers(bytes(came)) for came in self._came]

    @property
    def numbers(self) -> list[int]:
        """Of the first connection on which any came: of the QEMU that was there first."""
        return next((numbers for numbers in self.connections if numbers), [])

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._socks.append(sock)
                self._came.append(bytearray())
                threading.Thread(target=self._read, args=(sock, self._came[-1]), daemon=True).start()

    def _read(self, sock: socket.socket, came: bytearray) -> None:
        with suppress(OSError):
            while data := sock.recv(1 << 20):
                came += data

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for sock in (self._listener, *self._socks):
            sock.close()


def _numbers(came: bytes) -> list[int]:
    found, at = [], 0
    while len(came) - at >= 4 and len(came) - at >= 4 + (length := int.from_bytes(came[at : at + 4])):
        if came[at + 16 : at + 18] == b"\x88\xb5":  # others are announcements
            found.append(int.from_bytes(came[at + 18 : at + 22], "little"))
        at += 4 + length
    return found


class Counting:
    """The QEMU, its operator's monitor (`operator`), the one for ckptd (`qmp`), and its world."""

    def __init__(self, operator: Machine, place: Path, receiver: Receiver) -> None:
        self.operator, self.place, self.receiver = operator, place, receiver
        self.qmp, self.runtime = place / "k", place / "run"
        self.pid = operator.pid

    def words(self) -> tuple[int, int, int, int]:
        """What the guest has in its memory: its counter, faults, packets sent, ticks."""
        said = self.operator.ask("human-monitor-command", {"command-line": f"xp /4xw {_WORDS:#x}"})
        one, two, three, four = (int(word, 16) for word in said.partition(": ")[2].split())
        return one, two, three, four

    @property
    def counter(self) -> int:
        return self.words()[0]

    def hurry(self, steps: int) -> None:
        """So many steps a tick from now on."""
        said = self.operator.ask("human-monitor-command", {"command-line": f"gpa2hva {_BASE + 4:#x}"})
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(int(said.split()[-1], 16))
            memory.write(struct.pack("<I", steps))

    def status(self) -> str:
        return str(self.operator.ask("query-status")["status"])

    def goes_on(self) -> None:
        """Returns when it has; never says that it does not."""
        before = self.counter
        eventually(lambda: self.counter != before)
        assert self.words()[1] == 0, "memory and registers are not of one moment"

    def stands(self) -> bool:
        before = self.words()
        time.sleep(0.05)
        return self.words() == before and self.status() != "running"


@contextmanager
def counting(
    *more: str, pages: int = 64, steps: int = 20, every: int = 0, size: int = 60, machine: str = "pc",
    memory: str = "16M", accel: str = "tcg", share: bool = True, cards: int = 0,
) -> Iterator[Counting]:  # fmt: skip
    """With `cards` network devices, of which the first is used if `every` says so. All ends with the block."""
    place = Path(tempfile.mkdtemp(prefix="ckq", dir="/tmp"))
    receiver = Receiver()
    try:
        (place / "rom").write_bytes(rom(pages, steps, every, size))
        arguments = ["-accel", accel, "-m", memory, "-nodefaults", "-no-user-config", "-display", "none"]
        arguments += ["-bios", str(place / "rom"), "-qmp", f"unix:{place}/k,server=on,wait=off"]
        if share:
            arguments += ["-object", f"memory-backend-memfd,id=ram,size={memory},share=on"]
            machine += ",memory-backend=ram"
        for card in range(cards):
            world = f"server=off,addr.type=inet,addr.host=127.0.0.1,addr.port={receiver.port}"
            arguments += ["-netdev", f"stream,id=n{card},{world}"]
            arguments += ["-device", f"ne2k_isa,netdev=n{card},iobase={0x300 + 32 * card:#x},irq={9 + card}"]
        with started("-M", machine, *arguments, *more, cwd=place) as operator:
            guest = Counting(operator, place, receiver)
            if "-S" not in more:
                eventually(lambda: guest.counter > 0)
            try:
                yield guest
            finally:
                kill_guest(guest.runtime)
    finally:
        receiver.close()
        shutil.rmtree(place, ignore_errors=True)
