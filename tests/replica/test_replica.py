"""One replica in one process: staging, committing, applying, recycling, limits, refusals."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import EpochGap, Fenced, Inconsistent, JournalError, NoSpace, StateError
from ckptd.memory.regions import Geometry
from ckptd.protocol.wire import Type
from ckptd.replica.files import image_names
from ckptd.replica.replica import Replica
from tests.replica.support import GEOMETRY, RUN, SEED, Guest, holds, open_replica


@pytest.fixture
def made(tmp_path: Path) -> tuple[Replica, Guest]:
    replica, guest = open_replica(tmp_path / "vm"), Guest()
    guest.make(replica)
    return replica, guest


def names(directory: Path, suffix: str) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.endswith(suffix))


def test_a_new_directory_is_empty_and_private(tmp_path: Path) -> None:
    replica = open_replica(tmp_path / "a" / "vm")
    assert (replica.holding, replica.epoch, replica.term, replica.table) == ("empty", 0, 0, None)
    assert (tmp_path / "a" / "vm").stat().st_mode & 0o777 == 0o700


def test_from_empty_to_committed(made: tuple[Replica, Guest]) -> None:
    replica, guest = made
    assert (replica.holding, replica.seed, replica.run, replica.kind) == ("partial", SEED, RUN, "sim")
    assert replica.geometry == GEOMETRY and not any(rows.any() for rows in replica.images)
    for epoch in range(1, 12):
        guest.go(replica)
        holds(replica, guest, epoch)


def test_an_epoch_is_held_before_it_is_applied(made: tuple[Replica, Guest]) -> None:
    replica, guest = made
    guest.go(replica)
    before = [rows.copy() for rows in replica.images]
    guest.commit(replica, guest.stage(replica, guest.run()))
    assert (replica.epoch, replica.mark) == (2, 2)
    assert all(np.array_equal(a, b) for a, b in zip(before, replica.images, strict=True))
    guest.commit(replica, guest.stage(replica, guest.run()))  # the next may be committed meanwhile
    replica.apply()
    holds(replica, guest, 3)


def test_precopy_pages_that_are_torn_are_overwritten_and_undone(made: tuple[Replica, Guest]) -> None:
    replica, guest = made
    guest.go(replica, 2)
    written = guest.run()
    commit = guest.stage(replica, written, precopy=[written[0], written[0][:2]])
    guest.commit(replica, commit)
    replica.apply()
    holds(replica, guest, 3)


def test_staged_frames_are_those_that_were_staged_and_can_be_dropped(made: tuple[Replica, Guest]) -> None:
    replica, guest = made
    guest.go(replica)
    twin = Guest(memories=guest.memories, epoch=1, chain=guest.chain)
    twin.memory = [rows.copy() for rows in guest.memory]
    table = replica.table
    replica.table = table.copy() if table else None
    twin.stage(replica, twin.run())
    types = [header.type for header, _, _ in replica.staged_frames()]
    assert types[-3:] == [Type.STATE, Type.OUTPUT, Type.COMMIT] and Type.PAGES in types
    replica.drop_staged()
    assert list(replica.staged_frames()) == []
    replica.table = table
    guest.go(replica)  # the same epoch number again, over the recycled bytes of the first attempt
    holds(replica, guest, 2)


def test_recycled_files_leak_no_stale_frames(tmp_path: Path) -> None:
    """Long epochs first, then short ones in the same files: what is read ends at each COMMIT."""
    replica, guest = open_replica(tmp_path, history=2), Guest()
    guest.make(replica)
    guest.go(replica, 8, most=90)
    files = {path.stat().st_ino for path in tmp_path.glob("*.seg")} | {
        path.stat().st_ino for path in tmp_path.glob("*.undo")
    }
    guest.go(replica, 8, most=3)
    assert {path.stat().st_ino for path in tmp_path.glob("*.seg")} <= files, "new files instead of recycled ones"
    assert {path.stat().st_ino for path in tmp_path.glob("*.undo")} <= files
    holds(replica, guest, 16)
    replica.close()
    holds(open_replica(tmp_path, history=2), guest, 16)


def test_a_segment_grows_and_views_of_it_stay_valid(made: tuple[Replica, Guest]) -> None:
    replica, guest = made
    guest.go(replica)
    header_and_meta = next(iter(_pages_frame(replica, guest)))
    first = replica.place(*header_and_meta)
    first[:5] = b"first"
    for _ in range(300):
        replica.place(*header_and_meta)
    first[5:10] = b"still"
    assert bytes(next(replica.staged_frames())[2][:10]) == b"firststill"


def _pages_frame(replica: Replica, guest: Guest) -> list[tuple[object, bytes]]:
    table = replica.table
    replica.table = table.copy() if table else None
    Guest(epoch=guest.epoch, chain=guest.chain, seed=5).stage(replica, [np.arange(2), np.empty(0, np.int64)])
    replica.drop_staged()
    from ckptd.protocol.pages import encode_pages
    from ckptd.protocol.wire import pack_frame, unpack_header

    hasher = guest.table.hasher
    rows = np.ones((1, 4096), dtype=np.uint8)
    meta = encode_pages(0, np.arange(1), hasher.hash_rows(rows), 0, np.ones(1, np.uint8), hasher.zero)
    replica.table = table
    return [(unpack_header(pack_frame(Type.PAGES, meta, 4096, term=1, epoch=2, sequence=0)), meta)]


@pytest.mark.parametrize("history", [0, 1, 3])
def test_history_is_limited_by_count(tmp_path: Path, history: int) -> None:
    replica, guest = open_replica(tmp_path, history=history), Guest()
    guest.make(replica)
    guest.go(replica, 7)
    assert [entry.epoch for entry in replica.history()] == list(range(7 - history, 8))
    assert len(names(tmp_path, ".undo")) <= history + 2 and len(names(tmp_path, ".seg")) <= history + 3
    for entry in replica.history():
        assert (entry.digest, entry.chain) == (guest.digests[entry.epoch], guest.chains[entry.epoch])
        assert entry.bytes > 0 and entry.time > 0 and entry.as_dict()["digest"] == entry.digest.hex()


def test_history_is_limited_by_bytes(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path, history=50, history_bytes=7 << 20), Guest()
    guest.make(replica)
    guest.go(replica, 12)
    kept = [entry.epoch for entry in replica.history()]
    assert kept == [9, 10, 11, 12]  # each past epoch costs a segment and an undo, 1 MiB each
    assert sum(path.stat().st_size for path in tmp_path.glob("epoch-*")) <= (7 << 20) + (1 << 20)


def test_limits_change_while_it_runs(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path, history=0), Guest()
    guest.make(replica)
    guest.go(replica, 3)
    replica.keep(3, 1 << 30)
    guest.go(replica, 5)
    assert [entry.epoch for entry in replica.history()] == [5, 6, 7, 8]
    replica.keep(0, 1 << 30)
    guest.go(replica)
    assert [entry.epoch for entry in replica.history()] == [9]
    replica.keep(2, 1 << 30)
    guest.go(replica, 2)
    assert [entry.epoch for entry in replica.history()] == [9, 10, 11]


def test_two_openers_exclude_each_other(tmp_path: Path) -> None:
    replica = open_replica(tmp_path)
    with pytest.raises(StateError, match="another process"):
        open_replica(tmp_path)
    replica.close()
    open_replica(tmp_path).close()


def test_a_directory_is_of_one_guest(tmp_path: Path) -> None:
    open_replica(tmp_path).close()
    with pytest.raises(StateError, match="of guest 'vm'"):
        Replica.open(tmp_path, guest="other", history=1, history_bytes=1, reserve=1)
    open_replica(tmp_path).close()  # the failed opener let go of the lock


def test_a_guest_that_is_too_large_is_refused(tmp_path: Path) -> None:
    replica = open_replica(tmp_path, max_memory=1 << 20)
    with pytest.raises(NoSpace, match=r"at most 1 MiB.*max_memory"):
        replica.create(kind="sim", geometry=Geometry.of(ram=257), seed=1, run=RUN, term=1)
    assert replica.holding == "empty" and not names(tmp_path, "ram")


def test_commit_refuses_what_is_not_the_staged_epoch(made: tuple[Replica, Guest]) -> None:
    replica, guest = made
    with pytest.raises(StateError, match="no staged epoch"):
        replica.commit(1, 1, bytes(16), bytes(16), "memory")
    commit = guest.stage(replica, guest.run())
    with pytest.raises(EpochGap):
        replica.commit(2, 1, commit.chain, commit.digest, "memory")
    with pytest.raises(JournalError, match="not those of the epoch"):
        replica.commit(1, 1, bytes(16), commit.digest, "memory")
    with pytest.raises(JournalError, match="not those of the epoch"):
        replica.commit(1, 2, commit.chain, commit.digest, "memory")
    guest.commit(replica, commit)
    holds(replica, guest, 1)


def test_only_a_committed_epoch_is_promoted_and_only_in_a_higher_term(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path), Guest()
    with pytest.raises(Inconsistent):
        replica.promote(2)
    guest.make(replica)
    with pytest.raises(Inconsistent):
        replica.promote(2)
    guest.go(replica, 2)
    with pytest.raises(Fenced):
        replica.promote(1)
    guest.commit(replica, guest.stage(replica, guest.run()))
    replica.promote(2)  # what was committed is applied first
    assert replica.holding == "promoted" and replica.term == 2 and replica.history() == []
    assert all(np.array_equal(a, b) for a, b in zip(guest.memories[3], replica.images, strict=True))
    with pytest.raises(StateError):
        replica.promote(3)
    with pytest.raises(StateError):
        replica.make_room()
    replica.images[0][0] = 7  # the guest runs over it
    replica.close()
    again = open_replica(tmp_path)
    assert (again.holding, again.epoch, again.term, again.mark) == ("promoted", 3, 2, 3)
    assert again.images[0][0, 0] == 7 and os.fstat(again.descriptors()[0]).st_size == 96 * 4096


def test_the_term_never_falls(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    replica.term = 9
    replica.term = 4
    assert replica.term == 9
    replica.close()
    replica = open_replica(tmp_path)
    assert replica.term == 9
    replica.discard()
    assert replica.term == 9
    replica.close()
    assert open_replica(tmp_path).term == 9


def test_discard_makes_room_for_another_guest(made: tuple[Replica, Guest], tmp_path: Path) -> None:
    replica, guest = made
    guest.go(replica, 5)
    replica.discard()
    assert (replica.holding, replica.epoch, replica.geometry, replica.images) == ("empty", 0, None, [])
    assert sorted(path.name for path in (tmp_path / "vm").iterdir()) == ["lock", "meta"]
    other = Guest(Geometry.of(flash=8), seed=3)
    other.make(replica)
    other.go(replica, 3)
    holds(replica, other, 3)


def test_regions_with_odd_names_have_files_of_their_own() -> None:
    geometry = Geometry.of(**{"/rom@etc/acpi": 1, "pc.ram": 1, "..": 1, "ä" * 64: 1})
    found = image_names(geometry)
    assert len(set(found)) == 4 and all("/" not in name and len(name) <= 200 for name in found)
    assert found[1] == "image-pc.ram"
