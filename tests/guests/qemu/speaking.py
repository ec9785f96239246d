"""A QEMU whose guest says numbered lines on its serial port (speaking.S): what must be in a file is known."""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.demo.children import kill_guest

from .counting import eventually
from .machines import Machine, started

__all__ = ["Speaking", "follows", "speaking"]

_SOURCE = Path(__file__).with_name("speaking.S")
_LINE = 9


@functools.cache
def _code() -> bytes:
    for tool in ("as", "ld"):
        if shutil.which(tool) is None:
            pytest.skip(f"the guest is assembled, and there is no {tool} here")
    with tempfile.TemporaryDirectory(prefix="ckq") as place:
        unlinked, linked = f"{place}/o", f"{place}/rom"
        subprocess.run(["as", "--32", "-mx86-used-note=no", "-o", unlinked, str(_SOURCE)], check=True)
        subprocess.run(["ld", "-m", "elf_i386", "-Ttext=0", "--oformat", "binary", "-o", linked, unlinked], check=True)
        return Path(linked).read_bytes()


def said(lines: int) -> bytes:
    return b"".join(b"%08d\n" % number for number in range(1, lines + 1))


def follows(data: bytes, start: int | None = None) -> tuple[int, int]:
    """Where in all that the guest says `data` begins and ends. It must be of one piece, and begin at `start`."""
    assert len(data) > 2 * _LINE, f"only {data!r}"
    end = data.index(b"\n", _LINE) + 1  # of a line that is whole
    begin = _LINE * int(data[end - _LINE : end]) - end
    expected = said((begin + len(data)) // _LINE + 1)[begin:][: len(data)]
    if data != expected:
        at = next(i for i, (one, other) in enumerate(zip(data, expected, strict=True)) if one != other)
        raise AssertionError(f"at byte {at} of {len(data)}: {data[at - 30 : at + 30]!r}")
    assert start is None or begin == start
    return begin, begin + len(data)


class Speaking:
    """The QEMU, its operator's monitor (`operator`), the one for ckptd (`qmp`)."""

    def __init__(self, operator: Machine, place: Path) -> None:
        self.operator, self.place = operator, place
        self.qmp, self.runtime = place / "k", place / "run"
        self.pid = operator.pid

    @property
    def line(self) -> int:
        """The number of the line that it is saying."""
        answer = self.operator.ask("human-monitor-command", {"command-line": "xp /2xw 0x600"})
        digits = struct.pack("<2I", *(int(word, 16) for word in answer.partition(": ")[2].split()))
        return int(digits) if digits.isdigit() else 0

    def goes_on(self) -> None:
        before = self.line
        eventually(lambda: self.line != before)

    def status(self) -> str:
        return str(self.operator.ask("query-status")["status"])

    def backend(self, label: str) -> str:
        found = self.operator.ask("query-chardev")
        return str(next(one["filename"] for one in found if one["label"] == label))


@contextmanager
def speaking(*more: str, rest: int = 20_000, port: int = 0x3F8, machine: str = "pc") -> Iterator[Speaking]:
    """`more` says where the port leads. All ends with the block."""
    place = Path(tempfile.mkdtemp(prefix="ckq", dir="/tmp"))
    try:
        code = _code()
        (place / "rom").write_bytes(struct.pack("<2I", port, rest) + code[8:])
        arguments = ["-accel", "tcg", "-m", "16M", "-nodefaults", "-no-user-config", "-display", "none"]
        arguments += ["-object", "memory-backend-memfd,id=ram,size=16M,share=on"]
        arguments += ["-bios", str(place / "rom"), "-qmp", f"unix:{place}/k,server=on,wait=off"]
        with started("-M", f"{machine},memory-backend=ram", *arguments, *more, cwd=place) as operator:
            guest = Speaking(operator, place)
            try:
                yield guest
            finally:
                kill_guest(guest.runtime)
    finally:
        shutil.rmtree(place, ignore_errors=True)
