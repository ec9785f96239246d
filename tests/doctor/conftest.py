"""Checks run as an ordinary user, and devices that are not there."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from ckptd.doctor import try_check
from ckptd.doctor.findings import Check, Finding
from ckptd.doctor.system import in_child

T = TypeVar("T")
AsNobody = Callable[[Callable[[], T]], T]

NOBODY = 65534
_SET_DUMPABLE = 4


@pytest.fixture
def settled(as_nobody: AsNobody[Finding]) -> Callable[[Check, bool], None]:
    """A check has an answer on this machine, for us or for an ordinary user."""

    def look(check: Check, ordinary: bool = False) -> None:
        found = as_nobody(partial(try_check, check)) if ordinary else try_check(check)
        assert (found.name, bool(found.detail)) == (check.__name__, True)
        if found.state == "unknown" and "[Errno " in found.detail:
            pytest.skip(f"this machine has an answer of its own: {found.detail}")
        assert found.state in ("yes", "no"), found.detail

    return look


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user may read, as pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="ckptd-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def as_nobody() -> AsNobody[object]:
    """Call something in a child that is uid 65534; as whoever runs the tests, where that is no root."""

    def call(work: Callable[[], T]) -> T:
        def dropped() -> T:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                # To give up root makes a process undumpable, and /proc/self root's: a user's process is neither.
                ctypes.CDLL(None).prctl(_SET_DUMPABLE, 1, 0, 0, 0)
            return work()

        return in_child(dropped, 60)

    return call
