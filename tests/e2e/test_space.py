"""A full file system on the secondary: the guest goes on unprotected, the operator sees why, and it heals."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.pair import Pair, wait_for

Make = Callable[..., Pair]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128m", "test", str(place)], capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    """Take all the room that is left."""
    filler = place / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while os.write(file.fileno(), bytes(size)):
                    pass
            except OSError:
                continue
    return filler


def test_no_room_for_an_epoch(make_pair: Make, small: Path) -> None:
    # small epochs first; then all of memory is dirty in one
    pair = make_pair(
        replica_dir=small / "replica", replica={"history": 2, "reserve": "1MiB"}, guest={"dirty_rate": 20_000},
        checkpoint={"interval": "20ms"},
    ).start()  # fmt: skip
    filler = fill(small)
    pair.sections["checkpoint"]["interval"] = "1500ms"
    pair.write()
    pair.primary.signal(signal.SIGHUP)
    full = "No space left"
    status = wait_for(lambda: (now := pair.status()) and full in now["reason"] and now, "it says why")
    assert status["condition"] == "unprotected" and "free some space" in status["reason"]
    released, steps = pair.last_output(), pair.steps()
    wait_for(lambda: pair.steps() > steps + 100, "the guest goes on")
    assert pair.last_output() == released
    assert pair.held()["holding"] == "committed"
    filler.unlink()
    pair.protected()
    pair.verify()
    pair.check_outputs()
    assert pair.primary.ask()["rescans"] == 1


def test_no_room_for_the_image(make_pair: Make, small: Path) -> None:
    (small / "replica").mkdir()
    filler = fill(small)
    pair = make_pair(replica_dir=small / "replica", replica={"history": 2, "reserve": "1MiB"})
    pair.secondary.start()
    assert pair.secondary.exit_code() == 1  # not even the replica's meta file has room
    assert "No space left" in pair.secondary.log() and "Traceback" not in pair.secondary.log()
    filler.unlink()
    pair.secondary.start()
    wait_for(pair.held, "it is up")
    fill(small)
    pair.primary.start()
    wait_for(lambda: "No space left" in str(pair.status().get("reason")), "refused, and it says why")
    assert pair.held()["holding"] == "empty"
    filler.unlink()
    pair.protected()
    pair.verify()
