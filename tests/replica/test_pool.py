"""The pool of segments: files are used again, large ones only for as long as epochs are large."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ckptd.replica.segment import Pool, Segment

MIB = 1 << 20


def pool(directory: Path, *, ahead: int = 0, most: int = 64 * MIB) -> Pool:
    return Pool(directory, ".seg", MIB, 2 * MIB, most, ahead)


def grown(pool: Pool, name: str, size: int) -> Segment:
    segment = pool.take(name, size)
    segment.append(bytes(size))
    return segment


def files(directory: Path) -> list[int]:
    return sorted(path.stat().st_size for path in directory.iterdir())


def test_what_was_given_back_is_taken_again_and_empty(tmp_path: Path) -> None:
    segments = pool(tmp_path)
    first = grown(segments, "one.seg", 1000)
    inode = os.stat(first.path).st_ino
    segments.give(first)
    again = segments.take("two.seg", 1000)
    assert os.stat(again.path).st_ino == inode and again.path.name == "two.seg" and again.used == 0
    assert [path.name for path in tmp_path.iterdir()] == ["two.seg"]


def test_a_segment_grows_without_moving_what_is_in_it(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "one.seg", MIB)
    segment.append(b"first")
    early = segment.view[:5]
    for number in range(40):
        segment.append(bytes([number]) * (MIB // 2))
    assert bytes(early) == bytes(segment.view[:5]) == b"first"
    assert segment.size >= segment.used == 5 + 40 * (MIB // 2) and len(segment.view) == segment.size
    assert segment.path.stat().st_size == segment.size  # nothing is left of the room to grow
    assert segment.path.stat().st_blocks * 512 >= segment.size  # and all of it is allocated
    segment.settle()
    other = Segment(segment.path, 0)
    assert other.size == segment.size and bytes(other.view[5 : 5 + MIB]) == bytes(MIB // 2) + b"\1" * (MIB // 2)


def test_large_ones_serve_large_epochs_and_go_after_them(tmp_path: Path) -> None:
    segments = pool(tmp_path)
    large = [grown(segments, f"{number}.seg", 8 * MIB) for number in range(3)]
    for one in large:
        segments.give(one)
    assert len(files(tmp_path)) == 2  # two of them are kept
    small = segments.take("small.seg", 1000)
    assert small.size == MIB  # a small epoch does not take a large file
    assert segments.take("next.seg", 8 * MIB).size >= 8 * MIB and len(files(tmp_path)) == 3
    for number in range(40):
        segments.give(small)
        small = segments.take(f"small-{number}.seg", 1000)
    assert max(path.stat().st_size for path in tmp_path.iterdir() if path.name != "next.seg") == MIB


def test_far_too_large_ones_give_their_blocks_back(tmp_path: Path) -> None:
    segments = Pool(tmp_path, ".seg", MIB, 16 * MIB, 64 * MIB, 0)
    segments.give(grown(segments, "one.seg", 8 * MIB))
    again = segments.take("two.seg", 1000)
    assert again.size >= 8 * MIB  # nothing better was there
    segments.give(again)
    assert files(tmp_path) == [MIB]


def test_no_more_bytes_are_kept_than_allowed(tmp_path: Path) -> None:
    segments = pool(tmp_path, most=4 * MIB)
    taken = [segments.take(f"{number}.seg") for number in range(8)]
    for one in taken:
        segments.give(one)
    assert sum(files(tmp_path)) <= 4 * MIB
    assert segments.drain() and not files(tmp_path) and not segments.drain()


def test_files_are_made_ahead_and_hunger_shows(tmp_path: Path) -> None:
    segments = pool(tmp_path, ahead=4)
    segments.take("one.seg")
    assert segments.starved  # the first one had to be made at once
    until = time.monotonic() + 20
    while len(files(tmp_path)) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(files(tmp_path)) == 5
    segments.take("two.seg")
    assert not segments.starved
    segments.close()


def test_nothing_is_made_ahead_unless_asked(tmp_path: Path) -> None:
    segments = pool(tmp_path)
    segments.take("one.seg")
    assert not segments.starved and len(files(tmp_path)) == 1


@pytest.mark.parametrize("size", [0, 1, MIB - 1])
def test_sizes_are_whole_steps(tmp_path: Path, size: int) -> None:
    assert Segment(tmp_path / "one.seg", max(size, 1)).size == MIB
