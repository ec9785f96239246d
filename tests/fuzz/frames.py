"""Feed mutated sessions to the receiving machine: `python -m tests.fuzz.frames --count 1000000`.

Whatever the machine is fed: only errors of ckptd come out; a committed image is never touched but by an epoch with a
proof; memory stays bounded. Exit code 1 and the case's number when that is not so; `--only` runs one case again.
Counted are the frames that the machine took up, not those behind the one that it refused.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field

from ckptd.errors import CkptdError
from ckptd.protocol.secondary import (
    EpochReady,
    HandoverReady,
    HelloReceived,
    SecondaryMachine,
    SecondaryState,
    TableWanted,
    VerifyWanted,
)

from ..protocol.world import SEED, TIMING, MemoryHolding, Side
from .mutate import GEOMETRY, mutated, valid_sessions

MEMORY_LIMIT = (
    300 << 20
)  # bytes more than at the start: the largest STATE is 64 MiB, its copy, and what the allocator keeps


@dataclass
class Fuzz:
    """One run: the sessions that it mutates, and what came of them."""

    seed: int
    frames: int = 0
    cases: int = 0
    commits: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        chance = random.Random(self.seed)
        self.sessions = {mode: valid_sessions(chance, 40, mode) for mode in ("committed", "partial")}

    def case(self, number: int) -> None:
        """Raises AssertionError, or whatever the machine should not have raised."""
        chance = random.Random(self.seed * 1_000_003 + number)
        mode = chance.choice(["committed", "committed", "committed", "partial"])
        sessions = self.sessions[mode]
        data = mutated(chance, chance.choice(sessions), sessions)
        step = chance.choice([1 << 30, 1 << 30, 1 << 30, 5000, 700, 61])
        self.cases += 1
        holding = MemoryHolding(GEOMETRY, SEED, mode)
        machine = SecondaryMachine(TIMING, 0)
        side, before = Side(machine), holding.state()
        try:
            self._converse(side, holding, data, step)
            machine.end_of_stream()
            self.outcomes["no error"] += 1
        except CkptdError as error:
            self.outcomes[type(error).__name__] += 1
            assert machine.nack(error), "a machine that has raised can still say why"
        self.frames += machine._reader._sequence + 1
        machine.abandon()
        assert holding.table is not None
        if holding.epoch == 0 and mode == "committed":
            assert holding.state() == before, "the image was touched without a commit"
        assert holding.true_digest() == holding.table.digest, "the table does not say what the image has"

    def _converse(self, side: Side, holding: MemoryHolding, data: bytes, step: int) -> None:
        machine = side.machine
        assert isinstance(machine, SecondaryMachine) and holding.table is not None
        side.deliver(data, step)
        while events := side.events():
            for event in events:
                match event:
                    case HelloReceived():
                        machine.welcome(holding)
                    case TableWanted():
                        assert sum(1 for _ in machine.table_frames()) == len(GEOMETRY)
                    case EpochReady():
                        holding.commit(event)
                        assert holding.true_digest() == event.digest, "a commit that is not what it says"
                        self.commits += 1
                        machine.acknowledge(event.level)
                    case VerifyWanted():
                        machine.verified(holding.true_digest())
                    case HandoverReady():
                        machine.promoted(machine.term + 1)
        assert machine.state not in machine.BUSY or machine.state is SecondaryState.CLOSED


def _rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.frames", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="frames to feed, at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of the one case to run")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(arguments)
    fuzz, began, told, number = Fuzz(options.seed), time.monotonic(), 0.0, options.only or 0
    memory = _rss()
    while fuzz.frames < options.count:
        try:
            fuzz.case(number)
            assert _rss() - memory < MEMORY_LIMIT, f"memory has grown by {(_rss() - memory) >> 20} MiB"
        except Exception:
            traceback.print_exc()
            print(f"failed: --seed {options.seed} --only {number}", file=sys.stderr)
            return 1
        if options.only is not None:
            break
        number += 1
        if not options.quiet and time.monotonic() - told > 5:
            told = time.monotonic()
            print(
                f"{fuzz.frames:,} frames, {fuzz.cases:,} cases, {fuzz.frames / (told - began):,.0f} frames/s",
                flush=True,
            )
    took = time.monotonic() - began
    print(
        f"{fuzz.frames:,} frames in {fuzz.cases:,} cases, {fuzz.commits:,} commits, {fuzz.frames / took:,.0f} frames/s,"
        f" memory +{(_rss() - memory) >> 20} MiB, seed {options.seed}"
    )
    print("  " + ", ".join(f"{name} {times:,}" for name, times in fuzz.outcomes.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
