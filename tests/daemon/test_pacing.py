"""Deadlines are absolute, limits are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.daemon.pacing import Pacer

MS = 10**6
TIMES = st.integers(0, 10**12)
INTERVALS = st.integers(MS, 10**9)


@given(TIMES, INTERVALS, st.lists(st.integers(0, 3 * 10**9), max_size=30))
def test_a_fixed_interval_keeps_its_grid_and_makes_up_for_nothing(now: int, interval: int, late: list[int]) -> None:
    pacer = Pacer(interval, interval, interval, now)
    assert pacer.deadline == now
    for delay in late:
        before = pacer.deadline
        started = before + delay
        pacer.started(started)
        assert started < pacer.deadline <= started + interval
        # slow by less than an interval: the next deadline is where it would have been
        assert pacer.deadline == (before + interval if delay < interval else started + interval)
        pacer.acknowledged(delay)
        assert pacer.interval == interval


@given(INTERVALS, INTERVALS, INTERVALS, st.lists(st.integers(0, 10**10), max_size=50))
def test_an_adaptive_interval_stays_within_its_limits(one: int, other: int, target: int, commits: list[int]) -> None:
    least, most = sorted((one, other))
    pacer = Pacer(least, most, target, 0)
    for commit in commits:
        before = pacer.interval
        pacer.acknowledged(commit)
        assert least <= pacer.interval <= most
        if commit > before or before + commit <= target:
            assert pacer.interval >= before
        else:
            assert pacer.interval <= before


@pytest.mark.parametrize("pushed_back", [False, True], ids=["from the start", "after the link has pushed back"])
def test_it_finds_the_target(pushed_back: bool) -> None:
    """Commits take a tenth of the interval: it settles where interval and commit make the target."""
    pacer = Pacer(5 * MS, 200 * MS, 50 * MS, 0)
    if pushed_back:
        for _ in range(30):
            pacer.acknowledged(2 * pacer.interval)
        assert pacer.interval == 200 * MS
    lags = []
    for _ in range(200):
        commit = pacer.interval // 10
        lags.append(pacer.interval + commit)
        pacer.acknowledged(commit)
    assert all(0.7 * 50 * MS < lag < 1.3 * 50 * MS for lag in lags[100:])


@given(TIMES, INTERVALS, INTERVALS, INTERVALS, st.integers(0, 10**10))
def test_new_limits_count_at_once(now: int, old: int, one: int, other: int, passed: int) -> None:
    least, most = sorted((one, other))
    pacer = Pacer(old, old, old, now)
    pacer.started(now)
    later = now + passed
    pacer.set_limits(least, most, most, later)
    assert least <= pacer.interval <= most
    assert pacer.deadline <= later + pacer.interval
