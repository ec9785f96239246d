"""Dirty sets behave as sets of (region, gfn), and overflow is never lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import TrackerError
from ckptd.memory.dirtyset import DirtySet, gfns_of_bitmap, gfns_of_runs, runs_of
from ckptd.memory.regions import Geometry

SETS = st.sets(st.integers(0, 300), max_size=80)
PAIRS = st.tuples(SETS, SETS)


def made(pair: tuple[set[int], set[int]], overflowed: bool = False) -> DirtySet:
    return DirtySet.from_gfns([list(one) * 2 for one in pair], overflowed)


def lists(dirty: DirtySet) -> list[list[int]]:
    return [one.tolist() for one in dirty.gfns]


@given(PAIRS, PAIRS)
def test_merge_and_subtract_are_those_of_sets(one: tuple[set[int], set[int]], other: tuple[set[int], set[int]]) -> None:
    assert lists(made(one).merge(made(other))) == [sorted(a | b) for a, b in zip(one, other, strict=True)]
    assert lists(made(one).subtract(made(other))) == [sorted(a - b) for a, b in zip(one, other, strict=True)]
    assert (made(one) == made(other)) == (one == other)
    assert bool(made(one)) == any(one)
    assert made(one).pages == sum(map(len, one))


@given(PAIRS, st.integers(1, 40))
def test_batches_are_bounded_ordered_and_complete(pair: tuple[set[int], set[int]], most: int) -> None:
    batches = list(made(pair).batches(most))
    assert all(0 < len(gfns) <= most for _, gfns in batches)
    joined = [(region, gfn) for region, gfns in batches for gfn in gfns.tolist()]
    assert joined == sorted((region, gfn) for region, one in enumerate(pair) for gfn in one)


@given(PAIRS, PAIRS)
def test_overflow_stays(one: tuple[set[int], set[int]], other: tuple[set[int], set[int]]) -> None:
    lost = made(one, overflowed=True)
    assert lost.merge(made(other)).overflowed and made(other).merge(lost).overflowed
    assert not made(one).merge(made(other)).overflowed
    assert lost.subtract(made(other)).overflowed
    assert bool(lost) and lost != made(one)
    with pytest.raises(TrackerError, match="overflowed"):
        made(other).subtract(lost)


def test_empty_everything_and_other_regions() -> None:
    geometry = Geometry.of(low=3, ram=5)
    assert not DirtySet.empty(2) and DirtySet.empty(2).pages == 0
    assert DirtySet.everything(geometry).pages == 8
    assert bool(DirtySet.empty(2, overflowed=True))
    with pytest.raises(TrackerError, match="2 and 1 regions"):
        DirtySet.empty(2).merge(DirtySet.empty(1))
    assert repr(DirtySet.everything(geometry)) == "DirtySet(3 + 5 pages)"


@given(SETS, st.integers(1, 310))
def test_a_bitmap_gives_its_set_bits_below_the_end(bits: set[int], pages: int) -> None:
    words = np.zeros(5, dtype=np.uint64)
    for bit in bits:
        words[bit // 64] |= np.uint64(1 << (bit % 64))
    assert gfns_of_bitmap(words, pages).tolist() == sorted(bit for bit in bits if bit < pages)


@given(SETS)
def test_runs_are_maximal_and_go_back(gfns: set[int]) -> None:
    array = np.array(sorted(gfns), dtype=np.int64)
    starts, lengths = runs_of(array)
    assert gfns_of_runs(starts, lengths).tolist() == array.tolist()
    ends = set((starts + lengths).tolist())
    assert not ends & gfns and all(start - 1 not in gfns for start in starts.tolist())
