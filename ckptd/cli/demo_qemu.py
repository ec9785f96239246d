"""`ckptd demo --guest qemu`: a Linux that runs in stock QEMU, protected from outside, taken over with its clients."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypedDict

from rich.table import Table
from rich.text import Text

from ckptd.cli.common import emit
from ckptd.cli.demo import end_once, machine_facts, place_for
from ckptd.errors import CkptdError
from ckptd.units import format_size, parse_size

__all__ = ["demo_qemu"]

_RUN_ON = 2.0  # seconds that the promoted guest answers before the numbers are looked at
_MIB = 1 << 20


class Report(TypedDict):
    """What `--json` prints."""

    ok: bool
    failures: list[str]
    guest: str
    seed: int
    seconds: float
    memory_bytes: int
    network: str
    why_not_tap: str
    boot_seconds: float
    qemu: str
    epochs_committed: int
    promoted_epoch: int
    pause_ms: dict[str, float]
    commit_ms: dict[str, float]
    promote_ms: float
    first_reply_ms: float
    replies: int
    replies_after: int
    same_connection: bool
    consecutive: bool
    response_ms: float
    machine: dict[str, object]


def demo_qemu(seconds: float, memory: str, seed: int | None, network: str, keep: bool, as_json: bool) -> int:
    """The story, told and proved; 0 if nothing was lost. Raises CkptdError."""
    from ckptd.demo.children import ChildFailed
    from ckptd.demo.linux import COUNTER_PORT, build, default_folder
    from ckptd.demo.network import enter
    from ckptd.demo.qemu_pair import QemuPair, QemuSetting

    seed = random.randrange(1 << 32) if seed is None else seed
    linux = build(default_folder(), lambda text: print(f"ckptd demo: {text}", file=sys.stderr))
    found, why = enter([COUNTER_PORT], wanted=network)
    size = parse_size(memory)
    end_once()
    directory = Path(tempfile.mkdtemp(prefix="ckptd-demo-"))
    replicas = place_for(size, "memory", directory)
    pair = QemuPair(QemuSetting(memory_mib=size // _MIB), linux, found, directory, replicas)
    try:
        report = _play(pair, seconds, random.Random(seed), seed, why)
        keep = keep or not report["ok"]
    except CkptdError as error:
        keep = True
        raise ChildFailed(error.message, hint=error.hint or pair.secondary.tail(), **error.where) from error
    except Exception:
        keep = True
        raise
    finally:
        pair.close()
        if keep:
            print(f"ckptd demo: files and logs are in {directory} and {replicas}", file=sys.stderr)
        else:
            pair.remove()
    emit(report, as_json, _shown)
    return 0 if report["ok"] else 1


def _play(pair: Any, seconds: float, chance: random.Random, seed: int, why: str) -> Report:
    from ckptd.bench.machine import median
    from ckptd.demo.show import Show

    setting, same = pair.setting, pair.network.same_connection
    with Show() as show:
        if why:
            show.phase(f"no tap devices ({why}): with user networking the client has to connect again")
        show.phase(f"a Linux boots in QEMU, {setting.memory_mib} MiB; nothing of it is prepared for what comes")
        pair.boot()
        client = pair.client()
        client.start()
        show.phase(f"it has booted in {pair.boot_seconds:.1f} s, and a client counts with it; two daemons attach")
        pair.attach()
        pair.wait_protected(watch=show.figures)
        show.phase("protected, and a standby has rehearsed")
        since = len(client.numbers)
        pair.protect(seconds, watch=show.figures)
        gated = [1e3 * (b[1] - a[1]) for a, b in zip(client.numbers[since:], client.numbers[since + 1 :], strict=False)]
        time.sleep(chance.uniform(0, 2 * setting.interval_ms / 1e3))
        pair.kill_host()
        before = len(client.numbers)
        show.phase(f"kill -9: QEMU, the primary and its keeper are dead; the client has {before} numbers")
        promoted = pair.promote()
        show.phase(f"promoted at epoch {promoted['epoch']} in term {promoted['term']}, {promoted['promote_ms']:.1f} ms")
        clients = [client]
        if not same:
            clients.append(pair.client(there=True))
            clients[-1].start()
        until = time.monotonic() + 30
        while not any(at > pair.killed_at for one in clients for _, at in one.numbers) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(_RUN_ON)
        for one in clients:
            one.stop()
        numbers = [number for one in clients for number, _ in one.numbers]
        later = [at for one in clients for _, at in one.numbers if at > pair.killed_at]
        failures = pair.failures(numbers)
        if not later:
            failures.append(f"the client was told nothing after the kill: {clients[-1].error or 'silence'}")
        elif same and client.error:
            failures.append(f"the client's connection did not survive: {client.error}")
        show.phase(f"{len(numbers)} numbers, " + ("each of them once" if not failures else "NOT as they must be"))
    return Report(
        ok=not failures, failures=failures, guest="qemu", seed=seed, seconds=seconds,
        memory_bytes=setting.memory_mib * _MIB, network="tap" if same else "user", why_not_tap=why,
        boot_seconds=round(pair.boot_seconds, 3), qemu=str(pair.last["guest_facts"].get("qemu", "")),
        epochs_committed=pair.last["epochs_committed"], promoted_epoch=promoted["epoch"],
        pause_ms=pair.last["pause_ms"], commit_ms=pair.last["commit_ms"], promote_ms=promoted["promote_ms"],
        first_reply_ms=round(1e3 * (min(later) - pair.killed_at), 3) if later else -1.0, replies=len(numbers),
        replies_after=len(later), same_connection=same and not client.error, consecutive=not failures,
        response_ms=round(median(gated), 3) if gated else -1.0, machine=machine_facts(),
    )  # fmt: skip


def _shown(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()

    def spread(ms: dict[str, float]) -> str:
        return f"{ms['p50']:.2f} ms median, {ms['p99']:.2f} ms p99, {ms['max']:.2f} ms longest"

    size = format_size(report["memory_bytes"])
    table.add_row("guest", f"Linux in QEMU {report['qemu']}, {size}, {report['network']} networking")
    table.add_row("epochs", f"{report['epochs_committed']} committed")
    table.add_row("pause", spread(report["pause_ms"]))
    table.add_row("commit", spread(report["commit_ms"]))
    table.add_row("response", f"{report['response_ms']:.1f} ms median while protected")
    first = f"first reply {report['first_reply_ms']:.0f} ms after the death"
    table.add_row("promotion", f"{report['promote_ms']:.1f} ms; {first}")
    verdict = f"{report['replies']} replies, {report['replies_after']} of them from the promoted guest: "
    verdict += "none missing, none twice" if report["consecutive"] else "NOT consecutive"
    table.add_row("numbers", Text(verdict, "green" if report["ok"] else "bold red"))
    if report["same_connection"]:
        table.add_row("connection", Text("one, from beginning to end", "green"))
    for failure in report["failures"]:
        table.add_row("FAILED", Text(failure, "bold red"))
    return table
