"""What every tracker must do: one list of checks, for the trackers of the sim guest as for those over a real kernel.

A test module gives each check a factory of benches:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_bitmap(check: Check) -> None:
        check(make_bitmap_bench)

A bench is a guest that writes when it is told to and is otherwise paused. `capacity` is how many pages it may write
between two harvests for which the tracker must not overflow (None: any number).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Tracker

__all__ = ["CHECKS", "Bench", "Check", "MakeBench"]


class Bench(Protocol):
    tracker: Tracker
    geometry: Geometry
    vcpus: int
    capacity: int | None

    def write(self, vcpu: int, region: int, gfns: Gfns) -> None:
        """The vCPU writes to these pages; returns when it has."""


MakeBench = Callable[[], AbstractContextManager[Bench]]
Check = Callable[[MakeBench], None]


def written(bench: Bench, *pages: tuple[int, list[int]]) -> DirtySet:
    gfns: list[list[int]] = [[] for _ in bench.geometry]
    for region, some in pages:
        gfns[region] += some
    return DirtySet.from_gfns(gfns)


def expect(bench: Bench, dirty: DirtySet, wanted: DirtySet) -> None:
    """The harvest is what was written, or a superset where the tracker says so; every gfn exists; sorted and unique."""
    assert len(dirty.gfns) == len(bench.geometry)
    assert not dirty.overflowed
    for region, gfns in zip(bench.geometry, dirty.gfns, strict=True):
        assert gfns.dtype == np.int64
        assert np.all(np.diff(gfns) > 0)
        assert not len(gfns) or (gfns[0] >= 0 and gfns[-1] < region.pages)
    assert not wanted.subtract(dirty), f"lost {wanted.subtract(dirty)}"
    if bench.tracker.exact:
        assert dirty == wanted


def reports_what_was_written(make: MakeBench) -> None:
    with make() as bench:
        bench.tracker.start()
        for vcpu in range(bench.vcpus):
            bench.write(vcpu, 0, np.array([5, 3 + vcpu, 5]))
        bench.write(0, len(bench.geometry) - 1, np.array([0]))
        both = written(bench, (0, [5, *range(3, 3 + bench.vcpus)]), (len(bench.geometry) - 1, [0]))
        expect(bench, bench.tracker.harvest(), both)


def reports_the_first_and_the_last_page_of_every_region(make: MakeBench) -> None:
    with make() as bench:
        bench.tracker.start()
        edges = [(index, [0, region.pages - 1]) for index, region in enumerate(bench.geometry)]
        for region, gfns in edges:
            bench.write(0, region, np.array(gfns))
        expect(bench, bench.tracker.harvest(), written(bench, *edges))


def a_harvest_takes_and_resets(make: MakeBench) -> None:
    with make() as bench:
        bench.tracker.start()
        bench.write(0, 0, np.array([1, 2]))
        expect(bench, bench.tracker.harvest(), written(bench, (0, [1, 2])))
        expect(bench, bench.tracker.harvest(), written(bench))
        bench.write(0, 0, np.array([2]))
        expect(bench, bench.tracker.harvest(), written(bench, (0, [2])))


def start_drops_what_came_before(make: MakeBench) -> None:
    with make() as bench:
        bench.write(0, 0, np.array([1]))
        bench.tracker.start()
        expect(bench, bench.tracker.harvest(), written(bench))
        bench.write(0, 0, np.array([2]))
        bench.tracker.restore(written(bench, (0, [3])))
        bench.tracker.start()
        expect(bench, bench.tracker.harvest(), written(bench))


def restore_brings_back(make: MakeBench) -> None:
    with make() as bench:
        bench.tracker.start()
        bench.write(0, 0, np.array([1, 7]))
        first = bench.tracker.harvest()
        bench.write(0, 0, np.array([2, 7]))
        bench.tracker.restore(first)
        bench.tracker.restore(written(bench, (0, [9])))
        expect(bench, bench.tracker.harvest(), written(bench, (0, [1, 2, 7, 9])))
        expect(bench, bench.tracker.harvest(), written(bench))


def restore_keeps_an_overflow(make: MakeBench) -> None:
    with make() as bench:
        bench.tracker.start()
        bench.tracker.restore(DirtySet.empty(len(bench.geometry), overflowed=True))
        assert bench.tracker.harvest().overflowed
        assert not bench.tracker.harvest().overflowed


def stop_and_start_again(make: MakeBench) -> None:
    with make() as bench:
        bench.tracker.stop()
        bench.tracker.start()
        bench.tracker.stop()
        bench.tracker.stop()
        bench.write(0, 0, np.array([1]))
        bench.tracker.start()
        bench.write(0, 0, np.array([4]))
        expect(bench, bench.tracker.harvest(), written(bench, (0, [4])))


def many_harvests_lose_nothing(make: MakeBench) -> None:
    """Many more writes than a ring has places, harvested in time: markers wrap, nothing is lost or invented."""
    rng = np.random.default_rng(7)
    with make() as bench:
        bench.tracker.start()
        size = min(bench.capacity or 300, 300)
        for turn in range(40):
            region = turn % len(bench.geometry)
            gfns = rng.integers(0, bench.geometry[region].pages, size=size)
            for vcpu, part in enumerate(np.array_split(gfns, bench.vcpus)):
                bench.write(vcpu, region, part)
            expect(bench, bench.tracker.harvest(), written(bench, (region, gfns.tolist())))


def too_much_is_reported_or_said_to_be_lost(make: MakeBench) -> None:
    """Beyond the capacity a harvest may lack pages, but never without saying so; afterwards all is well again."""
    with make() as bench:
        bench.tracker.start()
        gfns = np.arange(bench.geometry[0].pages)
        for _ in range(3):
            bench.write(0, 0, gfns)
        dirty = bench.tracker.harvest()
        assert dirty.overflowed or np.array_equal(dirty.gfns[0], gfns)
        assert bench.capacity is not None or not dirty.overflowed
        bench.write(0, 0, np.array([1]))
        later = bench.tracker.harvest()
        assert not later.overflowed
        assert 1 in later.gfns[0]


def agrees_with_a_set(make: MakeBench) -> None:
    """Any sequence of writes, harvests and restores against a plain set."""
    with make() as bench:
        page = st.integers(0, len(bench.geometry) - 1).flatmap(
            lambda region: st.tuples(
                st.just(region), st.lists(st.integers(0, bench.geometry[region].pages - 1), max_size=12)
            )
        )
        steps = st.one_of(
            st.tuples(st.just("write"), st.integers(0, bench.vcpus - 1), page),
            st.tuples(st.just("harvest"), st.none(), st.none()),
            st.tuples(st.just("restore"), st.none(), page),
        )

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(steps, max_size=20))
        def run(sequence: list[tuple[str, int, tuple[int, list[int]]]]) -> None:
            bench.tracker.start()
            model: set[tuple[int, int]] = set()
            for what, vcpu, where in [*sequence, ("harvest", 0, (0, []))]:
                if what == "write":
                    bench.write(vcpu, where[0], np.array(where[1], dtype=np.int64))
                elif what == "restore":
                    bench.tracker.restore(written(bench, where))
                if what == "harvest":
                    wanted = DirtySet.from_gfns(
                        [sorted(gfn for at, gfn in model if at == region) for region in range(len(bench.geometry))]
                    )
                    expect(bench, bench.tracker.harvest(), wanted)
                    model.clear()
                else:
                    model |= {(where[0], gfn) for gfn in where[1]}

        run()


CHECKS: tuple[Check, ...] = (
    reports_what_was_written,
    reports_the_first_and_the_last_page_of_every_region,
    a_harvest_takes_and_resets,
    start_drops_what_came_before,
    restore_brings_back,
    restore_keeps_an_overflow,
    stop_and_start_again,
    many_harvests_lose_nothing,
    too_much_is_reported_or_said_to_be_lost,
    agrees_with_a_set,
)
