"""Pairs of daemons, killed at random for minutes: `python -m tests.soak [--minutes 10] [--frames 1000000] [--seed N]`.

Each round is a pair with a guest of random kind. It is disturbed again and again (either daemon killed and restarted,
both, or one stopped for a while), and after each time both ends must be proved equal and output must flow again; at
last the primary's host dies within an epoch, and the promoted guest is proved by an uninterrupted run. After the
rounds, mutated frames for the receiving machine, and Linux guests in stock QEMU, of two versions where the second can
be had (`--qemu ROUNDS`): everything around them dies in an order that chance picks, the host last, and a client on one
connection must be told every number once. `--only` plays the round with that seed alone. Exit code 1 when anything
failed; its files are then left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ckptd.control.client import wish
from ckptd.demo.children import Child
from ckptd.demo.linux import CONTROL_PORT, COUNTER_PORT, LinuxGuest, build, default_folder
from ckptd.demo.network import enter
from ckptd.demo.pair import Moment, Pair, Setting
from ckptd.demo.qemu_pair import CountingClient, QemuPair, QemuSetting
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


# --- Linux guests in QEMU

_PATIENCE = 120.0
_OTHER = "trixie"  # of Debian: the release that the second QEMU is of


class QemuRound:
    """One Linux's life, in a thread that has a network namespace of its own."""

    def __init__(self, seed: int, tally: Tally, linux: LinuxGuest, binary: str) -> None:
        self.chance, self.tally, self.linux = random.Random(seed), tally, linux
        chance = self.chance
        self.setting = QemuSetting(
            memory_mib=256, binary=binary, private=chance.random() < 0.3, interval_ms=chance.choice((10, 25, 25, 60)),
            patterns=(chance.choice((8, 32)), chance.choice((2_000, 10_000))),
            dirty=chance.choice((None, (2_000, 16), (10_000, 32))),
        )  # fmt: skip
        self.directory = Path(tempfile.mkdtemp(prefix="ckptd-soak-"))
        shared = Path("/dev/shm")
        self.replicas = Path(tempfile.mkdtemp(prefix="ckptd-soak-", dir=shared if shared.is_dir() else None))
        self.pair: QemuPair | None = None

    def play(self) -> None:
        """Raises whatever fails."""
        network, _ = enter([COUNTER_PORT, CONTROL_PORT], wanted="tap")
        self.pair = pair = QemuPair(self.setting, self.linux, network, self.directory, self.replicas)
        pair.boot()
        client = pair.client()
        client.start()
        try:
            pair.attach()
            self._flows(client)
            deaths = [self._daemon, self._keeper, self._secondary, self._standby, self._detach]
            self.chance.shuffle(deaths)
            for death in deaths:
                self._moment()
                self.tally.done["qemu " + death.__name__.strip("_")] += 1
                death()
                self._flows(client)
            self._moment()
            pair.last = pair.primary.status()
            pair.kill_host()
            if self.chance.random() < 0.3:  # then the promotion is a cold one
                pair.kill_standby()
            promoted = pair.promote()
            if promoted["epoch"] < pair.last["epoch"]:
                raise VerifyFailed(f"epoch {promoted['epoch']} was promoted, {pair.last['epoch']} was safe")
            self._told(client)
            for _ in range(2):
                self._patterns(there=True)
                time.sleep(1)
        finally:
            client.stop()
        if client.error:
            raise VerifyFailed(f"the client's connection did not survive: {client.error}")
        if failures := pair.failures([number for number, _ in client.numbers]):
            raise VerifyFailed("; ".join(failures))
        self.tally.failovers += 1
        self.tally.epochs += promoted["epoch"]
        self.tally.outputs += len(client.numbers)

    # --- what happens to it

    def _daemon(self) -> None:
        self._running.kill_daemon()
        self._moment()
        self._running.restart_primary()
        if self.chance.random() < 0.5:  # and once more, wherever it is then
            time.sleep(self.chance.uniform(0, 1))
            self._running.kill_daemon()
            self._running.restart_primary()

    def _keeper(self) -> None:
        self._running.kill_daemon(keeper=True)
        self._moment()
        self._running.restart_primary()

    def _secondary(self) -> None:
        self._running.kill_secondary()
        self._moment()
        self._running.restart_secondary()

    def _standby(self) -> None:
        self._running.kill_standby()

    def _detach(self) -> None:
        self._running.primary.end(_PATIENCE)
        self._moment()
        self._running.restart_primary()

    def _moment(self) -> None:
        time.sleep(self.chance.uniform(0, self.chance.choice((0.05, 1.0))))

    # --- what must be true after it

    @property
    def _running(self) -> QemuPair:
        assert self.pair is not None
        return self.pair

    def _flows(self, client: CountingClient) -> None:
        """Protected, the client is told more numbers, both ends hold the same bytes."""
        pair = self._running
        pair.wait_protected(_PATIENCE)
        self._told(client)
        answer = wish(pair.primary.socket, "verify", timeout=_PATIENCE)
        if not answer["equal"]:
            raise VerifyFailed("both ends are not equal", epoch=answer["epoch"])
        self._patterns()

    def _told(self, client: CountingClient) -> None:
        before, until = len(client.numbers), time.monotonic() + _PATIENCE
        while len(client.numbers) < before + 10:
            if client.error or time.monotonic() > until:
                raise VerifyFailed(f"the client is told nothing any more: {client.error or 'silence'}")
            time.sleep(0.01)

    def _patterns(self, *, there: bool = False) -> None:
        said = self._running.ask(CONTROL_PORT, "check", there=there, seconds=_PATIENCE)
        if not said.startswith("ok "):
            raise VerifyFailed(f"a page is not what it was: {said}")


def play_qemu(seed: int, tally: Tally, linux: LinuxGuest, binary: str) -> None:
    """One round; a failure goes into the tally, and its files stay."""
    one = QemuRound(seed, tally, linux, binary)
    began, raised = time.monotonic(), list[BaseException]()
    print(f"round {tally.rounds + 1} with QEMU, seed {seed}: {one.setting}", flush=True)

    def play() -> None:
        try:
            one.play()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    try:
        thread.join()
        for error in raised:
            tally.failures.append(f"round with QEMU, seed {seed}: {type(error).__name__}: {error}")
            if not isinstance(error, CkptdError):
                traceback.print_exception(error)
            print(f"  FAILED: {error}\n  files: {one.directory}, {one.replicas}", flush=True)
            for log in sorted(one.directory.rglob("*.log")):
                print(f"--- the end of {log}\n{log.read_text(errors='replace')[-2000:]}", flush=True)
    finally:
        for _ in range(2):  # what a thread that is interrupted has started meanwhile, too
            if one.pair is not None:
                one.pair.close()
            thread.join(5)
        if not raised:
            for place in (one.replicas, one.directory):
                shutil.rmtree(place, ignore_errors=True)
    tally.rounds += 1
    print(f"  {'FAILED' if raised else 'ok'}, {time.monotonic() - began:.1f} s", flush=True)


def soak_qemu(rounds: int, seed: int, tally: Tally) -> None:
    """So many rounds with the QEMU of this machine, and a tenth of them with another one. Says what it lacks."""
    if shutil.which("qemu-system-x86_64") is None:
        print("no Linux guests in this soak: there is no qemu-system-x86_64 (apt-get install qemu-system-x86)")
        return
    if why := _no_taps():
        print(f"no Linux guests in this soak: {why}")
        return
    try:
        linux = build(default_folder(), lambda text: print(text, flush=True))
    except CkptdError as error:
        print(f"no Linux guests in this soak: {error}; {error.hint}", flush=True)
        return
    for number in range(rounds):
        play_qemu(seed * 1_000_003 + number, tally, linux, "qemu-system-x86_64")
    with tempfile.TemporaryDirectory(prefix="ckptd-soak-") as place:
        try:
            other = _other_qemu(Path(place), linux)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or b""
            print(f"no second QEMU in this soak: {error} {said[-500:].decode(errors='replace')}", flush=True)
            return
        for number in range(rounds, rounds + max(1, rounds // 10)):
            play_qemu(seed * 1_000_003 + number, tally, linux, str(other))


def _no_taps() -> str:
    """Why there can be none; empty if there can."""
    said: list[str] = []

    def look() -> None:
        try:
            enter([COUNTER_PORT], wanted="tap")
        except CkptdError as error:
            said.append(str(error))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return "".join(said)


def _other_qemu(place: Path, linux: LinuxGuest) -> Path:
    """A script that becomes another Debian's QEMU; that is unpacked into a folder of the user's cache, once.

    It sees the folders that a pair uses where they are, in a mount namespace that ends with it. Raises OSError and
    CalledProcessError.
    """
    root = default_folder().parent / f"soak-{_OTHER}"
    binary, mounts = root / "usr/bin/qemu-system-x86_64", 'for at in "$@"; do mount --rbind "$at" "$root$at"; done'
    if not binary.exists():
        print(f"unpacking a Debian {_OTHER} with its QEMU into {root}", flush=True)
        aside = Path(tempfile.mkdtemp(prefix="soak-", dir=root.parent))
        aside.chmod(0o755)  # apt works as a user of its own
        try:
            _run("debootstrap", "--variant=minbase", _OTHER, str(aside))
            shutil.copy("/etc/resolv.conf", aside / "etc/resolv.conf")
            install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends qemu-system-x86"
            inside = f'set -e; root=$1; shift; {mounts}; DEBIAN_FRONTEND=noninteractive chroot "$root" sh -c "$0"'
            _run("unshare", "--mount", "sh", "-c", inside, install, str(aside), "/proc", "/sys", "/dev")
            shutil.rmtree(root, ignore_errors=True)
            aside.rename(root)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    seen = ["/proc", "/sys", "/dev", tempfile.gettempdir(), str(linux.folder)]
    for folder in seen:
        (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
    script = place / "qemu"
    script.write_text(
        "#!/bin/sh\nset -e\n"
        '[ -n "$SOAK_INSIDE" ] || SOAK_INSIDE=1 exec unshare --mount "$0" "$@"\n'
        f"root={root}\n"
        + "".join(f"mount --rbind {folder} $root{folder}\n" for folder in seen)
        + 'exec chroot "$root" /usr/bin/qemu-system-x86_64 "$@"\n'
    )
    script.chmod(0o755)
    print(_run(str(script), "--version").partition("\n")[0], flush=True)
    return script


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, timeout=1200).stdout.decode()


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--frames", type=int, default=1_000_000, help="mutated frames after the rounds; 0: none")
    parser.add_argument("--qemu", type=int, default=20, metavar="ROUNDS", help="with Linux guests in QEMU; 0: none")
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
    if options.qemu and options.only is None:
        soak_qemu(options.qemu, options.seed, tally)
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
