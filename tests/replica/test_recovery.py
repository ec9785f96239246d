"""Whatever a process or a host leaves behind: what is opened next is one committed epoch, or says that it is none."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import Inconsistent, ReplicaError
from ckptd.replica.history import restore, verify_history
from ckptd.replica.meta import Meta, MetaFile
from ckptd.replica.replica import Replica
from tests.replica.support import Guest, holds, open_replica, same_memory


def dies_at(point: str, count: int, work: Callable[[Callable[[str], None]], None]) -> bool:
    """Run `work` in a child that ends without any clean-up the `count`-th time it reaches `point`; whether it did."""
    pid = os.fork()
    if pid == 0:
        left = [count]

        def hook(here: str) -> None:
            if here == point:
                left[0] -= 1
                if not left[0]:
                    os._exit(9)

        try:
            work(hook)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), "the child failed"
    return status == 9


def reached(directory: Path, work: Callable[[Replica], None], **settings: int) -> list[str]:
    """The points that the work passes, in order."""
    points: list[str] = []
    replica = open_replica(directory, **settings)
    replica.hook = points.append
    work(replica)
    replica.close()
    return points


def epochs(guest: Guest, replica: Replica, level: str) -> None:
    for _ in range(4):
        guest.go(replica, level=level)


@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("level", ["memory", "durable"])
def test_every_point_of_death_leaves_one_epoch(tmp_path: Path, level: str, history: int) -> None:
    """Die at every passage of every named point of four epochs; open; the next epochs then go on as usual."""

    def work(replica: Replica) -> None:
        epochs(guest, replica, level)

    base = tmp_path / "base"
    replica, guest = open_replica(base, history=history), Guest()
    guest.make(replica)
    guest.go(replica, 2, level=level)
    replica.close()
    shutil.copytree(base, tmp_path / "dry")
    dry, guest_before = guest, (guest.epoch, guest.chain, [rows.copy() for rows in guest.memory], guest.table.copy())
    points = reached(tmp_path / "dry", work, history=history)
    assert len(points) > 20 and {"commit: synced", "commit: named", "apply: undo", "apply: written"} <= set(points)
    for index, point in enumerate(points):
        count = points[: index + 1].count(point)
        here = tmp_path / "here"
        shutil.copytree(base, here)

        def one(hook: Callable[[str], None], here: Path = here) -> None:
            child = Guest(epoch=guest_before[0], chain=guest_before[1])
            child.memory, child.table = [rows.copy() for rows in guest_before[2]], guest_before[3].copy()
            replica = open_replica(here, history=history)
            replica.hook = hook
            epochs(child, replica, level)

        assert dies_at(point, count, one)
        # what had its name when the process died may have been acknowledged: it must be there
        named = max(int(path.name[6:-4]) for path in here.glob("epoch-*.seg"))
        replica = open_replica(here, history=history)
        holds(replica, dry, named)
        assert not (here / "staged.seg").exists() and not (here / "undo.new").exists()
        first = replica.history()[0].epoch
        assert named - history <= first and (history == 0 or first < named or point == "never"), point
        assert verify_history(replica) is None
        for entry in replica.history():
            out = tmp_path / "out"
            restore(replica, entry.epoch, out)
            assert (out / "image-ram").read_bytes() == dry.memories[entry.epoch][0].tobytes()
            shutil.rmtree(out)
        on = Guest(epoch=named, chain=dry.chains[named])
        on.memory = [rows.copy() for rows in dry.memories[named]]
        on.table.rehash(on.memory)
        on.go(replica, 2, level=level)
        holds(replica, on, named + 2)
        replica.close()
        shutil.rmtree(here)


@pytest.mark.parametrize("level", ["memory", "durable"])
def test_death_in_the_first_epoch_stays_partial_until_meta_says_committed(tmp_path: Path, level: str) -> None:
    def work(replica: Replica) -> None:
        guest = Guest()
        guest.make(replica)
        guest.go(replica, 1, level=level)

    points = reached(tmp_path / "dry", work)
    assert points == ["create: allocated", "commit: named", "commit: written"]
    for point in points:
        here = tmp_path / point.replace(": ", "-")

        def one(hook: Callable[[str], None], here: Path = here) -> None:
            replica = open_replica(here)
            replica.hook = hook
            work(replica)

        assert dies_at(point, 1, one)
        replica = open_replica(here)
        assert replica.holding == {"create": "empty", "commit: named": "partial"}.get(
            point if point != "create: allocated" else "create", "committed"
        )
        if replica.holding == "committed":
            assert replica.epoch == 1 and replica.mark == 1
        else:
            assert replica.epoch == 0
            guest = Guest()
            if replica.holding == "empty":
                guest.make(replica)
            guest.go(replica, 2)
            holds(replica, guest, 2)


def test_death_during_recovery_is_recovered_from(tmp_path: Path) -> None:
    base = tmp_path / "base"
    replica, guest = open_replica(base), Guest()
    guest.make(replica)
    guest.go(replica, 2)
    guest.commit(replica, guest.stage(replica, guest.run()))
    guest.commit(replica, guest.stage(replica, guest.run()))  # two epochs to redo
    replica.close()
    for point, count in [("recover: undo", 1), ("recover: undo", 2), ("recover: frame", 1), ("recover: frame", 3),
                         ("recover: written", 1)]:  # fmt: skip
        here = tmp_path / "here"
        shutil.copytree(base, here)

        def one(hook: Callable[[str], None], here: Path = here) -> None:
            Replica.hook = staticmethod(hook)  # type: ignore[method-assign]
            open_replica(here)

        assert dies_at(point, count, one), point
        replica = open_replica(here)
        holds(replica, guest, 4)
        assert [entry.epoch for entry in replica.history()] == [1, 2, 3, 4]
        restore(replica, 2, tmp_path / "out")
        assert (tmp_path / "out" / "image-ram").read_bytes() == guest.memories[2][0].tobytes()
        replica.close()
        shutil.rmtree(here)
        shutil.rmtree(tmp_path / "out")


def test_a_half_applied_epoch_without_an_undo_begins_history_anew(tmp_path: Path) -> None:
    """History was off when the process died in the middle of the pages: nobody knows what was there before."""
    replica, guest = open_replica(tmp_path, history=0), Guest()
    guest.make(replica)
    guest.go(replica, 2)
    commit = guest.stage(replica, guest.run())
    replica.close()  # only its files are needed; the child stages the same again

    def work(hook: Callable[[str], None]) -> None:
        child = Guest()
        child.memory, child.epoch, child.chain = guest.memories[2], 2, guest.chains[2]
        replica = open_replica(tmp_path, history=0)
        replica.hook = hook
        child.go(replica)

    assert dies_at("apply: frame 0", 1, work)
    replica = open_replica(tmp_path, history=4)
    holds(replica, guest, 3)
    assert [entry.epoch for entry in replica.history()] == [3] and commit.digest == replica.digest
    guest.go(replica, 2)
    restore(replica, 3, tmp_path / "out")
    assert (tmp_path / "out" / "image-ram").read_bytes() == guest.memories[3][0].tobytes()


def test_a_durable_commit_is_on_stable_storage_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, then its name, then the directory; at level memory none of it."""
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 2, level="durable")
    calls: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fdatasync", "fsync", "rename")}

    def noting(name: str) -> Callable[..., None]:
        def call(what: int | Path, *others: object) -> None:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
            calls.append((name, Path(path).name))
            real[name](what, *others)

        return call

    for name in real:
        monkeypatch.setattr(os, name, noting(name))
    for level in ("durable", "memory"):
        commit = guest.stage(replica, guest.run())
        calls.clear()
        guest.commit(replica, commit, level)
        if level == "durable":
            assert calls == [("fdatasync", "staged.seg"), ("rename", "staged.seg"), ("fsync", tmp_path.name)]
        else:
            assert calls == [("rename", "staged.seg")]
        replica.apply()


# --- damage


def unapplied(directory: Path) -> Guest:
    """A replica at epoch 2 whose epoch 3 is committed and not applied."""
    replica, guest = open_replica(directory), Guest()
    guest.make(replica)
    guest.go(replica, 2)
    guest.commit(replica, guest.stage(replica, guest.run()))
    replica.close()
    return guest


def refuses(directory: Path, reason: str) -> Replica:
    replica = open_replica(directory)
    assert replica.holding == "partial" and reason in replica.reason, replica.reason
    with pytest.raises(Inconsistent, match="no committed epoch"):
        replica.promote(9)
    assert replica.history() == []
    return replica


def test_a_segment_torn_anywhere_is_never_taken_for_an_epoch(tmp_path: Path) -> None:
    """It has its name, so it may have been acknowledged: the epoch before it must not stand in."""
    base = tmp_path / "base"
    unapplied(base)
    replica = open_replica(base)
    used = replica.history()[-1].bytes
    replica.close()
    shutil.rmtree(base)
    unapplied(base)
    whole = (base / "epoch-3.seg").read_bytes()
    assert used > 5 * 997
    for at in range(0, used, 997):
        here = tmp_path / "here"
        shutil.copytree(base, here)
        (here / "epoch-3.seg").write_bytes(whole[:at])
        replica = refuses(here, "the segment is damaged")
        assert replica.epoch == 3
        replica.close()
        assert open_replica(here).reason, "the reason is kept"
        shutil.rmtree(here)


def test_a_flipped_bit_anywhere_is_never_taken_for_an_epoch(tmp_path: Path) -> None:
    base = tmp_path / "base"
    unapplied(base)
    whole = (base / "epoch-3.seg").read_bytes()
    for at in range(5, 20000, 997):
        here = tmp_path / "here"
        shutil.copytree(base, here)
        rotten = bytearray(whole)
        rotten[at] ^= 0x10
        (here / "epoch-3.seg").write_bytes(rotten)
        refuses(here, "").close()
        shutil.rmtree(here)


def test_a_missing_segment_that_is_needed_is_fatal(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica)
    for _ in range(2):
        guest.commit(replica, guest.stage(replica, guest.run()))
    replica.close()
    (tmp_path / "epoch-2.seg").unlink()
    refuses(tmp_path, "the segment is missing (epoch 2)")


def test_an_exchanged_segment_breaks_the_chain(tmp_path: Path) -> None:
    guest = unapplied(tmp_path / "a")
    replica, other = open_replica(tmp_path / "b"), Guest(seed=2)
    other.make(replica)
    other.go(replica, 3)
    replica.close()
    shutil.copy(tmp_path / "b" / "epoch-3.seg", tmp_path / "a" / "epoch-3.seg")
    refuses(tmp_path / "a", "chain")
    assert guest.epoch == 3


def test_an_image_that_changed_on_its_own_is_refused(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 3)
    replica.images[1][5, 77] ^= 1
    replica.close()
    refuses(tmp_path, "the image has digest")


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_an_image_file_that_is_not_there_is_made_anew(tmp_path: Path, damage: str) -> None:
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 3)
    replica.close()
    if damage == "missing":
        (tmp_path / "image-rom").unlink()
    else:
        os.truncate(tmp_path / "image-rom", 4096)
    replica = refuses(tmp_path, "the image is not all there: image-rom")
    resynchronised(replica, guest)


def test_a_passing_error_does_not_cost_the_image(tmp_path: Path) -> None:
    """No descriptors left: opening fails, and the next opener finds everything."""
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 3)
    replica.close()

    def work(hook: Callable[[str], None]) -> None:
        opened = 0
        highest = max(map(int, os.listdir("/proc/self/fd")))
        for limit in range(3, highest + 60):  # fails later each time
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            with suppress(ReplicaError, OSError):
                open_replica(tmp_path).close()
                opened += 1
        assert 0 < opened < highest + 57

    assert not dies_at("never", 1, work)
    holds(open_replica(tmp_path), guest, 3)


def resynchronised(replica: Replica, guest: Guest) -> None:
    """A partial replica takes the next epoch straight into its image, under the next number, and is whole again."""
    assert replica.epoch == guest.epoch and replica.table is not None
    guest.chain = replica.chain
    for region, rows in enumerate(guest.memory):
        replica.images[region][:] = rows
    replica.rehash()
    guest.go(replica, 3)
    holds(replica, guest, guest.epoch)
    assert [entry.epoch for entry in replica.history()] == [guest.epoch - 2, guest.epoch - 1, guest.epoch]
    assert verify_history(replica) is None


@pytest.mark.parametrize(("at", "seen"), [(60, True), (300, False)])
def test_bit_rot_in_history_is_named_and_harms_nothing_else(tmp_path: Path, at: int, seen: bool) -> None:
    """In a meta, which is seen on opening, and in a page, which only a verify reads."""
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 6)
    replica.close()
    rotten = bytearray((tmp_path / "epoch-4.seg").read_bytes())
    rotten[at] ^= 1
    (tmp_path / "epoch-4.seg").write_bytes(rotten)
    replica = open_replica(tmp_path)
    holds(replica, guest, 6)
    damage = verify_history(replica)
    assert damage is not None and (damage.epoch, damage.file) == (4, "epoch-4.seg")
    assert [bool(entry.damage) for entry in replica.history()] == [False, False, False, seen, False, False]
    restore(replica, 3, tmp_path / "out")  # the undos are whole
    assert (tmp_path / "out" / "image-ram").read_bytes() == guest.memories[3][0].tobytes()


def test_a_segment_of_another_epoch_is_seen_on_opening(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 6)
    replica.close()
    shutil.copy(tmp_path / "epoch-3.seg", tmp_path / "epoch-5.seg")
    replica = open_replica(tmp_path)
    holds(replica, guest, 6)
    assert [entry.epoch for entry in replica.history() if entry.damage] == [5]


# --- power loss


def power_loss(directory: Path, *, change: Callable[[Meta], Meta] = lambda meta: meta) -> None:
    """The next opener finds another boot."""
    file = MetaFile.open(directory / "meta", Meta("empty", "", ""))
    file.write_durably(change(replace(file.meta, boot="another boot")))
    file.close()


def test_a_durable_replica_survives_a_power_loss(tmp_path: Path) -> None:
    """The image on disk is that of the last settle, with parts of later epochs; the segments since are there."""
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 3, level="durable")
    old = [rows.copy() for rows in replica.images]
    meta_then = replica._meta.meta
    assert meta_then.synced == 1
    guest.go(replica, 5, level="durable")
    for region, rows in enumerate(replica.images):
        rows[::2] = guest.memories[1][region][::2]  # every other page was never written back
    replica.close()
    power_loss(tmp_path, change=lambda meta: replace(meta_then, boot="another boot"))
    for path in tmp_path.glob("*.undo"):
        path.unlink()
    replica = open_replica(tmp_path)
    holds(replica, guest, 8)
    assert [entry.epoch for entry in replica.history()] == [8] and replica._meta.meta.synced == 8
    guest.go(replica, 2, level="durable")
    holds(replica, guest, 10)
    replica.close()
    holds(open_replica(tmp_path), guest, 10)
    assert not same_memory(old, guest.memory)


def test_segments_newer_than_the_settled_image_are_kept(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path, history=1), Guest()
    guest.make(replica)
    for _ in range(60):
        guest.go(replica, level="durable")
        synced = replica._meta.meta.synced
        present = {int(path.name[6:-4]) for path in tmp_path.glob("epoch-*.seg")}
        assert set(range(synced + 1, guest.epoch + 1)) <= present
        assert len(present) < 2 * 16 + 4, "the image is settled now and then"
    assert replica._meta.meta.synced > 20


def test_changing_from_memory_to_durable_settles_first(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path, history=1), Guest()
    guest.make(replica)
    guest.go(replica, 4, level="memory")
    assert replica._meta.meta.synced == 0
    guest.commit(replica, guest.stage(replica, guest.run()))  # not applied when the durable one comes
    guest.commit(replica, guest.stage(replica, guest.run()), "durable")
    assert replica._meta.meta.synced == 4
    replica.close()
    power_loss(tmp_path)
    holds(open_replica(tmp_path), guest, 6)


def test_what_was_only_in_memory_is_not_made_up_after_a_power_loss(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 5)
    replica.close()
    power_loss(tmp_path)
    replica = refuses(tmp_path, "never on stable storage")
    resynchronised(replica, guest)


def test_unsynced_segments_that_are_gone_leave_the_settled_epoch(tmp_path: Path) -> None:
    """Epochs of level memory after durable ones, all of which the power loss took, files and pages."""
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 2, level="durable")
    replica.settle()
    settled = replica._meta.meta
    guest.go(replica, 2, level="memory")
    for region, rows in enumerate(replica.images):
        rows[:] = guest.memories[2][region]
    replica.close()
    for epoch in (3, 4):
        (tmp_path / f"epoch-{epoch}.seg").unlink()
    power_loss(tmp_path, change=lambda meta: replace(settled, boot="another boot"))
    holds(open_replica(tmp_path), guest, 2)


def test_a_page_that_reached_the_disk_without_its_segment_is_noticed(tmp_path: Path) -> None:
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 2, level="durable")
    replica.settle()
    settled = replica._meta.meta
    guest.go(replica, 1, level="memory")
    replica.close()
    (tmp_path / "epoch-3.seg").unlink()
    power_loss(tmp_path, change=lambda meta: replace(settled, boot="another boot"))
    refuses(tmp_path, "the image has digest")


def test_a_failing_disk_is_never_asked_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica, guest = open_replica(tmp_path), Guest()
    guest.make(replica)
    guest.go(replica, 2, level="memory")

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        commit = guest.stage(replica, guest.run())
        with pytest.raises(ReplicaError, match="stable storage"):
            guest.commit(replica, commit, "durable")
    assert replica.epoch == 2
    with pytest.raises(ReplicaError, match="failed before"):
        guest.commit(replica, commit, "durable")
    guest.commit(replica, commit, "memory")
    replica.apply()
    holds(replica, guest, 3)
