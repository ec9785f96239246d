"""Directories that are cleaned up with the test, and the guest's processes in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.demo.children import kill_guest
from tests.e2e.pair import free_port


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "runtime"
    yield place
    for one in (place, place / "own", place / "standby"):
        kill_guest(one)


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    replicas = Path(f"/dev/shm/ckptd-test-{os.getpid()}-{free_port()}")
    replicas.mkdir()
    yield tmp_path, replicas
    shutil.rmtree(replicas)
