"""Is the promoted kvm guest right? By the model of its program: memory, registers, and every line on its console.

The guest is stopped with each vCPU right behind a mark, where the model says what all of memory must be. Outputs are
lines here: what one vCPU says comes in one order, but the vCPUs' lines may mix in any.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

from ckptd.config import GuestConfig
from ckptd.demo.proof import OutputsFound, Proof, compare_memory, read_image
from ckptd.guests.kvm import KvmGuest, spec_from
from ckptd.guests.kvm.abi import REG_NAMES, REGS
from ckptd.guests.kvm.differences import differing
from ckptd.guests.kvm.model import batches_of, predict
from ckptd.guests.kvm.spec import KvmSpec
from ckptd.guests.kvm.state import State, decode

__all__ = ["KvmProver", "compare_lines", "registers_equal"]

_LINE = re.compile(rb"[A-Z] ([0-9a-f]{2}) ")


class KvmProver:
    unit = "bytes of output"

    def released(self, output: Path) -> int:
        return output.stat().st_size if output.exists() else 0

    def prove(
        self, guest: GuestConfig, runtime: Path, images: Sequence[Path], outputs: tuple[Path, Path]
    ) -> Proof | None:
        spec = spec_from(guest)
        state = asyncio.run(_stop_guest(guest.name, spec, runtime, outputs[1]))
        if state is None:
            return None
        image = read_image(images)
        batches = batches_of(spec, image)
        expected = predict(spec, batches)
        here, there = (path.read_bytes() if path.exists() else b"" for path in outputs)
        return Proof(
            step=sum(batches), memory=compare_memory(spec.geometry, expected.memory, image),
            state_equal=registers_equal(expected.registers, state),
            outputs=compare_lines(here, there, state.written - len(there), expected.lines),
            named=differing(expected, image, spec),
        )  # fmt: skip


async def _stop_guest(name: str, spec: KvmSpec, runtime: Path, output: Path) -> State | None:
    """Pause the guest behind its marks, let go of what it has said, and end it. Its memory stays in the image."""
    guest = KvmGuest(name, spec, runtime, output=output)
    await guest.attach()
    try:
        if not guest.resumed:
            return None
        await guest.pause_at_marks()
        guest.gate.release(guest.gate.mark())
        return decode(await guest.save_state())
    finally:
        await guest.end()


def registers_equal(expected: Sequence[dict[str, int]], state: State) -> bool:
    """The registers that the program keeps its progress in; programs are of 32 bits."""
    for wanted, vcpu in zip(expected, state.vcpus, strict=True):
        found = dict(zip(REG_NAMES, REGS.unpack(vcpu.parts["regs"]), strict=True))
        if any(found[name] & 0xFFFFFFFF != value for name, value in wanted.items()):
            return False
    return True


def compare_lines(here: bytes, there: bytes, base: int, expected: Sequence[Sequence[bytes]]) -> OutputsFound:
    """What left on both sides, `there` from byte number `base` on, beside the lines of each vCPU. Outputs are numbered
    as lines of all that left; a wrong one is one that its vCPU does not say next."""
    found = OutputsFound()
    known = here.rfind(b"\n") + 1
    if base > len(here):  # bytes that left nowhere
        found.lost = [here.count(b"\n") + 1]
    overlap = here[base:]
    found.repeated = overlap.count(b"\n")
    if overlap != there[: len(overlap)]:
        found.contradicted = [here[:base].count(b"\n") + 1]
    said = here[:base] + there if base <= len(here) else here[:known] + there
    lines = said.splitlines(keepends=True)
    found.released = len(lines)
    following = [iter(one) for one in expected]
    for number, line in enumerate(lines, 1):
        said_by = _LINE.match(line)
        vcpu = int(said_by[1], 16) if said_by else len(following)
        if vcpu >= len(following) or next(following[vcpu], None) != line:
            found.wrong.append(number)
    missing = sum(len(list(rest)) for rest in following)
    found.lost += range(len(lines) + 1, len(lines) + 1 + missing)
    return found
