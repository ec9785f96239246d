"""`ckptd bench qemu`: what protection costs a Linux in stock QEMU, and how fast it is taken over.

One guest under TCG, which writes pages at a steady rate and counts in a loop, seen in one run: alone; with QEMU's own
stop, save and cont at 20 times a second (bare); protected with 20 epochs a second, then with 10 and 40; detached, alone
and bare once more; then protected, killed, and promoted in the warm standby. Another is promoted cold, and two more
with more RAM. A pause lasts from before `stop` until QEMU has answered `cont`, in bare and in ours.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ckptd.bench.machine import conditions, median
from ckptd.demo.linux import COUNTER_PORT, SPIN_PORT, build, default_folder
from ckptd.demo.network import Network, enter
from ckptd.demo.qemu_pair import QemuPair, QemuSetting
from ckptd.guests.process.shared import make_file
from ckptd.guests.qemu.qmp import Monitor

__all__ = ["LIMITS", "bench_qemu"]

LIMITS = {
    "pause_ms_p50": 8.0, "pause_ms_p99": 25.0, "own_pause_ms_p50": 2.5, "promote_warm_ms": 40.0,
    "promote_cold_ms": 300.0,
}  # fmt: skip

_PAGES = 1_000  # dirty in an epoch
_EPOCHS = 20  # a second
_DIRTY = (_PAGES * _EPOCHS, 128)  # pages a second, MiB
_RATES = (10, 20, 40)
_MIB = 512
_LARGE_MIB = 4096

Say = Callable[[str], None]


def bench_qemu(*, seconds: float = 10.0, large_mib: int = _LARGE_MIB, say: Say = print) -> dict[str, Any]:
    """Raises CkptdError where there is no QEMU, or its guest cannot be built."""
    network, why = enter([COUNTER_PORT, SPIN_PORT])
    found: dict[str, Any] = {"bench": "qemu", "network": "tap" if network.same_connection else f"user ({why})"}
    with _booted(network, _MIB, say) as pair:
        say("the guest alone")
        plain_speed, plain_response = _speed(pair, seconds), _response(pair, seconds)
        say("QEMU's own stop, save and cont")
        bare = _bare(pair, int(seconds * _EPOCHS))
        say(f"protected, {_EPOCHS} epochs a second")
        pair.attach()
        pair.wait_protected()
        speed, response = {}, 0.0
        for rate in (_EPOCHS, *(one for one in _RATES if one != _EPOCHS)):
            say(f"protected, {rate} epochs a second")
            pair.set_interval(1000 // rate)
            time.sleep(1.0)
            before = pair.primary.status()
            began = time.monotonic()
            speed[rate] = _speed(pair, seconds)
            after, took = pair.primary.status(), time.monotonic() - began
            epochs = after["epochs_committed"] - before["epochs_committed"]
            if rate == _EPOCHS:
                found |= {
                    "pause_ms_p50": after["pause_ms"]["p50"], "pause_ms_p99": after["pause_ms"]["p99"],
                    "epochs_per_second": round(epochs / took, 2),
                    "dirty_pages": round((after["dirty_pages"] - before["dirty_pages"]) / max(epochs, 1)),
                    "commit_ms_p50": after["commit_ms"]["p50"],
                }  # fmt: skip
            if rate == 40:
                found["epochs_per_second_at_40"] = round(epochs / took, 2)
                response = _response(pair, seconds)
        say("detached, and once more alone and bare")
        pair.primary.end(30)
        plain_speed = (plain_speed + _speed(pair, seconds)) / 2  # before and after: this machine is not alone
        bare += _bare(pair, int(seconds * _EPOCHS))
        found |= {
            "bare_pause_ms_p50": round(median(bare), 3), "bare_pause_ms_p99": round(float(np.percentile(bare, 99)), 3),
            "slowdown": {str(rate): round(plain_speed / max(speed[rate], 1e-9), 3) for rate in _RATES},
            "response_ms": {"plain": round(plain_response, 3), "gated": round(response, 3)},
        }  # fmt: skip
        found["own_pause_ms_p50"] = round(found["pause_ms_p50"] - found["bare_pause_ms_p50"], 3)
        pair.set_interval(1000 // _EPOCHS)
        pair.restart_primary()
        pair.wait_protected()
        found["promote_warm_ms"] = _promoted(pair, cold=False, say=say)
    with _booted(network, _MIB, say) as pair:
        found["promote_cold_ms"] = _protected_and_promoted(pair, cold=True, say=say)
    large = {}
    for cold in (False, True):
        with _booted(network, large_mib, say) as pair:
            large["cold" if cold else "warm"] = _protected_and_promoted(pair, cold=cold, say=say)
    found["promote_large_ms"] = {"memory_mib": large_mib, **large}
    found["limits"] = LIMITS
    found["misses"] = [key for key, most in LIMITS.items() if found[key] > most]
    found["met"] = not found["misses"]
    found["conditions"] = {**conditions(), "memory_mib": _MIB, "accelerator": "tcg"}
    return found


@contextmanager
def _booted(network: Network, memory_mib: int, say: Say) -> Iterator[QemuPair]:
    linux = build(default_folder(), say)
    directory = Path(tempfile.mkdtemp(prefix="ckptd-bench-"))
    memory = Path("/dev/shm")
    replicas = Path(tempfile.mkdtemp(prefix="ckptd-bench-", dir=memory if os.access(memory, os.W_OK) else directory))
    setting = QemuSetting(memory_mib=memory_mib, interval_ms=1000 // _EPOCHS, dirty=_DIRTY, spin=True)
    pair = QemuPair(setting, linux, network, directory, replicas)
    try:
        say(f"a Linux boots, {memory_mib} MiB")
        pair.boot()
        yield pair
    finally:
        pair.close()
        pair.remove()


def _speed(pair: QemuPair, seconds: float) -> float:
    """How far the guest's loop counts in a second."""
    first, began = int(pair.ask(SPIN_PORT, "?")), time.monotonic()
    time.sleep(seconds)
    return (int(pair.ask(SPIN_PORT, "?")) - first) / (time.monotonic() - began)


def _response(pair: QemuPair, seconds: float) -> float:
    """Median of a client's waits, in ms."""
    client = pair.client()
    client.start()
    time.sleep(seconds)
    client.stop()
    times = [at for _, at in client.numbers]
    return 1e3 * median([later - earlier for earlier, later in pairwise(times)])


def _bare(pair: QemuPair, rounds: int) -> list[float]:
    """QEMU's own part of a pause, in ms, as often in a second as epochs."""
    monitor, fd = Monitor(pair.monitor), make_file("state", 0)
    position = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    fdset = monitor.execute("add-fd", None, [position])["fdset-id"]
    took, deadline = [], time.monotonic()
    for _ in range(rounds):
        os.ftruncate(fd, 0)
        os.lseek(position, 0, os.SEEK_SET)
        began = time.perf_counter()
        monitor.execute("stop")
        monitor.execute("xen-save-devices-state", {"filename": f"/dev/fdset/{fdset}", "live": False})
        monitor.execute("cont")
        took.append(1e3 * (time.perf_counter() - began))
        deadline += 1 / _EPOCHS
        time.sleep(max(0.0, deadline - time.monotonic()))
    monitor.execute("remove-fd", {"fdset-id": fdset})
    monitor.close()
    for one in (fd, position):
        os.close(one)
    return took


def _protected_and_promoted(pair: QemuPair, *, cold: bool, say: Say) -> float:
    pair.attach()
    pair.wait_protected()
    return _promoted(pair, cold=cold, say=say)


def _promoted(pair: QemuPair, *, cold: bool, say: Say) -> float:
    """From the decision to the guest running, in ms; `cold` without a standby that waits."""
    say(f"promotion, {'cold' if cold else 'warm'}, {pair.setting.memory_mib} MiB")
    pair.kill_host()
    if cold:
        pair.kill_standby()
    took = pair.promote()["promote_ms"]
    if int(pair.ask(SPIN_PORT, "?", there=True)) <= 0:
        raise AssertionError("the promoted guest counts nothing")
    return float(took)
