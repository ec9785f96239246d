"""A history that was recorded once replays to the same digests, and a guest goes on from each of its epochs as if it
had never been interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptd.cli.main import main
from ckptd.errors import JournalError
from ckptd.guests.sim.gate import outputs_of
from ckptd.guests.sim.machine import header_of
from ckptd.guests.sim.oracle import Run, continue_from, run_to
from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import PageHasher
from ckptd.protocol.messages import Hello, decode
from ckptd.protocol.pages import decode_pages
from ckptd.protocol.wire import Type
from ckptd.replica.history import restore
from ckptd.replica.recording import export, read_frames
from ckptd.replica.replay import replay
from ckptd.replica.replica import Replica
from ckptd.units import PAGE_SIZE
from tests.replay.history import ABOUT, RECORDING, Place, about, feed, open_replica, places
from tests.replay.make import make

PARAMS, EPOCHS = about()
FRAMES = places(RECORDING)
END = EPOCHS[-1]["step"] + 40


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """A replica that was fed the recording."""
    one = open_replica(tmp_path_factory.mktemp("r") / "kv", history=100)
    try:
        feed(RECORDING, one)
        yield one
    finally:
        one.close()


@pytest.fixture(scope="module")
def uninterrupted() -> Run:
    return run_to(PARAMS, END)


def changed(directory: Path, at: int, data: bytes | None = None) -> Path:
    """The recording with one bit flipped, or cut off at `at` and `data` put there."""
    whole = bytearray(RECORDING.read_bytes())
    if data is None:
        whole[at] ^= 0x10
    else:
        whole[at:] = data
    path = directory / "changed"
    path.write_bytes(whole)
    return path


def _hasher() -> PageHasher:
    hello = decode(Type.HELLO, next(read_frames(RECORDING)).meta)
    assert isinstance(hello, Hello)
    return PageHasher(hello.seed)


def verdicts(path: Path) -> tuple[list[int], list[int]]:
    """The epochs that replay proved, and those that it named as wrong."""
    found = list(replay(path))
    assert all(bool(one.reason) is not one.ok for one in found)
    return [one.epoch for one in found if one.ok], [one.epoch for one in found if not one.ok]


def test_it_has_what_a_history_can_have() -> None:
    pages = [
        (frame.header.epoch, decode_pages(frame.header, frame.meta, PARAMS.geometry, _hasher()))
        for frame in read_frames(RECORDING)
        if frame.header.type is Type.PAGES
    ]
    assert len(EPOCHS) == 13 and len({one["term"] for one in EPOCHS}) == 2
    assert {one.region for _, one in pages} == {0, 1}
    assert any(one.iteration for _, one in pages)
    assert {one["epoch"] for one in EPOCHS} - {epoch for epoch, _ in pages}  # epochs without pages
    assert any(one["deltas"] for one in EPOCHS)
    assert any(one["mark"] - one["released"] > 2 for one in EPOCHS)
    assert RECORDING.stat().st_size < 1 << 20


def test_each_epoch_replays_to_the_digest_that_the_guest_had() -> None:
    found = list(replay(RECORDING))
    assert all(one.ok for one in found)
    assert [(one.epoch, one.term, one.digest.hex()) for one in found] == [
        (one["epoch"], one["term"], one["digest"]) for one in EPOCHS
    ]


@pytest.mark.parametrize("epoch", [one["epoch"] for one in EPOCHS])
def test_the_recorded_digests_are_those_of_an_uninterrupted_run(epoch: int) -> None:
    stated = EPOCHS[epoch - 1]
    table = HashTable(PARAMS.geometry, _hasher())
    table.rehash(run_to(PARAMS, stated["step"]).memory)
    assert table.digest.hex() == stated["digest"]


def test_made_anew_it_is_the_same_history(tmp_path: Path) -> None:
    make(tmp_path / "kv.ckptd", tmp_path / "kv.json")
    assert json.loads((tmp_path / "kv.json").read_text()) == json.loads(ABOUT.read_text())
    assert [one.digest for one in replay(tmp_path / "kv.ckptd")] == [one.digest for one in replay(RECORDING)]


# --- damage


@pytest.mark.parametrize("frame", FRAMES[2:], ids=lambda one: f"{one.epoch}-{one.type.name}-{one.offset}")
def test_a_flipped_bit_is_named_at_its_epoch(tmp_path: Path, frame: Place) -> None:
    spots = {frame.offset, frame.offset + 8, frame.meta - 1, frame.meta, (frame.meta + frame.payload) // 2}
    spots |= {frame.payload, (frame.payload + frame.end) // 2, frame.end - 1} if frame.end > frame.payload else set()
    before = list(range(1, frame.epoch))
    for at in spots:
        assert verdicts(changed(tmp_path, at)) == (before, [frame.epoch]), f"byte {at - frame.offset} of the frame"


@pytest.mark.parametrize("frame", FRAMES[:2], ids=lambda one: one.type.name)
def test_a_flipped_bit_at_the_beginning_makes_it_no_recording(tmp_path: Path, frame: Place) -> None:
    for at in (frame.offset, frame.meta - 1, frame.meta, frame.payload - 1):
        with pytest.raises(JournalError, match="no recording"):
            list(replay(changed(tmp_path, at)))


@pytest.mark.parametrize("epoch", [2, 7, 13])
def test_an_epoch_that_is_cut_short_is_named(tmp_path: Path, epoch: int) -> None:
    ends = [one.end for one in FRAMES if one.epoch == epoch]
    for at in (ends[0] - 1, ends[-1] - 1):
        assert verdicts(changed(tmp_path, at, b"")) == (list(range(1, epoch)), [epoch])


def test_an_epoch_that_is_missing_is_named(tmp_path: Path) -> None:
    whole = RECORDING.read_bytes()
    first, after = (next(one.offset for one in FRAMES if one.epoch == epoch) for epoch in (5, 6))
    assert verdicts(changed(tmp_path, first, whole[after:])) == ([1, 2, 3, 4], [5])


# --- going on


@pytest.mark.parametrize("stated", EPOCHS, ids=lambda one: one["epoch"])
def test_a_guest_goes_on_from_any_epoch_as_if_never_interrupted(
    replica: Replica, uninterrupted: Run, tmp_path: Path, stated: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    assert restore(replica, stated["epoch"], out).digest.hex() == stated["digest"]
    said = json.loads((out / "epoch.json").read_text())
    assert (said["released"], said["mark"]) == (stated["released"], stated["mark"])
    memory = [np.fromfile(out / one["file"], dtype=np.uint8).reshape(-1, PAGE_SIZE) for one in said["regions"]]
    state, held = (out / "state").read_bytes(), outputs_of((out / "output").read_bytes())
    assert header_of(state).step == stated["step"]
    on = continue_from(memory, state, END)
    for mine, theirs in zip(on.memory, uninterrupted.memory, strict=True):
        assert np.array_equal(mine, theirs)
    assert on.state == uninterrupted.state
    assert [*held, *on.outputs] == uninterrupted.outputs[stated["released"] :]


def test_one_wrong_byte_would_be_seen(replica: Replica, uninterrupted: Run, tmp_path: Path) -> None:
    """The test above can fail: the guest's programs read what they and others wrote."""
    restore(replica, 1, tmp_path / "out")
    memory = [
        np.fromfile(tmp_path / "out" / f"image-{region.name}", dtype=np.uint8).reshape(-1, PAGE_SIZE)
        for region in PARAMS.geometry
    ]
    memory[0][np.flatnonzero(memory[0].any(axis=1))[0], 0] ^= 1
    on = continue_from(memory, (tmp_path / "out" / "state").read_bytes(), END)
    assert not np.array_equal(on.memory[0], uninterrupted.memory[0])


# --- recorded again, and the command


def test_a_replica_that_was_fed_a_recording_records_the_same_frames(replica: Replica, tmp_path: Path) -> None:
    export(replica, tmp_path / "again")
    first, again = FRAMES[2].offset, places(tmp_path / "again")[2].offset  # after HELLO and WELCOME of this version
    assert (tmp_path / "again").read_bytes()[again:] == RECORDING.read_bytes()[first:]


def test_a_recording_may_begin_at_any_epoch(tmp_path: Path) -> None:
    one = open_replica(tmp_path / "kv", history=4)
    try:
        feed(RECORDING, one)
        assert export(one, tmp_path / "short").first == 9
    finally:
        one.close()
    found = list(replay(tmp_path / "short"))
    assert [(one.epoch, one.digest.hex(), one.ok) for one in found] == [
        (one["epoch"], one["digest"], True) for one in EPOCHS[8:]
    ]


def test_the_command_replays_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def report(path: Path, code: int) -> Any:
        with pytest.raises(SystemExit) as ended:
            main(["replay", str(path), "--json"])
        assert ended.value.code == code
        return json.loads(capsys.readouterr().out)

    right = report(RECORDING, 0)
    assert right["ok"] and (right["epochs"], right["digest"]) == (13, EPOCHS[-1]["digest"])
    place = next(one for one in FRAMES if one.epoch == 5 and one.type is Type.STATE)
    wrong = report(changed(tmp_path, place.payload), 7)
    assert not wrong["ok"] and wrong["differs"]["epoch"] == 5
