"""A pair of daemons with a guest between them, and all that can be done to it: start, kill, restart, promote, prove.

    start -> protect -> (kill and restart either side, in any order) -> kill_primary -> promote -> check -> close

Everything is in two directories of its own, and ends with `close`, whatever happened before.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ckptd.config import load_primary
from ckptd.control.client import Answered, wish
from ckptd.demo.children import Child, ChildFailed, guest_pid, kill_guest
from ckptd.demo.proof import Proof, prover_of
from ckptd.errors import Unreachable

__all__ = ["Killed", "Moment", "Pair", "Setting", "Watch", "free_port", "write_toml"]

Watch = Callable[[dict[str, Any] | None, dict[str, Any] | None], None]
"""Is shown both statuses now and then: the primary's, and the secondary's of the guest; None where nobody answers."""

Moment = Literal["within", "unheard"]
"""Of a primary's death: a part of an epoch has arrived; an epoch with output is safe, and the primary does not know."""

_GUEST = "demo"
_LOOK = 0.02
_SHOW = 0.2
_STILL = 0.002  # seconds after which nothing is on its way through this machine any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What runs. `memory` in bytes, `rate` in pages a second (0: flat out)."""

    memory: int
    kind: str = "sim"
    workload: str = "zipf"
    vcpus: int = 2
    seed: int = 1
    level: str = "memory"
    tracker: str = "auto"
    ring_entries: int = 65536
    rate: int = 20_000
    interval_ms: int = 25
    encoding: str = "raw"
    output_every: int = 4
    stage_mib: int = 64
    history: int = 20
    batch_kib: int = 256  # small, so that an epoch goes out in several pieces, between which the primary can die


@dataclass(slots=True)
class Killed:
    """The primary's end.

    `receiving`: the epoch that the secondary had a part of, 0 if none; `acknowledged` and `released`: what the primary
    had been told, and had let go of. `at`: monotonic seconds, when all of it was dead.
    """

    receiving: int
    acknowledged: int
    released: int
    at: float


class Pair:
    """See the module. `directory` takes files and logs, `replicas` the replica; both must exist."""

    def __init__(self, setting: Setting, directory: Path, replicas: Path, chance: random.Random) -> None:
        self.setting, self.chance = setting, chance
        self.directory, self.replicas = directory, replicas
        self._here, self._there = directory / "p", directory / "s"
        self._files = directory / "primary.toml", directory / "secondary.toml"
        self.primary = Child("primary", self._files[0], self._here / "primary.sock", directory / "primary.log")
        self.secondary = Child("secondary", self._files[1], self._there / "secondary.sock", directory / "secondary.log")
        self._port = free_port()
        self.prover = prover_of(setting.kind)
        self.last: dict[str, Any] = {}
        self.killed: Killed | None = None
        self.promoted: dict[str, Any] = {}
        self.failover_ms = 0.0

    # --- life

    def start(self) -> None:
        """Write the files and start both daemons. Raises ChildFailed."""
        self._write_files()
        self.secondary.start()
        self.primary.start()
        self.secondary.wait_ready()
        self.primary.wait_ready()

    def close(self) -> None:
        """End every process that this has started, by its pid. The directories stay: see `remove`."""
        for child in (self.primary, self.secondary):
            child.end()
        for runtime in (self._here, self._there / _GUEST):
            kill_guest(runtime)

    def remove(self) -> None:
        """The directories too."""
        for place in (self.replicas, self.directory):
            shutil.rmtree(place, ignore_errors=True)

    # --- while it is protected

    def wait_protected(self, seconds: float = 60.0, watch: Watch | None = None) -> dict[str, Any]:
        """Until the primary says protected; returns its status. Raises ChildFailed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._check()
            found = self._look(watch)
            if found is not None and found["condition"] == "protected":
                return found
            time.sleep(_LOOK)
        raise ChildFailed(f"the guest is not protected after {seconds:g} s", hint=self.primary.tail())

    def protect(self, seconds: float, watch: Watch | None = None) -> dict[str, Any]:
        """Let it run that long; returns the primary's last status. Raises ChildFailed when a daemon ends."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(_SHOW, left))
            self._check()
            self._look(watch)
        self.last = self.primary.status()
        return self.last

    def replica(self) -> dict[str, Any]:
        """The secondary's status of the guest. Raises Unreachable."""
        found: dict[str, Any] = self.secondary.status()["guests"][0]
        return found

    # --- what is done to it

    def kill_primary(self, moment: Moment = "within", *, host: bool = True, seconds: float = 3.0) -> Killed:
        """SIGKILL the primary at a moment, if it can be met; with its host its guest dies, too.

        It is looked for so many seconds; with 0 the primary dies when this is called.
        """
        self.last = self.primary.status()
        receiving = self._freeze_at(moment, seconds)
        self.primary.kill()
        if host:
            kill_guest(self._here)
        at = time.monotonic()
        self.killed = Killed(receiving, self.last["epoch"], self._released(), at)
        return self.killed

    def restart_primary(self) -> None:
        self.primary.start()
        self.primary.wait_ready()

    def kill_secondary(self) -> None:
        """SIGKILL it at a random moment."""
        time.sleep(self.chance.uniform(0, 2 * self.setting.interval_ms / 1e3))
        self.secondary.kill()

    def restart_secondary(self) -> None:
        self.secondary.start()
        self.secondary.wait_ready()

    def promote(self, seconds: float = 10.0) -> dict[str, Any]:
        """Failover, as soon as the secondary has seen that its primary is gone. Returns its answer."""
        until = time.monotonic() + seconds
        while self.replica()["primary"] is not None and time.monotonic() < until:
            time.sleep(0.002)
        self.promoted = wish(self.secondary.socket, "promote")
        if self.killed is not None:
            self.failover_ms = (time.monotonic() - self.killed.at) * 1e3
        return self.promoted

    def run_on(self, seconds: float, watch: Watch | None = None) -> None:
        """Let the promoted guest run. Raises ChildFailed when the secondary ends."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(_SHOW, left))
            self.secondary.check()
            self._look(watch)

    # --- the proof

    def check(self) -> tuple[Proof, list[str]]:
        """Prove the promoted guest by an uninterrupted run; failures as sentences. Ends the secondary and the guest."""
        replica, failures = self.replica(), self._earlier()
        if not guest_pid(self._there / _GUEST):
            raise ChildFailed("the promoted guest does not run any more", hint=self.secondary.tail())
        self.secondary.end()  # the guest outlives its daemon, and can be asked by us now
        guest = load_primary(self._files[0], {}).config.guest
        images = [self.replicas / _GUEST / f"image-{region}" for region in guest.pages]
        outputs = self._here / "output", self._there / "output"
        proof = self.prover.prove(guest, self._there / _GUEST, images, outputs)
        if proof is None:
            raise ChildFailed("the promoted guest ended with its daemon")
        if replica["outputs_mark"] < (self.killed.released if self.killed else 0):
            failures.append(f"the promoted epoch knows of outputs up to {replica['outputs_mark']} only")
        if not proof.digest_equal:
            differing = proof.memory.differing_pages
            failures.append(f"{differing} pages of the promoted guest are wrong at step {proof.step}")
            failures += proof.named
        if not proof.state_equal:
            failures.append(f"the registers of the promoted guest are wrong at step {proof.step}")
        for what in ("lost", "contradicted", "wrong"):
            numbers: list[int] = getattr(proof.outputs, what)
            if numbers:
                failures.append(f"{len(numbers)} outputs are {what}, from number {numbers[0]} on")
        return proof, failures

    def _earlier(self) -> list[str]:
        """P1: the promoted epoch is that which the primary last knew to be safe, or a later one."""
        epoch, known = self.promoted.get("epoch", 0), self.killed.acknowledged if self.killed else 0
        if epoch < known:
            return [f"epoch {epoch} was promoted, though {known} was acknowledged"]
        # with nothing in flight, the primary's digest is that of the epoch that was acknowledged last
        if epoch == known and not self.last["in_flight"] and self.last["digest"] != self.promoted["digest"]:
            return [f"epoch {epoch} has digest {self.promoted['digest']} here, and had {self.last['digest']} there"]
        return []

    def within_an_epoch(self) -> bool:
        """The primary died when a part of an epoch had arrived, which is gone."""
        return self.killed is not None and self.killed.receiving > self.promoted["epoch"]

    def rolled_back(self) -> int:
        """Epochs that were on their way when the primary died and are gone."""
        if self.killed is None:
            return 0
        sent = max(self.killed.receiving, int(self.last["epoch"]) + int(self.last["in_flight"]))
        return max(0, sent - int(self.promoted["epoch"]))

    # --- inside

    def _freeze_at(self, moment: Moment, seconds: float) -> int:
        """Leaves the primary stopped, if possible at that moment; the epoch that the secondary has a part of, or 0.

        To be stopped and then killed is to be killed when it was stopped, but we can look in between.
        """
        until = time.monotonic() + seconds
        self.primary.yield_cpu()  # or on a busy machine it would always finish its epoch before we are woken
        while time.monotonic() < until:
            # Most often for less time than it takes to send an epoch, or we should always look before or after one.
            time.sleep(self.setting.interval_ms / 1e3 * self.chance.random() ** 6)
            self.primary.freeze()
            found = self._settled()
            if found["receiving_epoch"] if moment == "within" else found["outputs_mark"] > self._released():
                return int(found["receiving_epoch"])
            self.primary.thaw()
        return 0

    def _released(self) -> int:
        """The number of the last output that has left the primary."""
        return self.prover.released(self._here / "output")

    def _settled(self) -> dict[str, Any]:
        """The secondary's status of the guest once all that was sent has arrived."""
        before = self.replica()
        while True:
            time.sleep(_STILL)
            now = self.replica()
            if now["bytes_received"] == before["bytes_received"] and now["epoch"] == before["epoch"]:
                return now
            before = now

    def _check(self) -> None:
        self.primary.check()
        self.secondary.check()

    def _look(self, watch: Watch | None) -> dict[str, Any] | None:
        primary = replica = None
        if self.primary.running:
            with suppress(Unreachable, Answered):
                primary = self.primary.status()
        if watch is not None:
            with suppress(Unreachable, Answered):
                replica = self.replica()
            watch(primary, replica)
        return primary

    def _write_files(self) -> None:
        one, address = self.setting, f"127.0.0.1:{self._port}"
        self._files[0].write_text(write_toml({
            "guest": {
                "name": _GUEST, "kind": one.kind, "memory": f"{one.memory}B", "vcpus": one.vcpus,
                "workload": one.workload, "seed": one.seed, "tracker": one.tracker, "dirty_rate": one.rate,
                "ring_entries": one.ring_entries, "output_every": one.output_every,
                "output": str(self._here / "output"),
            },
            "secondary": {"address": address},
            "checkpoint": {
                "interval": f"{one.interval_ms}ms", "level": one.level, "encoding": one.encoding,
                "stage": f"{one.stage_mib}MiB", "delta_cache": f"{one.stage_mib}MiB", "batch": f"{one.batch_kib}KiB",
            },
            "runtime": {"dir": str(self._here)},
        }))  # fmt: skip
        self._files[1].write_text(write_toml({
            "listen": {"address": address},
            "replica": {
                "dir": str(self.replicas), "history": one.history, "history_bytes": "128MiB", "reserve": "32MiB",
            },
            "[guest]": {"name": _GUEST, "kind": one.kind, "output": str(self._there / "output")},
            "runtime": {"dir": str(self._there)},
        }))  # fmt: skip
        for place in (self._here, self._there):
            place.mkdir(exist_ok=True)

    def about(self) -> dict[str, object]:
        return asdict(self.setting)


def write_toml(sections: dict[str, dict[str, object]]) -> str:
    """The sections of a file. A JSON string, number or list is TOML's, too."""

    def written(value: object) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{json.dumps(key)} = {json.dumps(one)}" for key, one in value.items()) + " }"
        return json.dumps(value)

    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {written(value)}\n" for key, value in keys.items())
        for name, keys in sections.items()
    )


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
