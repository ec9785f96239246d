"""Page hashes are XXH3-128 under the pairing's seed, as canonical bytes in two lanes."""

from __future__ import annotations

import numpy as np
import xxhash

from ckptd.memory.hashing import PageHasher, same

ROWS = np.random.default_rng(1).integers(0, 256, (9, 4096), dtype=np.uint8)


def test_the_lanes_are_the_canonical_digest_read_as_little_endian() -> None:
    hashes = PageHasher(77).hash_rows(ROWS)
    assert hashes.shape == (9, 2) and hashes.dtype == np.uint64
    for row, (a, b) in zip(ROWS, hashes.tolist(), strict=True):
        digest = xxhash.xxh3_128(row.tobytes(), seed=77).digest()
        assert digest == xxhash.xxh3_128(row.tobytes(), seed=77).intdigest().to_bytes(16, "big")
        assert (a, b) == (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))


def test_the_seed_matters() -> None:
    assert not same(PageHasher(1).hash_rows(ROWS), PageHasher(2).hash_rows(ROWS)).any()
    assert PageHasher(1).seed == 1


def test_a_page_of_zeros_is_known() -> None:
    hasher = PageHasher(5)
    rows = ROWS.copy()
    rows[3] = 0
    assert hasher.is_zero(hasher.hash_rows(rows)).tolist() == [index == 3 for index in range(9)]
    assert not hasher.zero.flags.writeable


def test_one_bit_changes_a_hash_and_only_its_own() -> None:
    hasher, rows = PageHasher(5), ROWS.copy()
    rows[4, 4095] ^= 1
    assert same(hasher.hash_rows(rows), hasher.hash_rows(ROWS)).tolist() == [index != 4 for index in range(9)]


def test_no_pages_have_no_hashes() -> None:
    assert PageHasher(5).hash_rows(ROWS[:0]).shape == (0, 2)
