"""The image digest: kept up to date it equals the one made afresh, and it binds every content to its place."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import PageHasher
from ckptd.memory.regions import Geometry

GEOMETRY = Geometry.of(low=4, ram=9)
HASHER = PageHasher(0xC0FFEE)
WRITES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 255)), max_size=12)
MASK = (1 << 64) - 1


def memory() -> list[np.ndarray]:
    return [np.zeros((region.pages, 4096), dtype=np.uint8) for region in GEOMETRY]


def update(table: HashTable, rows: list[np.ndarray], region: int, gfns: list[int]) -> None:
    where = np.array(gfns, dtype=np.int64)
    table.update(region, where, HASHER.hash_rows(rows[region][where]))


def fresh(rows: list[np.ndarray]) -> HashTable:
    table = HashTable(GEOMETRY, HASHER)
    table.rehash(rows)
    return table


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def plain_digest(table: HashTable) -> bytes:
    """The definition, with whole numbers of Python."""
    first = second = 0
    for index, region in enumerate(GEOMETRY):
        for gfn, (a, b) in enumerate(table.region(index).tolist()):
            place = index << 32 | gfn
            first += (splitmix64(place) | 1) * a
            second += (splitmix64(~place & MASK) | 1) * b
        assert gfn == region.pages - 1
    return (first & MASK).to_bytes(8, "little") + (second & MASK).to_bytes(8, "little")


@given(WRITES)
def test_kept_up_to_date_equals_made_afresh(writes: list[tuple[int, int, int]]) -> None:
    rows, table = memory(), HashTable(GEOMETRY, HASHER)
    for region, gfn, value in writes:
        rows[region][gfn] = value
        update(table, rows, region, [gfn])
        assert table.digest == fresh(rows).digest == plain_digest(table)


@given(st.permutations([(0, 1), (0, 2), (1, 0), (1, 8), (1, 3)]))
def test_the_order_of_updates_does_not_matter(order: list[tuple[int, int]]) -> None:
    rows = memory()
    for number, (region, gfn) in enumerate(sorted(order)):
        rows[region][gfn] = number + 1
    table = HashTable(GEOMETRY, HASHER)
    for region, gfn in order:
        update(table, rows, region, [gfn])
    assert table.digest == fresh(rows).digest


def test_content_is_bound_to_its_place() -> None:
    one, swapped, moved = memory(), memory(), memory()
    one[0][1], one[0][2] = 5, 6
    swapped[0][1], swapped[0][2] = 6, 5
    moved[1][1], moved[0][2] = 5, 6  # the same gfn of another region
    assert len({fresh(rows).digest for rows in (one, swapped, moved, memory())}) == 4


def test_update_returns_what_undoes_it() -> None:
    rows, table = memory(), HashTable(GEOMETRY, HASHER)
    before, gfns = table.digest, np.array([0, 3], dtype=np.int64)
    rows[1][gfns] = 9
    old = table.update(1, gfns, HASHER.hash_rows(rows[1][gfns]))
    assert table.digest != before
    table.update(1, gfns, old)
    assert table.digest == before


def test_rehash_says_which_pages_differed() -> None:
    rows, table = memory(), HashTable(GEOMETRY, HASHER)
    rows[0][3], rows[1][7] = 1, 2
    assert [one.tolist() for one in table.rehash(rows).gfns] == [[3], [7]]
    assert not table.rehash(rows)


def test_a_copy_lives_on_its_own_and_storage_is_trusted() -> None:
    rows = memory()
    rows[1][2] = 7
    table = fresh(rows)
    twin = table.copy()
    update(twin, memory(), 1, [2])
    assert twin.digest == HashTable(GEOMETRY, HASHER).digest != table.digest
    stored = HashTable(GEOMETRY, HASHER, [table.region(0), table.region(1)])
    assert stored.digest == table.digest


def test_differing_compares_page_by_page() -> None:
    rows, table = memory(), HashTable(GEOMETRY, HASHER)
    rows[1][4] = 1
    gfns = np.array([3, 4, 5], dtype=np.int64)
    assert table.differing(1, gfns, HASHER.hash_rows(rows[1][gfns])).tolist() == [False, True, False]
    assert (table.lookup(1, gfns) == HASHER.zero).all()
