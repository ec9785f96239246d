"""QemuSpec: which QEMU is meant, and what its operator has said about it. Everything else is QEMU's to say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["QemuSpec"]


@dataclass(frozen=True, slots=True)
class QemuSpec:
    """`qmp`: the monitor's socket. `disks`: "refuse", "shared" or "ignore" (refusals.py). `ignore_ram`: blocks of
    memory that may be lost, by name. `chardevs`: label and file of those whose output is held."""

    qmp: Path
    disks: str = "refuse"
    ignore_ram: tuple[str, ...] = ()
    chardevs: tuple[tuple[str, Path], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "qmp": str(self.qmp), "disks": self.disks, "ignore_ram": list(self.ignore_ram),
            "chardevs": {label: str(path) for label, path in self.chardevs},
        }  # fmt: skip

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> QemuSpec:
        chardevs = tuple((label, Path(path)) for label, path in found["chardevs"].items())
        return cls(Path(found["qmp"]), found["disks"], tuple(found["ignore_ram"]), chardevs)
