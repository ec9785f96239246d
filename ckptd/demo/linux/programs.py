"""The guest's own programs: assembled from the sources beside this file into small static Linux programs.

    counter     port 7: each line gets the next number of a counter that is in the guest's memory
    patterns    port 8: pages that say what they are, checked on request; and `poweroff`
    spin        port 9: how far a loop has counted, to measure the guest's speed from outside
    dirty       writes to pages that chance picks, at a given rate
    say         writes numbered lines to the serial console, at a given rate

The sources say more. Ports are given to the assembler, so that they stand in one place.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ckptd.errors import GuestError

__all__ = ["CONTROL_PORT", "COUNTER_PORT", "PATTERNS_MAGIC", "PROGRAMS", "SPIN_PORT", "assemble"]

COUNTER_PORT, CONTROL_PORT, SPIN_PORT = 7, 8, 9

PATTERNS_MAGIC = int.from_bytes(b"ckptPAGE", "little")
"""The first 8 bytes of each page of `patterns`; the 8 bytes after them are its number."""

PROGRAMS = ("counter", "patterns", "spin", "dirty", "say")

_SOURCES = Path(__file__).parent
_SYMBOLS: Mapping[str, int] = {
    "COUNTER_PORT": COUNTER_PORT, "CONTROL_PORT": CONTROL_PORT, "SPIN_PORT": SPIN_PORT,
    "PATTERNS_MAGIC": PATTERNS_MAGIC,
}  # fmt: skip


def assemble(name: str) -> bytes:
    """A program, as an ELF file. Raises GuestError."""
    with tempfile.TemporaryDirectory(prefix="ckptd-") as place:
        linked, unlinked = Path(place, "program"), Path(place, "program.o")
        symbols = [f"--defsym={symbol}={value}" for symbol, value in _SYMBOLS.items()]
        _run("as", ["--64", "-I", str(_SOURCES), "-o", str(unlinked), *symbols, str(_SOURCES / f"{name}.S")])
        _run("ld", ["-m", "elf_x86_64", "-static", "-s", "-z", "noexecstack", "-o", str(linked), str(unlinked)])
        return linked.read_bytes()


def _run(tool: str, arguments: list[str]) -> None:
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise GuestError(
            f"the programs of the Linux guest are assembled, and there is no {tool!r} here",
            hint="apt-get install binutils",
        ) from error
    if done.returncode:
        raise GuestError(f"{tool} failed: {done.stderr.strip()}")
