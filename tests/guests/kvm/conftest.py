"""A runtime directory whose guest's process, if one is left, is ended with the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.demo.children import kill_guest


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "runtime"
    yield place
    kill_guest(place)
