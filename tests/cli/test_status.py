"""What `status` shows of a promoted guest, whatever its kind tells of itself."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from ckptd.cli.status import _replica


@pytest.mark.parametrize(
    ("standby", "said"),
    [
        ({"active": True, "pid": 7, "steps": 12}, "here, pid 7, step 12"),
        ({"active": True, "pid": 7, "note": "no firmware"}, "no firmware"),
        ({"active": False, "prepared": True, "pid": 7}, "ready, pid 7"),
        ({"active": False, "prepared": False}, "not started yet"),
    ],
)
def test_a_replica_is_shown_with_its_standby(standby: dict[str, Any], said: str) -> None:
    found = {
        "guest": "vm", "kind": "qemu", "condition": "promoted", "reason": "promoted", "since": 0.0,
        "inconsistent": None, "holding": "promoted", "epoch": 3, "term": 2, "committed_at": 0.0, "receiving_epoch": 0,
        "primary": None, "digest": "00", "memory_bytes": 1 << 20, "standby": standby,
        "rates": {"pages_received": 0.0, "bytes_received": 0.0},
    }  # fmt: skip
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(_replica(found))
    assert said in console.export_text()
