"""The meta file: two slots, one of which is whole at any moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import Inconsistent
from ckptd.replica.meta import Meta, MetaFile

FRESH = Meta("empty", "vm", "boot")
SLOT = 512 << 10


def written(path: Path, epochs: int) -> None:
    file = MetaFile.open(path, FRESH)
    for epoch in range(1, epochs + 1):
        file.write(replace(FRESH, epoch=epoch))
    file.close()


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_the_newest_slot_counts(tmp_path: Path, epochs: int) -> None:
    written(tmp_path / "meta", epochs)
    assert MetaFile.open(tmp_path / "meta", FRESH).meta.epoch == epochs


@pytest.mark.parametrize("epochs", [4, 5])
def test_a_torn_slot_falls_back_to_the_other(tmp_path: Path, epochs: int) -> None:
    """Torn at every byte of the slot that was written last."""
    path = tmp_path / "meta"
    written(path, epochs)
    whole = path.read_bytes()
    last = epochs % 2 * SLOT
    length = 24 + int.from_bytes(whole[last + 4 : last + 8], "little")
    for at in range(length):
        torn = bytearray(whole)
        torn[last + at] ^= 0x41
        path.write_bytes(torn)
        file = MetaFile.open(path, FRESH)
        # bytes 20 to 23 mean nothing
        assert file.meta.epoch == (epochs if 20 <= at < 24 else epochs - 1), at
        file.close()


def test_a_fallback_is_overwritten_in_the_right_order(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    written(path, 4)
    torn = bytearray(path.read_bytes())
    torn[30] ^= 1
    path.write_bytes(torn)
    file = MetaFile.open(path, FRESH)
    for epoch in (10, 11, 12):
        file.write(replace(FRESH, epoch=epoch))
        assert MetaFile.open(path, FRESH).meta.epoch == epoch


def test_two_torn_slots_are_inconsistent_and_say_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    written(path, 3)
    torn = bytearray(path.read_bytes())
    torn[40] ^= 1
    torn[SLOT + 40] ^= 1
    path.write_bytes(torn)
    with pytest.raises(Inconsistent, match="remove the directory"):
        MetaFile.open(path, FRESH)


def test_durably_leaves_nothing_older_in_either_slot(tmp_path: Path) -> None:
    path = tmp_path / "meta"
    file = MetaFile.open(path, FRESH)
    file.write_durably(replace(FRESH, synced=7))
    for at in (30, SLOT + 30):
        torn = bytearray(path.read_bytes())
        torn[at] ^= 1
        (tmp_path / "copy").write_bytes(torn)
        assert MetaFile.open(tmp_path / "copy", FRESH).meta.synced == 7


def test_a_thousand_regions_fit(tmp_path: Path) -> None:
    meta = replace(FRESH, holding="partial", regions=tuple((f"{index:04}" + "ä" * 60, 1) for index in range(1024)))
    MetaFile.open(tmp_path / "meta", meta).close()
    assert MetaFile.open(tmp_path / "meta", FRESH).meta == meta
