"""Each workload touches what its name says, within memory, and the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.guests.sim.workloads import WORKLOADS, Accesses, Layout

STEPS, ACCESSES = 256, 32


def pick(workload: str, pages: list[int], vcpu: int = 0, vcpus: int = 1) -> Accesses:
    chance = np.random.default_rng(3).integers(0, 2**64, size=(STEPS, ACCESSES + 1), dtype=np.uint64)
    return WORKLOADS[workload].pick(chance, np.arange(STEPS, dtype=np.uint64), vcpu, vcpus, Layout(pages))


def counts(chosen: Accesses, region: int, pages: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    rows = chosen.regions == region
    return np.bincount(chosen.gfns[rows].ravel().astype(np.int64), minlength=pages)


@pytest.mark.parametrize("workload", sorted(WORKLOADS))
@given(pages=st.lists(st.integers(1, 2**32), min_size=1, max_size=4))
def test_stays_within_memory(workload: str, pages: list[int]) -> None:
    chosen = pick(workload, pages, vcpu=1, vcpus=2)
    limits = np.array(pages, dtype=np.uint64)[chosen.regions]
    assert np.all(chosen.gfns < limits[:, None])
    assert np.all(chosen.words < 512)
    assert np.all((chosen.stores >= 1) & (chosen.stores <= ACCESSES))


def test_uniform_touches_regions_by_their_size_and_pages_alike() -> None:
    chosen = pick("uniform", [100, 300])
    share = np.mean(chosen.regions == 1)
    assert 0.6 < share < 0.9
    assert counts(chosen, 1, 300).max() < 60


def test_uniform_hardly_repeats_pages_of_a_large_memory() -> None:
    chosen = pick("uniform", [1 << 20])
    assert len(np.unique(chosen.gfns)) > 0.98 * STEPS * ACCESSES


def test_zipf_has_few_hot_pages_and_a_long_tail() -> None:
    seen = np.sort(counts(pick("zipf", [4096]), 0, 4096))[::-1]
    assert seen[:16].sum() > 0.25 * seen.sum()
    assert np.count_nonzero(seen) > 500


def test_sequential_walks_through_everything_without_repeating() -> None:
    chosen = pick("sequential", [STEPS * ACCESSES])
    assert np.array_equal(chosen.gfns.ravel(), np.arange(STEPS * ACCESSES))
    other = pick("sequential", [STEPS * ACCESSES], vcpu=1, vcpus=2)
    assert other.gfns[0, 0] == STEPS * ACCESSES // 2


def test_kv_stores_half_of_what_it_reads_in_eight_slots_a_bucket() -> None:
    chosen = pick("kv", [1000])
    assert np.all(chosen.stores == ACCESSES // 2)
    assert len(np.unique(chosen.words)) == 8


def test_idle_stores_once_a_step_to_eight_pages() -> None:
    chosen = pick("idle", [1000, 1000])
    assert np.all(chosen.stores == 1)
    assert chosen.gfns.max() == 7
    assert not chosen.regions.any()


def test_bursts_are_busy_a_quarter_of_the_time() -> None:
    chosen = pick("bursts", [1 << 16])
    assert np.array_equal(chosen.stores, np.where(np.arange(STEPS) % 256 < 64, ACCESSES, 1))
