"""The programs of kvm guests: assembled from the sources beside this file, and what must be loaded to run one.

    counter    each vCPU adds 1 to a counter of its own in each of the first pages, over and over
    patterns   every page says what it is, and is checked before it is written anew
    random     each vCPU changes slots of its own of pages that chance picks
    kv         a store that answers requests on the console

The sources say what each does; model.py says what must come of it. Addresses, ports and commands are given to the
assembler, so that they stand in one place.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ckptd.errors import GuestError
from ckptd.guests.kvm.devices import COMMAND, LATCH, THR, Command
from ckptd.guests.kvm.spec import (
    BOOT_BLOCK,
    CODE,
    CODE_BYTES,
    LINES,
    LOCK,
    PROGRAMS,
    VCPU_BLOCKS,
    KvmSpec,
)

__all__ = ["assemble", "assemble_file", "image_of"]

_SOURCES = Path(__file__).parent
_SYMBOLS: Mapping[str, int] = {
    "BOOT_BLOCK": BOOT_BLOCK, "VCPU_BLOCKS": VCPU_BLOCKS, "LOCK": LOCK, "LINES": LINES,
    "THR": THR, "COMMAND": COMMAND, "LATCH": LATCH,
    **{command.name: command.value for command in Command},
}  # fmt: skip


@functools.cache
def assemble(name: str) -> bytes:
    """The code of a program, for CODE. Raises GuestError."""
    if name not in PROGRAMS:
        raise GuestError(f"no program {name!r} for a kvm guest", hint=f"one of {', '.join(PROGRAMS)}")
    return assemble_file(_SOURCES / f"{name}.S")


def assemble_file(source: Path) -> bytes:
    """The code of any program for CODE; it may include common.inc. Raises GuestError."""
    with tempfile.TemporaryDirectory(prefix="ckptd-") as place:
        linked, unlinked = Path(place, "program"), Path(place, "program.o")
        # Without notes: the linker would put them into the binary, in front of the code.
        options = ["--32", "-mx86-used-note=no", "-I", str(_SOURCES), "-o", str(unlinked)]
        symbols = [f"--defsym={symbol}={value}" for symbol, value in _SYMBOLS.items()]
        _run("as", [*options, *symbols, str(source)])
        layout = ["-m", "elf_i386", f"-Ttext={CODE:#x}", "--oformat", "binary"]
        _run("ld", [*layout, "-o", str(linked), str(unlinked)])
        code = linked.read_bytes()
    if not 0 < len(code) <= CODE_BYTES:
        raise GuestError(f"the program {source.stem} has {len(code)} bytes of code; there is room for {CODE_BYTES}")
    return code


def image_of(spec: KvmSpec) -> list[tuple[int, bytes]]:
    """What a guest's memory holds at its start: (guest-physical address, bytes); all else is zero. Raises
    GuestError."""
    return [(BOOT_BLOCK, spec.boot_block()), (CODE, assemble(spec.program))]


def _run(tool: str, arguments: list[str]) -> None:
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise GuestError(
            f"the programs of kvm guests are assembled, and there is no {tool!r} here", hint="apt-get install binutils"
        ) from error
    if done.returncode:
        raise GuestError(f"{tool} failed: {done.stderr.strip()}")
