"""Restoring every retained epoch, beside a replica that goes on; recordings, and their replay."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import JournalError, StateError, VerifyFailed
from ckptd.memory.regions import Geometry
from ckptd.protocol.peer import Timing
from ckptd.protocol.secondary import EpochReady, SecondaryMachine
from ckptd.protocol.wire import HEADER_SIZE, Type, unpack_header
from ckptd.replica.history import restore, verify_history
from ckptd.replica.recording import export, read_frames
from ckptd.replica.replay import replay
from ckptd.replica.replica import Replica
from tests.replica.support import GEOMETRY, Guest, holds, open_replica


@pytest.fixture
def ten(tmp_path: Path) -> tuple[Replica, Guest]:
    """Epochs 2 to 10 are retained."""
    replica, guest = open_replica(tmp_path / "vm"), Guest()
    guest.make(replica)
    guest.go(replica, 4)
    written = guest.run()
    guest.commit(replica, guest.stage(replica, written, precopy=[written[0], written[0][:3]]))
    replica.apply()
    guest.go(replica, 5)
    return replica, guest


def restored(out: Path, guest: Guest, epoch: int) -> None:
    for region, rows in zip(guest.geometry, guest.memories[epoch], strict=True):
        assert (out / f"image-{region.name}").read_bytes() == rows.tobytes()
    assert (out / "state").read_bytes() == b"state of %d" % epoch * 50
    assert (out / "output").read_bytes() == b"held by %d" % epoch
    about = json.loads((out / "epoch.json").read_text())
    assert (about["epoch"], about["mark"], about["digest"]) == (epoch, epoch, guest.digests[epoch].hex())
    assert [(one["name"], one["pages"]) for one in about["regions"]] == [("ram", 96), ("rom", 16)]


def test_every_retained_epoch_is_what_it_was(ten: tuple[Replica, Guest], tmp_path: Path) -> None:
    replica, guest = ten
    assert [entry.epoch for entry in replica.history()] == list(range(2, 11))
    for epoch in range(2, 11):
        done = restore(replica, epoch, tmp_path / str(epoch))
        assert (done.epoch, done.digest) == (epoch, guest.digests[epoch])
        restored(tmp_path / str(epoch), guest, epoch)
    holds(replica, guest, 10)


def test_a_directory_that_nobody_has_open_is_restored_from(ten: tuple[Replica, Guest], tmp_path: Path) -> None:
    replica, guest = ten
    with pytest.raises(StateError, match="another process"):
        restore(tmp_path / "vm", 3, tmp_path / "out")
    replica.close()
    restore(tmp_path / "vm", 3, tmp_path / "out")
    restored(tmp_path / "out", guest, 3)
    assert verify_history(tmp_path / "vm") is None
    assert [entry.epoch for entry in open_replica(tmp_path / "vm").history()] == list(range(2, 11))


def test_what_is_not_retained_is_refused(ten: tuple[Replica, Guest], tmp_path: Path) -> None:
    replica, _ = ten
    for epoch in (0, 1, 11):
        with pytest.raises(StateError, match="2 to 10 are"):
            restore(replica, epoch, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(StateError, match="not empty"):
        restore(replica, 5, tmp_path / "full")
    with pytest.raises(StateError, match="no replica"):
        restore(tmp_path / "full", 5, tmp_path / "out")


def test_a_restore_beside_running_epochs_is_exact(tmp_path: Path) -> None:
    """Epochs go on in one thread while another restores the oldest epochs that it finds, which stay pinned."""
    geometry = Geometry.of(ram=6000, rom=16)
    replica, guest = open_replica(tmp_path / "vm", history=3, reserve=2 << 20), Guest(geometry)
    guest.make(replica)
    guest.go(replica, 4, most=200)
    done, failed = threading.Event(), []

    def go() -> None:
        try:
            while not done.is_set():
                guest.memories.pop(guest.epoch - 30, None)
                guest.go(replica, most=200)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    try:
        for turn in range(6):
            epoch = 0
            while not epoch:
                epoch = replica.history()[turn % 2].epoch
                try:
                    restore(replica, epoch, tmp_path / str(turn))
                except StateError:  # it went while we looked: it was never pinned
                    epoch = 0
            digest = json.loads((tmp_path / str(turn) / "epoch.json").read_text())["digest"]
            assert digest == guest.digests[epoch].hex()
    finally:
        done.set()
        thread.join()
    assert not failed
    guest.go(replica)
    assert len(replica.history()) == 4, "pins are let go of"
    holds(replica, guest, guest.epoch)


@pytest.mark.parametrize("name", ["epoch-7.undo", "epoch-5.seg"])
def test_a_damaged_file_spoils_only_what_needs_it(ten: tuple[Replica, Guest], tmp_path: Path, name: str) -> None:
    replica, guest = ten
    path = tmp_path / "vm" / name
    with path.open("r+b") as file:  # under the mapping, as a failing disk would
        file.seek(500)
        byte = file.read(1)[0]
        file.seek(500)
        file.write(bytes([byte ^ 1]))
    damage = verify_history(replica)
    assert damage is not None and (damage.epoch, damage.file) == (int(name[6]), name)
    for epoch in range(2, 11):
        needs = epoch < 7 if name.endswith("undo") else epoch == 5
        if needs:
            with pytest.raises((JournalError, VerifyFailed)):
                restore(replica, epoch, tmp_path / str(epoch))
            assert not list((tmp_path / str(epoch)).iterdir())
        else:
            restore(replica, epoch, tmp_path / str(epoch))
            restored(tmp_path / str(epoch), guest, epoch)


def test_an_image_that_is_wrong_fails_the_restore(ten: tuple[Replica, Guest], tmp_path: Path) -> None:
    replica, _ = ten
    untouched = next(gfn for gfn in range(96) if replica.images[0][gfn].any())
    replica.images[0][untouched, 9] ^= 1
    with pytest.raises(VerifyFailed):
        restore(replica, 10, tmp_path / "out")


# --- recordings


def test_a_recording_replays_to_every_digest(ten: tuple[Replica, Guest], tmp_path: Path) -> None:
    replica, guest = ten
    path = tmp_path / "record"
    done = export(replica, path)
    assert (done.first, done.last, done.bytes) == (2, 10, path.stat().st_size)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["record", "vm"]
    types = [frame.header.type for frame in read_frames(path)]
    assert types[:3] == [Type.HELLO, Type.WELCOME, Type.PAGES] and types.count(Type.COMMIT) == 9
    results = list(replay(path))
    assert [(one.epoch, one.digest, one.ok) for one in results] == [(n, guest.digests[n], True) for n in range(2, 11)]


@pytest.mark.parametrize("history", [0, 20])
def test_the_only_and_the_first_epoch_can_be_recorded(tmp_path: Path, history: int) -> None:
    replica, guest = open_replica(tmp_path / "vm", history=history), Guest(term=3)
    guest.make(replica)
    guest.go(replica, 3)
    guest.term = 5
    guest.go(replica, 2)
    export(replica, tmp_path / "record")
    results = list(replay(tmp_path / "record"))
    assert [one.epoch for one in results] == ([5] if not history else [1, 2, 3, 4, 5])
    assert all(one.ok for one in results) and results[-1].term == 5


def test_a_recording_after_a_restart_and_a_lost_host_has_the_right_chain(tmp_path: Path) -> None:
    from tests.replica.test_recovery import power_loss

    replica, guest = open_replica(tmp_path / "vm", history=2), Guest()
    guest.make(replica)
    guest.go(replica, 6, level="durable")
    for turn, lost in enumerate([False, True, True]):
        replica.close()
        if lost:
            power_loss(tmp_path / "vm")
        replica = open_replica(tmp_path / "vm", history=2)
        export(replica, tmp_path / f"record-{turn}")
        assert all(one.ok for one in replay(tmp_path / f"record-{turn}")), turn
        guest.go(replica, 1, level="durable")


def test_the_real_machine_fills_a_real_replica_from_a_recording(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path / "vm", history=20), Guest()
    guest.make(replica)
    guest.go(replica, 8)
    export(replica, tmp_path / "record")
    twin, machine = open_replica(tmp_path / "twin", history=20), SecondaryMachine(Timing(1, 1), 0, replaying=True)
    guest.make(twin)
    machine.replay(twin)
    epochs = []
    with (tmp_path / "record").open("rb", buffering=0) as file:
        for _ in ("HELLO", "WELCOME"):
            header = unpack_header(file.read(HEADER_SIZE))
            file.read(header.meta_length)
        while count := file.readinto(machine.buffer()):
            machine.received(count, 0)
            while (event := machine.next_event()) is not None:
                assert isinstance(event, EpochReady)
                twin.commit(event.epoch, event.term, event.chain, event.digest, event.level)
                machine.acknowledge(event.level)
                twin.apply()
                holds(twin, guest, event.epoch)
                epochs.append(event.epoch)
    assert epochs == list(range(1, 9)) and verify_history(twin) is None
    restore(twin, 1, tmp_path / "out")
    assert (tmp_path / "out" / "image-ram").read_bytes() == guest.memories[1][0].tobytes()


def test_a_damaged_recording_says_where(tmp_path: Path) -> None:
    """No precopy pages here: damage to one that was sent again would rightly not matter."""
    replica, guest = open_replica(tmp_path / "vm"), Guest()
    guest.make(replica)
    guest.go(replica, 10)
    path = tmp_path / "record"
    export(replica, path)
    whole = path.read_bytes()
    hits = 0
    for at in range(3, len(whole), len(whole) // 40):
        rotten = bytearray(whole)
        rotten[at] ^= 4
        path.write_bytes(rotten)
        try:
            results = list(replay(path))
        except JournalError:
            hits += 1
            continue
        assert not results[-1].ok and results[-1].reason, at
        assert all(one.ok and one.digest == guest.digests[one.epoch] for one in results[:-1])
        hits += 1
    assert hits >= 40
    path.write_bytes(whole[:-100])
    assert [one.ok for one in replay(path)] == [True] * 8 + [False]
    with pytest.raises(JournalError, match="within a frame"):
        list(read_frames(path))
    path.write_bytes(b"something else")
    with pytest.raises(JournalError, match="no recording"):
        list(replay(path))


def test_a_recording_overwrites_nothing(ten: tuple[Replica, Guest], tmp_path: Path) -> None:
    replica, _ = ten
    (tmp_path / "record").touch()
    with pytest.raises(StateError, match="exists already"):
        export(replica, tmp_path / "record")
    empty = open_replica(tmp_path / "empty")
    with pytest.raises(StateError, match="no committed epoch"):
        export(empty, tmp_path / "other")
    assert np.all(GEOMETRY.pages == 112)


def test_a_large_epoch_does_not_cut_off_what_somebody_reads(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path / "vm", history_bytes=8 << 20), Guest()
    guest.make(replica)
    guest.go(replica, 3)
    everything = [np.arange(region.pages, dtype=np.int64) for region in GEOMETRY]
    for gfns, rows in zip(everything, guest.memory, strict=True):
        rows[gfns] ^= 1
    with replica.pinned(2):
        guest.commit(replica, guest.stage(replica, everything))
        replica.apply()
        assert restore(replica, 2, tmp_path / "out").digest == guest.digests[2]
    for gfns, rows in zip(everything, guest.memory, strict=True):
        rows[gfns] ^= 1
    guest.commit(replica, guest.stage(replica, everything))
    replica.apply()
    assert [entry.epoch for entry in replica.history()] == [5]  # nobody reads: history begins anew
