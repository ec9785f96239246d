"""A runtime directory whose guest process, if one is left, is ended with the test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "runtime"
    yield place
    pid_file = place / "guest.pid"
    if pid_file.exists():
        with suppress(ProcessLookupError):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
