"""QemuSpec: which QEMU is meant, and what its operator has said about it. Everything else is QEMU's to say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["QemuSpec"]


@dataclass(frozen=True, slots=True)
class QemuSpec:
    """`qmp`: the monitor's socket. `disks`: "refuse", "shared" or "ignore" (refusals.py). `ignore_ram`: blocks of
    memory that may be lost, by name."""

    qmp: Path
    disks: str = "refuse"
    ignore_ram: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"qmp": str(self.qmp), "disks": self.disks, "ignore_ram": list(self.ignore_ram)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> QemuSpec:
        return cls(Path(found["qmp"]), found["disks"], tuple(found["ignore_ram"]))
