"""Whatever a guest does, wherever the link is cut: the image is exactly one committed epoch (P2), with proof (P4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.memory.regions import Geometry

from .world import MemoryHolding, World

GEOMETRY = Geometry.of(low=6, ram=24)
PLACES = [(region, gfn) for region, one in enumerate(GEOMETRY) for gfn in range(one.pages)]


@dataclass(frozen=True)
class Step:
    """An epoch: what is written before each precopy iteration and before the pause; values 0 make zeros."""

    iterations: list[dict[tuple[int, int], int]]
    torn: set[int]
    paused: dict[tuple[int, int], int]
    deltas: bool


WRITES = st.dictionaries(st.sampled_from(PLACES), st.integers(0, 40), max_size=12)
STEPS = st.builds(Step, st.lists(WRITES, max_size=3), st.sets(st.integers(0, 23), max_size=3), WRITES, st.booleans())


def by_region(dirty: set[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    split = [(region, sorted(gfn for place, gfn in dirty if place == region)) for region in range(len(GEOMETRY))]
    return [(region, gfns) for region, gfns in split if gfns]


def write(world: World, writes: dict[tuple[int, int], int]) -> None:
    for (region, gfn), value in writes.items():
        if value == 1:  # a small change, which pays as a delta
            world.memory[region][gfn, 17] ^= 0x55
        else:
            world.write(region, [gfn], value)


def epoch_bytes(world: World, step: Step) -> bytes:
    """All frames of one epoch; pages torn on the way come again."""
    data, again = b"", set()
    for number, writes in enumerate(step.iterations, 1):
        write(world, writes)
        for region, gfns in by_region(set(writes) | again):
            raw = [gfn for gfn in gfns if gfn in step.torn and world.memory[region][gfn].any()]
            data += world.pages(region, gfns, number, torn=raw)
        again = {(r, g) for r, g in set(writes) | again if g in step.torn and world.memory[r][g].any()}
        if writes or again:
            data += b"".join(world.primary.end_iteration(number))
    write(world, step.paused)
    fresh = not step.iterations
    for region, gfns in by_region(set(step.paused) | again):
        data += world.deltas(region, gfns) if step.deltas and fresh else world.pages(region, gfns)
    return data + b"".join(world.close_epoch())


def same_image(world: World) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(world.holding.images, world.memory, strict=True))


@settings(max_examples=60)
@given(st.sampled_from(["partial", "committed"]), st.lists(STEPS, min_size=1, max_size=4), st.integers(1, 9000))
def test_after_every_commit_the_image_is_the_memory(mode: str, steps: list[Step], size: int) -> None:
    world = World(GEOMETRY, holding=MemoryHolding(GEOMETRY, holding=mode))
    for number, step in enumerate(steps, 1):
        world.to_secondary(epoch_bytes(world, step), max(1, size))
        assert world.settle().epoch == number
        assert same_image(world)
        assert world.holding.true_digest() == world.table.digest
        assert world.holding.chain == world.primary.chain


@settings(max_examples=60)
@given(st.lists(STEPS, max_size=2), STEPS, st.floats(0, 1), st.sampled_from(["partial", "committed"]))
def test_a_link_cut_anywhere_leaves_the_last_committed_epoch(
    steps: list[Step], last: Step, part: float, mode: str
) -> None:
    world = World(GEOMETRY, holding=MemoryHolding(GEOMETRY, holding=mode))
    for step in steps:
        world.to_secondary(epoch_bytes(world, step))
        world.settle()
    before, committed = world.holding.state(), world.holding.holding == "committed"
    data = epoch_bytes(world, last)
    world.to_secondary(data[: int(part * (len(data) - 1))])
    assert world.there.events() == []
    world.secondary.abandon()
    if committed:
        assert world.holding.state() == before
    else:
        assert (world.holding.holding, world.holding.epoch) == ("partial", 0)
    assert world.holding.table is not None and world.holding.table.digest == world.holding.true_digest()
    world.goes_on()
    assert same_image(world)
