"""The commands that ask a daemon, against real ones; exit codes and the shapes of their JSON."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ckptd.cli.main import main
from ckptd.demo.children import kill_guest
from ckptd.demo.pair import Pair, Setting


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ckptd = Callable[..., Done]


@pytest.fixture
def ckptd(capsys: pytest.CaptureFixture[str]) -> Ckptd:
    """A command, in this process: `ckptd("status", "--json")`."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return call


def make(directory: Path) -> Pair:
    for name in ("d", "r"):
        (directory / name).mkdir()
    setting = Setting(memory=16 << 20, rate=5000, interval_ms=50, output_every=4, stage_mib=8, history=200)
    return Pair(setting, directory / "d", directory / "r", random.Random(1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Protected; the tests of this module leave it so."""
    one = make(tmp_path_factory.mktemp("c"))
    try:
        one.start()
        one.wait_protected()
        one.protect(0.5)
        yield one
    finally:
        one.close()


@pytest.fixture
def own_pair(tmp_path: Path) -> Iterator[Pair]:
    """Protected; for a test that changes it for good."""
    one = make(tmp_path)
    try:
        one.start()
        one.wait_protected()
        one.protect(0.3)
        yield one
    finally:
        one.close()


def here(pair: Pair) -> tuple[str, Path]:
    return "-c", pair.directory / "primary.toml"


def there(pair: Pair) -> tuple[str, Path]:
    return "-c", pair.directory / "secondary.toml"


# Asking.


def test_status_of_both_roles_has_rates_and_names_the_condition(ckptd: Ckptd, pair: Pair) -> None:
    primary = ckptd("status", *here(pair), "--json").json
    assert (primary["role"], primary["condition"], primary["guest"]) == ("primary", "protected", "demo")
    assert primary["rates"]["dirty_pages"] > 0 and primary["rates"]["epochs_committed"] > 0
    assert primary["pause_ms"].keys() == {"p50", "p99", "max"}
    secondary = ckptd("status", "--socket", pair.secondary.socket, "--json").json
    (guest,) = secondary["guests"]
    assert (secondary["role"], guest["condition"], guest["holding"]) == ("secondary", "receiving", "committed")
    assert guest["rates"]["pages_received"] > 0


def test_status_for_people(ckptd: Ckptd, pair: Pair) -> None:
    shown = ckptd("status", *here(pair)).out
    assert "protected for" in shown and "epochs/s" in shown and "held" in shown
    shown = ckptd("status", *there(pair)).out
    assert "receiving for" in shown and "ready, pid" in shown


def test_status_watched_is_an_object_a_line_until_interrupted(pair: Pair) -> None:
    command = [sys.executable, "-m", "ckptd", "status", "--watch", "--every", "100ms", "--json", *map(str, here(pair))]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    try:
        lines = [json.loads(watching.stdout.readline()) for _ in range(3)]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 130
    finally:
        watching.kill()
        watching.wait()
        watching.stdout.close()
    assert lines[0]["epoch"] < lines[2]["epoch"]


def test_a_checkpoint_is_acknowledged_when_the_command_returns(ckptd: Ckptd, pair: Pair) -> None:
    done = ckptd("checkpoint", *here(pair), "--json")
    assert (done.code, done.json.keys()) == (0, {"epoch", "pages", "digest"})
    assert pair.replica()["epoch"] >= done.json["epoch"]
    assert "is acknowledged" in ckptd("checkpoint", *here(pair)).out


def test_verify_compares_both_ends(ckptd: Ckptd, pair: Pair) -> None:
    done = ckptd("verify", *here(pair), "--json")
    assert (done.code, done.json["equal"]) == (0, True)
    assert "both ends are equal" in ckptd("verify", *here(pair)).out


def test_history_lists_consecutive_epochs(ckptd: Ckptd, pair: Pair) -> None:
    found = ckptd("history", *there(pair), "--guest", "demo", "--json").json
    epochs = [one["epoch"] for one in found["epochs"]]
    assert epochs == list(range(epochs[0], epochs[-1] + 1)) and len(epochs) > 2
    assert {"epoch", "term", "pages", "bytes", "time", "digest", "chain"} <= found["epochs"][0].keys()
    assert "digest" in ckptd("history", *there(pair)).out


def test_an_epoch_is_restored_beside_the_running_ones(
    ckptd: Ckptd, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a relative path is the user's, not the daemon's
    wanted = ckptd("history", *there(pair), "--json").json["epochs"][-1]
    done = ckptd("restore", *there(pair), "--epoch", wanted["epoch"], "--out", "old", "--json")
    assert done.code == 0, done
    assert done.json["digest"] == wanted["digest"]
    assert (tmp_path / "old" / "image-ram").stat().st_size == 16 << 20
    again = ckptd("restore", *there(pair), "--epoch", wanted["epoch"], "--out", "old")
    assert (again.code, again.out) == (5, "")
    assert "not empty" in again.err


def test_an_epoch_that_is_not_retained_is_refused(ckptd: Ckptd, pair: Pair, tmp_path: Path) -> None:
    done = ckptd("restore", *there(pair), "--epoch", 10**6, "--out", tmp_path / "never", "--json")
    assert done.code == 5
    assert (done.json["error"], "not retained" in done.json["message"]) == ("StateError", True)
    assert not list(tmp_path.glob("never/*"))


def test_a_recording_replays_to_the_same_digests(ckptd: Ckptd, pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "recording"
    done = ckptd("record", *there(pair), "--out", file, "--json")
    assert done.code == 0, done
    assert done.json["bytes"] == file.stat().st_size
    replayed = ckptd("replay", file, "--json")
    assert replayed.code == 0, replayed
    assert replayed.json["ok"] is True and replayed.json["differs"] is None
    assert (replayed.json["first"], replayed.json["last"]) == (done.json["first"], done.json["last"])
    assert "each with the digest" in ckptd("replay", file).out


def test_a_damaged_recording_is_named_by_its_first_wrong_epoch_and_exits_7(
    ckptd: Ckptd, pair: Pair, tmp_path: Path
) -> None:
    file = tmp_path / "recording"
    last = ckptd("record", *there(pair), "--out", file, "--json").json["last"]
    with file.open("r+b") as damaged:
        damaged.seek(-5000, os.SEEK_END)
        byte = damaged.read(1)[0]
        damaged.seek(-1, os.SEEK_CUR)
        damaged.write(bytes([byte ^ 1]))
    done = ckptd("replay", file, "--json")
    assert (done.code, done.json["ok"]) == (7, False)
    assert done.json["differs"]["epoch"] <= last
    shown = ckptd("replay", file)
    assert shown.code == 7 and "DIFFERS" in shown.out


# Refused, and nobody there.


def test_no_promotion_while_the_primary_lives(ckptd: Ckptd, pair: Pair) -> None:
    done = ckptd("promote", *there(pair), "--json")
    assert (done.code, done.json["error"]) == (5, "StateError")
    assert "switchover" in done.json["hint"]
    shown = ckptd("discard", *there(pair))
    assert (shown.code, shown.out) == (5, "")
    assert "connected" in shown.err
    assert pair.primary.status()["condition"] == "protected"


def test_a_question_for_the_other_role(ckptd: Ckptd, pair: Pair) -> None:
    assert ckptd("history", *here(pair)).code == 3
    done = ckptd("history", "--socket", pair.primary.socket)
    assert done.code == 4 and "does not know" in done.err


def test_a_guest_that_the_secondary_has_not(ckptd: Ckptd, pair: Pair) -> None:
    done = ckptd("history", *there(pair), "--guest", "other")
    assert done.code == 5 and "guests: demo" in done.err


@pytest.mark.parametrize(
    "line",
    [
        ["status"], ["checkpoint"], ["verify"], ["switchover"], ["history"], ["promote"], ["discard"],
        ["restore", "--epoch", "1", "--out", "x"], ["record", "--out", "x"],
    ],
    ids=lambda line: line[0],
)  # fmt: skip
def test_without_a_daemon_every_command_exits_4(ckptd: Ckptd, tmp_path: Path, line: list[str]) -> None:
    done = ckptd(*line, "--socket", tmp_path / "nobody.sock", "--json")
    assert (done.code, done.json["error"]) == (4, "Unreachable")


def test_replay_of_what_is_no_recording(ckptd: Ckptd, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 500)
    assert ckptd("replay", tmp_path / "file").code == 1
    assert ckptd("replay", tmp_path).code == 5  # an empty directory holds no replica


# For good.


def test_a_switchover_moves_the_guest_and_ends_the_primary(ckptd: Ckptd, own_pair: Pair) -> None:
    done = ckptd("switchover", *here(own_pair), "--json")
    assert done.code == 0, done
    assert done.json["digest_equal"] is True and done.json["term"] == 2
    there_now = own_pair.replica()
    assert (there_now["condition"], there_now["epoch"]) == ("promoted", done.json["epoch"])
    own_pair.promoted = done.json
    own_pair.run_on(0.3)
    proof, failures = own_pair.check()
    assert failures == [] and proof.outputs.released > 0
    assert ckptd("promote", *there(own_pair)).code == 4  # the secondary was ended by the proof


def test_failover_by_hand_then_offline_reading_of_the_replica(ckptd: Ckptd, own_pair: Pair, tmp_path: Path) -> None:
    own_pair.primary.kill()
    kill_guest(own_pair.directory / "p")
    own_pair.secondary.end()
    replica = own_pair.replicas / "demo"
    assert ckptd("replay", replica, "--json").json["ok"] is True
    recorded = ckptd("record", "--dir", replica, "--out", tmp_path / "recording", "--json").json
    restored = ckptd("restore", "--dir", replica, "--epoch", recorded["last"], "--out", tmp_path / "o", "--json")
    assert restored.json["epoch"] == recorded["last"]
    own_pair.restart_secondary()
    assert ckptd("replay", replica).code == 5  # its daemon has it open
    done = ckptd("promote", *there(own_pair))
    assert done.code == 0 and "in term 2" in done.out
    assert ckptd("promote", *there(own_pair)).code == 5
