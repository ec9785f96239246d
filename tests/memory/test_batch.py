"""Deltas: there and back, only where the receiver's copy is known, and never more memory than their pages."""

from __future__ import annotations

import tracemalloc

import lz4.block
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import CorruptFrame
from ckptd.memory.batch import DeltaCache, compress_delta, expand_delta
from ckptd.memory.hashing import PageHasher

HASHER = PageHasher(3)
RANDOM = np.random.default_rng(7)


def rows(count: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, 4096), dtype=np.uint8)


def gfns(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@given(
    st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4095), st.integers(1, 255)), max_size=30)
)
def test_a_delta_goes_there_and_back(count: int, changes: list[tuple[int, int, int]]) -> None:
    old = rows(count)
    new = old.copy()
    for row, at, value in changes:
        new[row % count, at] ^= value
    cache, where = DeltaCache(64 << 12), np.arange(count, dtype=np.int64)
    cache.remember(0, where, old, HASHER.hash_rows(old))
    delta = cache.encode(0, where, new, HASHER.hash_rows(old))
    assert delta is not None and delta.chosen.tolist() == list(range(count))
    assert np.array_equal(expand_delta(memoryview(delta.block), count) ^ old, new)


def test_only_where_the_copy_is_that_of_the_receiver() -> None:
    old, cache = rows(3), DeltaCache(64 << 12)
    hashes = HASHER.hash_rows(old)
    cache.remember(0, gfns(1, 2, 3), old, hashes)
    held = hashes.copy()
    held[1] = 0  # the receiver has something else there
    delta = cache.encode(0, gfns(1, 2, 3), old, held)
    assert delta is not None and delta.chosen.tolist() == [0, 2]
    assert cache.encode(1, gfns(1, 2, 3), old, hashes) is None  # another region
    cache.clear()
    assert cache.encode(0, gfns(1, 2, 3), old, hashes) is None


def test_what_does_not_pay_goes_raw() -> None:
    old, cache = rows(2), DeltaCache(64 << 12)
    cache.remember(0, gfns(0, 1), old, HASHER.hash_rows(old))
    assert cache.encode(0, gfns(0, 1), rows(2), HASHER.hash_rows(old)) is None


def test_the_newest_page_takes_the_slot() -> None:
    cache, old = DeltaCache(4 << 12), rows(2)
    hashes = HASHER.hash_rows(old)
    cache.remember(0, gfns(1), old[:1], hashes[:1])
    cache.remember(0, gfns(5), old[1:], hashes[1:])  # the same slot of four
    assert cache.encode(0, gfns(1), old[:1], hashes[:1]) is None
    assert cache.encode(0, gfns(5), old[1:], hashes[1:]) is not None


@pytest.mark.parametrize("block", [b"", b"\x00", b"\xff" * 40, compress_delta(np.zeros((1, 4096), dtype=np.uint8))])
def test_a_block_that_is_not_its_pages_is_corrupt(block: bytes) -> None:
    with pytest.raises(CorruptFrame):
        expand_delta(memoryview(block), 2)


def test_a_bomb_does_not_go_off() -> None:
    bomb = lz4.block.compress(bytes(64 << 20), store_size=False)
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFrame):
            expand_delta(memoryview(bomb), 2)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
