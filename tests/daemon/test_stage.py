"""The stage: pages copied several times hold what was copied last, each is there once, in order."""

from __future__ import annotations

import numpy as np
import pytest

from ckptd.daemon.stage import Stage
from ckptd.memory.dirtyset import DirtySet
from ckptd.memory.regions import Geometry
from ckptd.units import PAGE_SIZE
from tests.daemon.bench import SteppedGuest

GEOMETRY = Geometry.of(low=5, ram=200)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("most", [1, 7, 1000])
def test_what_was_copied_last_is_there_once_and_in_order(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    guest, stage = SteppedGuest(GEOMETRY), Stage(205 * PAGE_SIZE)
    for _ in range(3):  # epochs
        stage.clear()
        union = DirtySet.empty(2)
        for _ in range(rng.integers(1, 5)):
            dirty = DirtySet.from_gfns([rng.integers(0, len(rows), rng.integers(0, 40)) for rows in guest.memory])
            for rows, gfns in zip(guest.memory, dirty.gfns, strict=True):
                rows[gfns] = rng.integers(0, 255, (len(gfns), PAGE_SIZE), dtype=np.uint8)
            stage.copy(guest, dirty)
            union = union.merge(dirty)
        assert stage.pages == union.pages
        found: list[list[int]] = [[], []]
        for region, gfns, rows in stage.batches(most):
            assert len(gfns) <= most and np.array_equal(rows, guest.memory[region][gfns])
            found[region] += gfns.tolist()
        assert found == [gfns.tolist() for gfns in union.gfns]
