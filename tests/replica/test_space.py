"""A full file system, on a real one: clean errors, nothing half-made, history gives way before the guest does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import NoSpace
from ckptd.memory.regions import Geometry
from ckptd.replica.history import restore
from tests.replica.support import RUN, Guest, holds, open_replica

NONE = np.empty(0, dtype=np.int64)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid():
        pytest.skip("mounting a small tmpfs needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path, leave: int) -> Path:
    """Take all space but `leave` bytes."""
    path = place / f"filler-{len(list(place.iterdir()))}"
    free = os.statvfs(place)
    with path.open("wb") as file:
        if free.f_bavail * free.f_frsize > leave:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leave)
    return path


@pytest.mark.parametrize("megabytes", [8, 20])
def test_an_image_that_does_not_fit_leaves_an_empty_replica(small: Path, megabytes: int) -> None:
    replica = open_replica(small / "vm")
    before = os.statvfs(small).f_bavail
    with pytest.raises(NoSpace, match="free some space"):
        geometry = Geometry.of(first=256, second=megabytes * 256 - 256)
        replica.create(kind="sim", geometry=geometry, seed=1, run=RUN, term=1)
    assert replica.holding == "empty" and os.statvfs(small).f_bavail == before
    guest = Guest()
    guest.make(replica)
    guest.go(replica, 3)
    holds(replica, guest, 3)


def test_no_room_for_the_first_segment_leaves_an_empty_replica(small: Path) -> None:
    replica = open_replica(small / "vm", reserve=4 << 20)
    filler = fill(small, 2 << 20)
    with pytest.raises(NoSpace):
        Guest().make(replica)
    assert replica.holding == "empty" and not list((small / "vm").glob("image-*"))
    filler.unlink()
    Guest().make(replica)


def test_no_room_for_meta_is_said_when_the_directory_is_made(small: Path) -> None:
    fill(small, 0)
    with pytest.raises(NoSpace):
        open_replica(small / "vm")
    assert not list((small / "vm").glob("meta*"))


def test_no_room_for_meta_at_create_leaves_an_empty_replica(small: Path) -> None:
    """A thousand regions make a record that needs more blocks than an empty one."""
    replica = open_replica(small / "vm")
    geometry = Geometry.of(**{f"region-with-a-long-name-{index:04}": 1 for index in range(600)})
    fill(small, (1 << 20) + 600 * 4096 + 8192)
    with pytest.raises(NoSpace):
        replica.create(kind="sim", geometry=geometry, seed=1, run=RUN, term=1)
    assert replica.holding == "empty" and not list((small / "vm").glob("image-*"))
    replica.close()
    assert open_replica(small / "vm").holding == "empty"


def test_no_room_to_stage_drops_history_and_then_refuses(small: Path) -> None:
    replica, guest = open_replica(small / "vm", history=2), Guest(Geometry.of(ram=400))
    guest.make(replica)
    guest.go(replica, 3)
    assert len(replica.history()) == 3
    filler = [fill(small, 0)]
    large = np.arange(390, dtype=np.int64)
    guest.memory[0][large] = 5
    commit = guest.stage(replica, [large])  # fits once history has given way
    assert len(replica.history()) == 1
    guest.commit(replica, commit)
    filler.append(fill(small, 0))
    replica.apply()  # and there is no room for its undo
    holds_all(replica, guest)
    assert [entry.epoch for entry in replica.history()] == [4]
    before = guest.memory[0].copy()
    table = replica.table.copy() if replica.table else None
    filler.append(fill(small, 0))
    with pytest.raises(NoSpace):
        guest.memory[0][:] = 6
        guest.stage(replica, [large], precopy=[large, large, large, large])
    replica.drop_staged()
    replica.table = table
    guest.epoch, guest.chain = 4, guest.chains[4]
    guest.memory[0][:] = before
    for path in filler:
        path.unlink()
    guest.go(replica, 3)
    holds_all(replica, guest)
    assert len(replica.history()) >= 2  # history comes back with the space
    replica.close()
    holds_all(open_replica(small / "vm", history=2), guest)


def holds_all(replica: object, guest: Guest) -> None:
    holds(replica, guest, guest.epoch)  # type: ignore[arg-type]


def test_no_room_for_a_restore_leaves_nothing_and_harms_nothing(small: Path) -> None:
    replica, guest = open_replica(small / "vm"), Guest(Geometry.of(ram=96, rom=16))
    guest.make(replica)
    guest.go(replica, 2)
    fill(small, 100 << 10)
    with pytest.raises(NoSpace):
        restore(replica, 1, small / "out")
    assert not list((small / "out").iterdir())
    guest.go(replica)
    holds(replica, guest, 3)
