"""Epochs, acknowledgements and the gate; every way in which pages travel ends in equal digests."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptd.control.client import Answered
from ckptd.errors import StateError, VerifyFailed
from tests.e2e.pair import GUEST, Pair, wait_for

Make = Callable[..., Pair]


def test_outputs_leave_only_with_acknowledged_epochs(make_pair: Make) -> None:
    pair = make_pair(relay=True, link={"timeout": "60s"}, secondary_link={"timeout": "60s"}).start()
    pair.advances("outputs_released", 20)
    assert pair.relay is not None
    pair.relay.set("up", frozen=True)  # epochs leave, and do not arrive
    wait_for(pair.no_more_fits, "the window fills")
    written, steps = pair.primary.ask()["outputs_written"], pair.steps()
    wait_for(lambda: pair.primary.ask()["outputs_written"] > written + 30, "the guest goes on talking")
    assert pair.steps() > steps
    wait_for(lambda: pair.held()["outputs_mark"] == pair.last_output(), "what the last committed epoch marked, no more")
    assert pair.last_output() == pair.primary.ask()["outputs_released"] < written
    assert pair.condition() == "protected"  # silence is no loss before link.timeout
    pair.relay.set()
    wait_for(lambda: pair.last_output() > written + 30, "held output leaves")
    pair.secondary.signal(signal.SIGSTOP)
    written = pair.primary.ask()["outputs_written"]
    wait_for(lambda: pair.primary.ask()["outputs_written"] > written + 30, "the guest goes on talking")
    released = pair.last_output()
    wait_for(lambda: pair.primary.ask()["outputs_written"] > written + 60, "and on")
    assert pair.last_output() == released
    pair.secondary.signal(signal.SIGCONT)
    wait_for(lambda: pair.last_output() > written + 30, "held output leaves")
    status = pair.primary.ask()
    assert (status["epochs_rolled_back"], status["rescans"]) == (0, 1)
    pair.verify()
    assert pair.check_outputs() > 60
    held = pair.held()
    assert held["condition"] == "receiving" and held["holding"] == "committed"


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint": {"encoding": "xor-lz4"}, "guest": {"tracker": "ring"}},
        {"checkpoint": {"encoding": "auto", "interval": {"min": "5ms", "max": "100ms", "target_lag": "30ms"}}},
        {"checkpoint": {"level": "durable"}, "guest": {"regions": {"low": "1MiB", "high": "12MiB"}, "vcpus": 3}},
    ],
    ids=["xor-lz4 and ring", "auto and adaptive", "durable, two regions, three vcpus"],
)
def test_every_way_ends_in_equal_digests(make_pair: Make, options: dict[str, Any]) -> None:
    pair = make_pair(**options).start()
    pair.advances("epochs_committed", 20)
    pair.verify()
    before = pair.primary.ask()
    pair.secondary.kill()
    pair.secondary.start()
    pair.protected(10)
    answer = pair.verify()
    status = pair.primary.ask()
    assert status["rescans"] == before["rescans"] == 1 and status["connections"] > before["connections"]
    assert status["epochs_rolled_back"] <= 4 + 1  # the window, and the one that was being sent
    if options["checkpoint"].get("encoding") == "xor-lz4":
        assert status["delta_pages"] > 0
    if options["checkpoint"].get("level") == "durable":
        assert "durable" in status["reason"]
    assert len(answer["digest"]) == 32
    assert pair.check_outputs() > 0


def test_more_dirty_pages_than_the_stage_holds(make_pair: Make) -> None:
    """Precopy inside an epoch; when it does not converge, the paused guest is streamed."""
    few = {"stage": "1MiB", "batch": "256KiB", "max_iterations": 2, "interval": "100ms"}
    pair = make_pair(guest={"dirty_rate": 60_000}, checkpoint=few).start()
    before = pair.primary.ask()
    after = pair.advances("epochs_committed", 5)
    dirty, epochs = (after[key] - before[key] for key in ("dirty_pages", "epochs_committed"))
    assert dirty / epochs > 256
    pair.verify()
    pair.advances("epochs_committed", 2)
    pair.verify()
    assert pair.check_outputs() > 0
    assert pair.primary.ask()["rescans"] == 1


def test_a_tiny_ring_ends_epochs_early_and_is_emptied_while_unprotected(make_pair: Make) -> None:
    pair = make_pair(guest={"tracker": "ring", "ring_entries": 64}, checkpoint={"interval": "1min"}).start()
    pair.advances("epochs_committed", 20)  # in less than 20 minutes: the ring wakes the daemon
    pair.verify()
    pair.secondary.kill()
    wait_for(lambda: pair.condition() == "unprotected", "unprotected")
    steps = pair.steps()
    wait_for(lambda: pair.steps() > steps + 100, "the guest is not kept waiting for its ring")
    pair.secondary.start()
    pair.protected()
    pair.verify()
    pair.check_outputs()


def test_a_full_gate_stalls_the_guest_and_drops_nothing(make_pair: Make) -> None:
    pair = make_pair(guest={"gate_capacity": "4KiB", "output_every": 1}).start()
    pair.advances("outputs_released", 50)
    pair.secondary.kill()
    wait_for(lambda: pair.primary.ask()["gate_full"], "the gate fills")
    before = pair.primary.ask()
    assert before["outputs_held"] == 4096 // 32
    pair.primary.ask()
    after = wait_for(lambda: (now := pair.primary.ask())["connections"] >= 1 and now, "still there")
    assert after["guest_facts"]["steps"] == before["guest_facts"]["steps"]
    pair.secondary.start()
    pair.protected()
    pair.advances("outputs_released", 200)
    pair.verify()
    assert pair.check_outputs() > before["outputs_written"]


def image_of(pair: Pair) -> Path:
    return next((pair.replica_dir / GUEST).glob("image-*"))


def test_verify_finds_what_changed_behind_the_daemons_backs(make_pair: Make) -> None:
    pair = make_pair(guest={"dirty_rate": 640}).start()
    pair.verify()
    with image_of(pair).open("r+b") as image:
        for gfn in range(100, 120):  # the guest may write some of them again, not all
            image.seek(gfn * 4096 + 8)
            image.write(b"not the guest's")
    with pytest.raises(Answered, match="the secondary's image has digest") as there:
        pair.verify()
    assert there.value.exit_code == VerifyFailed.exit_code == 7
    assert there.value.as_dict()["error"] == "VerifyFailed" and int(str(there.value.where["epoch"])) > 0
    # the secondary no longer trusts its image, and is brought up again by hash
    wait_for(lambda: "INCONSISTENT" in pair.secondary.log() and "INCONSISTENT" in pair.primary.log(), "both say so")
    wait_for(lambda: pair.held()["holding"] == "committed" and pair.condition() == "protected", "trusted again")
    pair.verify()

    other = make_pair(guest={"dirty_rate": 640}).start()
    other.verify()
    memory = next(
        path for path in Path(f"/proc/{other.guest_pid()}/fd").iterdir()
        if path.is_symlink() and "ckptd-ram" in os.readlink(path)
    )  # fmt: skip
    with memory.open("r+b") as ram:
        for gfn in range(200, 220):
            ram.seek(gfn * 4096 + 8)
            ram.write(b"not the tracker's")
    with pytest.raises(Answered, match="without the tracker seeing it") as here:
        other.verify()
    assert here.value.exit_code == 7 and int(str(here.value.where["epoch"])) > 0
    other.advances("epochs_committed", 2)  # a failed verification pauses nothing for good
    other.verify()  # and what the tracker had missed was found and sent


def test_history_restore_and_record_beside_running_epochs(make_pair: Make, tmp_path: Path) -> None:
    pair = make_pair().start()
    pair.advances("epochs_committed", 10)
    epochs = pair.secondary.ask("history")["epochs"]
    assert [one["epoch"] for one in epochs] == list(range(epochs[0]["epoch"], epochs[-1]["epoch"] + 1))
    chosen = epochs[-5]
    out = tmp_path / "restored"
    answer = pair.secondary.wish("restore", epoch=chosen["epoch"], out=str(out))
    assert answer["digest"] == chosen["digest"] == json.loads((out / "epoch.json").read_text())["digest"]
    assert (out / "image-ram").stat().st_size == 16 << 20
    recording = tmp_path / "recording"
    recorded = pair.secondary.wish("record", guest=GUEST, out=str(recording))
    assert recording.stat().st_size == recorded["bytes"] > 0
    with pytest.raises(Answered, match="not retained") as refused:
        pair.secondary.wish("restore", epoch=10**6, out=str(tmp_path / "never"))
    assert refused.value.exit_code == StateError.exit_code
    with pytest.raises(Answered, match="wrong parameters"):
        pair.secondary.wish("restore", epoch="soon", out=str(tmp_path / "never"))
    assert pair.primary.ask()["epochs_rolled_back"] == 0
    pair.protected()
    pair.verify()
