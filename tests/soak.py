"""Pairs of daemons, killed at random for minutes: `python -m tests.soak [--minutes 10] [--frames 1000000] [--seed N]`.

Each round is a pair with a guest of random kind. It is disturbed again and again (either daemon killed and restarted,
both, or one stopped for a while), and after each time both ends must be proved equal and output must flow again; at
last the primary's host dies within an epoch, and the promoted guest is proved by an uninterrupted run. After the
rounds, mutated frames for the receiving machine. `--only` plays the round with that seed alone. Exit code 1 when
anything failed; its files are then left.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ckptd.control.client import wish
from ckptd.demo.children import Child
from ckptd.demo.pair import Moment, Pair, Setting
from ckptd.errors import CkptdError, VerifyFailed
from ckptd.guests.kvm.host import open_kvm
from ckptd.guests.kvm.machine import TRACKERS
from ckptd.guests.kvm.programs import assemble

GROWTH_LIMIT = 64 << 20
"""Bytes that a daemon may grow by in its life: its stage and its caches fill up to their limits, and no further."""

MIB = 1 << 20
MOMENTS: tuple[Moment, ...] = ("within", "unheard")


@dataclass
class Tally:
    """What a whole soak has seen."""

    rounds: int = 0
    failovers: int = 0
    done: Counter[str] = field(default_factory=Counter)
    epochs: int = 0
    outputs: int = 0
    rolled_back: int = 0
    within: int = 0
    grown: dict[str, int] = field(default_factory=lambda: {"primary": 0, "secondary": 0})
    largest: dict[str, int] = field(default_factory=lambda: {"primary": 0, "secondary": 0})
    failures: list[str] = field(default_factory=list)


class Sizes:
    """Private memory of both daemons, from when they had settled to their ends."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._first: dict[int, int] = {}

    def settled(self, *children: Child) -> None:
        for child in children:
            self._first.setdefault(child.pid, child.private_bytes)

    def ends(self, *children: Child) -> None:
        """Just before they are killed. Raises VerifyFailed."""
        for child in children:
            now, first = child.private_bytes, self._first.get(child.pid)
            role = child.role
            self._tally.largest[role] = max(self._tally.largest[role], now)
            if first is not None:
                self._tally.grown[role] = max(self._tally.grown[role], now - first)
                if now - first > GROWTH_LIMIT:
                    raise VerifyFailed(f"the {role} has grown from {first >> 20} to {now >> 20} MiB")


class Round:
    """One pair's life."""

    def __init__(self, seed: int, tally: Tally) -> None:
        self.chance, self.tally = random.Random(seed), tally
        self.setting = _setting(self.chance)
        self.directory = Path(tempfile.mkdtemp(prefix="ckptd-soak-"))
        shared = Path("/dev/shm")
        place = shared if self.setting.level == "memory" and shared.is_dir() else None
        self.pair = Pair(
            self.setting, self.directory, Path(tempfile.mkdtemp(prefix="ckptd-soak-", dir=place)), self.chance
        )
        self.sizes = Sizes(tally)

    def play(self, disturbances: int) -> None:
        """Raises whatever fails."""
        pair = self.pair
        pair.start()
        if self.chance.random() < 0.2:  # before there is anything to protect it with
            self._disturb(early=True)
        self._flows()
        for _ in range(disturbances):
            pair.protect(self.chance.uniform(0.5, 3.0))
            self._disturb()
            self._flows()
        pair.protect(self.chance.uniform(0.5, 2.0))
        self.sizes.ends(pair.primary, pair.secondary)
        pair.kill_primary(self.chance.choice(MOMENTS))
        promoted = pair.promote()
        pair.run_on(self.chance.uniform(0.3, 1.5))
        proof, failures = pair.check()
        if failures:
            raise VerifyFailed("; ".join(failures), step=proof.step)
        self.tally.failovers += 1
        self.tally.within += pair.within_an_epoch()
        self.tally.rolled_back += pair.rolled_back()
        self.tally.epochs += promoted["epoch"]
        self.tally.outputs += proof.outputs.released

    # --- what happens to it

    def _disturb(self, *, early: bool = False) -> None:
        kinds: list[Callable[[], None]] = [self._secondary, self._primary, self._both, self._stall]
        what = self.chance.choice(kinds)
        self.tally.done[what.__name__.strip("_") + (" early" if early else "")] += 1
        before = None if early else self.pair.primary.status()
        what()
        if before is not None and what in (self._secondary, self._stall):
            self._no_full_resend(before["rescans"], before["epoch"])

    def _secondary(self) -> None:
        self.sizes.ends(self.pair.secondary)
        self.pair.kill_secondary()
        self._pause()
        self.pair.restart_secondary()

    def _primary(self) -> None:
        self.sizes.ends(self.pair.primary)
        self.pair.kill_primary(self.chance.choice(MOMENTS), host=False, seconds=self.chance.choice((0.0, 0.3)))
        self._pause()
        self.pair.restart_primary()

    def _both(self) -> None:
        self.sizes.ends(self.pair.primary, self.pair.secondary)
        killed = [self.pair.kill_secondary, self.pair.primary.kill]
        started = [self.pair.restart_secondary, self.pair.restart_primary]
        for order in (killed, started):
            self.chance.shuffle(order)
            for one in order:
                one()
            self._pause()

    def _stall(self) -> None:
        """Stopped for longer than link.timeout, now and then."""
        child = self.chance.choice((self.pair.primary, self.pair.secondary))
        child.freeze()
        time.sleep(self.chance.choice((0.1, 0.5, 3.0)))
        child.thaw()

    def _pause(self) -> None:
        time.sleep(self.chance.choice((0.0, 0.05, 0.5)))

    # --- what must be true after it

    def _flows(self) -> None:
        """Protected, output leaves, and both ends hold the same bytes."""
        pair = self.pair
        self._until("protected", lambda: pair.primary.status()["condition"] == "protected")
        released = pair.primary.status()["outputs_released"]
        self._until("letting output go", lambda: pair.primary.status()["outputs_released"] > released)
        answer = wish(pair.primary.socket, "verify")
        if not answer["equal"]:
            raise VerifyFailed("both ends are not equal", epoch=answer["epoch"])
        self.sizes.settled(pair.primary, pair.secondary)

    def _no_full_resend(self, rescans: int, epoch: int) -> None:
        """A break of the link lost nothing that was committed: memory need not be compared anew."""
        self._until("going on", lambda: self.pair.primary.status()["epoch"] > epoch)
        now = self.pair.primary.status()["rescans"]
        if now != rescans and "ring" not in self.setting.tracker:  # a ring may overflow meanwhile
            raise VerifyFailed(f"{now - rescans} scans of all memory after a break that lost nothing")

    def _until(self, what: str, true: Callable[[], bool], seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while not true():
            self.pair.primary.check()
            self.pair.secondary.check()
            if time.monotonic() > until:
                status = self.pair.primary.status()
                raise VerifyFailed(f"not {what} after {seconds:g} s: {status['condition']}, {status['reason']}")
            time.sleep(0.05)


def _setting(chance: random.Random) -> Setting:
    kind = chance.choice(("sim", "sim", "kvm")) if _has_kvm() else "sim"
    workloads, trackers = {
        "sim": (("uniform", "zipf", "sequential", "kv", "idle", "bursts"), ("bitmap", "bitmap", "ring")),
        "kvm": (("random", "patterns", "counter"), TRACKERS),
    }[kind]
    return Setting(
        kind=kind,
        memory=chance.choice((8, 32, 64)) * MIB,
        workload=chance.choice(workloads),
        vcpus=chance.choice((1, 2, 3)),
        seed=chance.getrandbits(32),
        level=chance.choice(("memory", "memory", "durable")),
        tracker=chance.choice(trackers),
        ring_entries=chance.choice((4096, 65536)),  # the smaller one is overrun by a kvm guest now and then
        rate=chance.choice((5_000, 20_000, 60_000)),
        interval_ms=chance.choice((5, 25, 60)),
        encoding=chance.choice(("raw", "raw", "xor-lz4", "auto")),
        output_every=chance.choice((1, 4, 16)),
        stage_mib=chance.choice((2, 8, 16)),
        batch_kib=chance.choice((256, 1024)),
    )


@cache
def _has_kvm() -> bool:
    """A kvm guest can run here."""
    try:
        os.close(open_kvm())
        assemble("random")
    except CkptdError as error:
        print(f"no kvm guests in this soak: {error}", flush=True)
        return False
    return True


def play(seed: int, tally: Tally, disturbances: int) -> None:
    """One round; a failure goes into the tally, and its files stay."""
    one = Round(seed, tally)
    began, good = time.monotonic(), False
    print(f"round {tally.rounds + 1}, seed {seed}: {one.setting}", flush=True)
    try:
        one.play(disturbances)
        good = True
    except Exception as error:
        tally.failures.append(f"round with seed {seed}: {type(error).__name__}: {error}")
        if not isinstance(error, CkptdError):
            traceback.print_exc()
        print(f"  FAILED: {error}\n  files: {one.directory}, {one.pair.replicas}", flush=True)
        for child in (one.pair.primary, one.pair.secondary):
            print(f"--- the end of {child.log}\n{child.tail()}", flush=True)
    finally:
        one.pair.close()
        if good:
            one.pair.remove()
    tally.rounds += 1
    print(f"  {'ok' if good else 'FAILED'}, {time.monotonic() - began:.1f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--frames", type=int, default=1_000_000, help="mutated frames after the rounds; 0: none")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", type=int, help="the seed of the one round to play")
    parser.add_argument("--disturbances", type=int, default=5, help="in each round")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what a round has started is ended
    tally, until = Tally(), time.monotonic() + 60 * options.minutes
    if options.only is not None:
        play(options.only, tally, options.disturbances)
    while options.only is None and time.monotonic() < until:
        play(options.seed * 1_000_003 + tally.rounds, tally, options.disturbances)
    if options.frames and options.only is None:
        from .fuzz.frames import main as feed

        if feed(["--count", str(options.frames), "--seed", str(options.seed)]):
            tally.failures.append(f"mutated frames, seed {options.seed}")
    print(
        f"\n{tally.rounds} rounds, {sum(tally.done.values())} disturbances"
        f" ({', '.join(f'{name} {times}' for name, times in sorted(tally.done.items()))})\n"
        f"{tally.failovers} failovers proved, {tally.within} of them within an epoch;"
        f" {tally.rolled_back} epochs rolled back\n"
        f"{tally.epochs:,} epochs, {tally.outputs:,} outputs, each there and right\n"
        + "".join(
            f"{role}: at most {tally.largest[role] / MIB:.0f} MiB of its own, grown by {tally.grown[role] / MIB:.1f}\n"
            for role in ("primary", "secondary")
        )
        + f"seed {options.seed}: {len(tally.failures)} failures",
        flush=True,
    )
    for failure in tally.failures:
        print(f"  {failure}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
