"""`ckptd demo`: the whole promise, seen and proved on this machine in half a minute."""

from __future__ import annotations

import os
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from ckptd.cli.common import Json, emit
from ckptd.errors import CkptdError, ConfigError
from ckptd.units import format_size, parse_size

__all__ = ["demo", "end_once", "machine_facts", "place_for"]

_RUN_ON = 1.5  # seconds that the promoted guest runs before it is looked at
_SPARE = 512 << 20  # of /dev/shm, beside the image

_DEFAULTS = {"sim": ("zipf", "256MiB"), "kvm": ("random", "64MiB")}  # workload and memory


def demo(
    *,
    guest: Literal["sim", "kvm", "qemu"] = "sim",
    seconds: float = 10.0,
    memory: str | None = None,
    workload: str | None = None,
    vcpus: int = 2,
    level: Literal["memory", "durable"] = "memory",
    seed: int | None = None,
    network: Literal["auto", "tap", "user"] = "auto",
    keep: Annotated[bool, Parameter(negative=())] = False,
    as_json: Json = False,
) -> int:
    """Protect a guest, kill its host within an epoch, resume it elsewhere, and prove that nothing was lost.

    Parameters
    ----------
    guest
        The kind of guest: sim, a computer in miniature; kvm, a VM of this machine's KVM; qemu, a small Linux in a stock
        QEMU, which is attached to when it runs.
    seconds
        How long it is protected before its host dies.
    memory
        The guest's memory: 256MiB for sim, 64MiB for kvm, 512MiB for qemu.
    workload
        What the guest does. sim: zipf, uniform, sequential, kv, idle, bursts. kvm: random, counter, patterns. qemu: a
        counter that a client asks.
    vcpus
        The guest's virtual processors.
    level
        When an epoch counts as safe: in the secondary's memory, or on its disk.
    seed
        Of the guest and of the moment of death; random without it.
    network
        Of a qemu guest: tap devices on a bridge in a namespace of its own, which needs root, or QEMU's user networking.
    keep
        Leave files and logs behind.
    """
    from ckptd.demo.children import ChildFailed
    from ckptd.demo.pair import Pair, Setting

    if not 0 < seconds <= 86400:
        raise ConfigError(f"--seconds {seconds:g} is not between 0 and a day")
    if guest == "qemu":
        from ckptd.cli.demo_qemu import demo_qemu

        if (workload, vcpus, level) != (None, 2, "memory"):
            raise ConfigError("a qemu guest takes no --workload, --vcpus or --level")
        return demo_qemu(seconds, memory or "512MiB", seed, network, keep, as_json)
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    usual_workload, usual_memory = _DEFAULTS[guest]
    size, workload = parse_size(memory or usual_memory), workload or usual_workload
    if (guest, workload) == ("kvm", "kv"):
        raise ConfigError("the kv program waits for requests on its console: the demo has none for it")
    setting = Setting(memory=size, kind=guest, workload=workload, vcpus=vcpus, seed=seed, level=level)
    end_once()
    directory = Path(tempfile.mkdtemp(prefix="ckptd-demo-"))
    replicas = place_for(size, level, directory)
    pair = Pair(setting, directory, replicas, random.Random(seed))
    try:
        report = _play(pair, seconds)
        keep = keep or not report["ok"]
    except CkptdError as error:
        keep = True
        raise ChildFailed(error.message, hint=error.hint or pair.secondary.tail(), **error.where) from error
    except Exception:  # what failed can be looked at; what was interrupted need not
        keep = True
        raise
    finally:
        pair.close()
        if keep:
            print(f"ckptd demo: files and logs are in {directory} and {replicas}", file=sys.stderr)
        else:
            pair.remove()
    emit(report, as_json, _shown)
    if not report["ok"]:
        for child in (pair.primary, pair.secondary):
            print(f"--- the end of {child.log}\n{child.tail()}", file=sys.stderr)
    return 0 if report["ok"] else 1


class Report(TypedDict):
    """What `--json` prints."""

    ok: bool
    failures: list[str]
    guest: str
    seed: int
    workload: str
    seconds: float
    vcpus: int
    level: str
    memory_bytes: int
    replica: str
    epochs_committed: int
    epochs_rolled_back: int
    killed_within_an_epoch: bool
    promoted_epoch: int
    dirty_pages: int
    raw_bytes: int
    wire_bytes: int
    pause_ms: dict[str, float]
    commit_ms: dict[str, float]
    promote_ms: float
    failover_ms: float
    steps: int
    outputs_released: int
    outputs_repeated: int
    outputs_lost: int
    outputs_contradicted: int
    outputs_wrong: int
    digest: str
    expected_digest: str
    digest_equal: bool
    state_equal: bool
    machine: dict[str, object]


def _play(pair: Any, seconds: float) -> Report:
    """The story. Raises ChildFailed and what the daemons answer."""
    from ckptd.demo.show import Show

    setting = pair.setting
    with Show() as show:
        show.phase(f"two daemons, and a guest with {format_size(setting.memory)} of memory, seed {setting.seed}")
        pair.start()
        pair.wait_protected(watch=show.figures)
        show.phase("protected: the secondary holds a committed epoch")
        last = pair.protect(seconds, watch=show.figures)
        killed = pair.kill_primary()
        show.phase(f"the primary's host is dead; {killed.released} {pair.prover.unit} had left it")
        promoted = pair.promote()
        gone = f"a part of epoch {killed.receiving} is gone" if pair.within_an_epoch() else "none was on its way"
        where, took = f"epoch {promoted['epoch']} ({gone}) in term {promoted['term']}", promoted["promote_ms"]
        show.phase(f"promoted at {where}, {took:.1f} ms")
        pair.run_on(_RUN_ON, watch=show.figures)
        show.phase("the same machine once more, from its seed alone, never interrupted")
        proof, failures = pair.check()
        show.phase(f"compared at step {proof.step}: " + ("equal" if not failures else "NOT equal"))
    return Report(
        ok=not failures, failures=failures, guest=setting.kind, seed=setting.seed, workload=setting.workload,
        seconds=seconds, vcpus=setting.vcpus, level=setting.level, memory_bytes=setting.memory,
        replica=str(pair.replicas), epochs_committed=promoted["epoch"], epochs_rolled_back=pair.rolled_back(),
        killed_within_an_epoch=pair.within_an_epoch(), promoted_epoch=promoted["epoch"],
        dirty_pages=last["dirty_pages"], raw_bytes=last["raw_bytes"], wire_bytes=last["wire_bytes"],
        pause_ms=last["pause_ms"], commit_ms=last["commit_ms"], promote_ms=promoted["promote_ms"],
        failover_ms=round(pair.failover_ms, 3),
        steps=proof.step, outputs_released=proof.outputs.released, outputs_repeated=proof.outputs.repeated,
        outputs_lost=len(proof.outputs.lost), outputs_contradicted=len(proof.outputs.contradicted),
        outputs_wrong=len(proof.outputs.wrong),
        digest=proof.memory.digest, expected_digest=proof.memory.expected_digest, digest_equal=proof.digest_equal,
        state_equal=proof.state_equal, machine=machine_facts(),
    )  # fmt: skip


def _shown(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()

    def spread(ms: dict[str, float]) -> str:
        return f"{ms['p50']:.2f} ms median, {ms['p99']:.2f} ms p99, {ms['max']:.2f} ms longest"

    def verdict(good: bool, text: str) -> Text:
        return Text(text, "green" if good else "bold red")

    outputs = report["outputs_lost"] + report["outputs_contradicted"] + report["outputs_wrong"]
    table.add_row("guest", f"{report['guest']}, {format_size(report['memory_bytes'])}, {report['workload']},"
                  f" {report['vcpus']} vCPUs, seed {report['seed']}")  # fmt: skip
    table.add_row("epochs", f"{report['epochs_committed']} committed ({report['level']}),"
                  f" {report['epochs_rolled_back']} on the way and rolled back")  # fmt: skip
    table.add_row("dirty pages", f"{report['dirty_pages']}, {format_size(report['raw_bytes'])};"
                  f" {format_size(report['wire_bytes'])} on the wire with the first image")  # fmt: skip
    table.add_row("pause", spread(report["pause_ms"]))
    table.add_row("commit", spread(report["commit_ms"]))
    table.add_row("promotion", f"{report['promote_ms']:.1f} ms; {report['failover_ms']:.1f} ms after the death")
    said = (
        f"{report['outputs_released']} released, {report['outputs_lost']} lost,"
        f" {report['outputs_contradicted']} contradicted, {report['outputs_wrong']} wrong"
    )
    table.add_row("outputs", verdict(not outputs, said))
    equal = "equal to" if report["digest_equal"] else "NOT that of"
    equal += " a run that was never interrupted"
    table.add_row("memory", verdict(report["digest_equal"], f"{equal}, at step {report['steps']}"))
    table.add_row("digest", report["digest"])
    for failure in report["failures"]:
        table.add_row("FAILED", Text(failure, "bold red"))
    return table


def end_once() -> None:
    """A signal unwinds, which ends all that was started; whoever is impatient must not interrupt that."""

    def end(number: int, _: object) -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def place_for(size: int, level: str, directory: Path) -> Path:
    """The replica's directory: in memory where that has room, and where "durable" need not mean a disk."""
    memory = Path("/dev/shm")
    if level == "memory" and memory.is_dir() and os.access(memory, os.W_OK):
        room = os.statvfs(memory)
        if room.f_bavail * room.f_frsize > size + _SPARE:
            return Path(tempfile.mkdtemp(prefix="ckptd-demo-", dir=memory))
    place = directory / "replicas"
    place.mkdir()
    return place


def machine_facts() -> dict[str, object]:
    """What the figures were measured on."""
    import psutil

    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model or platform.machine(), "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total, "kernel": platform.release(),
        "python": platform.python_version(), "load": os.getloadavg()[0], "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip
