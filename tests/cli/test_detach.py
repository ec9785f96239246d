"""`ckptd detach` against a real pair with a sim guest, which runs on; its output stays held until a daemon is back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.pair import Pair, wait_for


def detach(pair: Pair, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptd", "detach", "--socket", str(pair.primary.socket), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_the_primary_ends_and_the_guest_runs_on_with_its_output_held(as_json: bool, tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    try:
        pair.start()
        wait_for(pair.last_output, "output has left")
        pid, steps = pair.guest_pid(), pair.guest_steps()
        done = detach(pair, *(["--json"] if as_json else []))
        assert (done.returncode, done.stderr) == (0, "")
        assert pair.primary.exit_code() == 0
        held = pair.held()["epoch"]
        if as_json:
            answer = json.loads(done.stdout)
            assert answer == {"guest": "vm1", "epoch": answer["epoch"], "output_flows": False}
            epoch = answer["epoch"]
        else:
            said = " ".join(done.stdout.split())
            found = re.fullmatch(
                "guest vm1 is not protected any more and goes on; its output stays held until a daemon is back the "
                r"secondary holds it as of epoch (\d+): do not promote that while the guest runs here",
                said,
            )
            assert found, said
            epoch = int(found[1])
        assert 0 < epoch <= held  # what was on its way may have become safe after the primary's last word

        assert pair.guest_pid() == pid
        before = pair.last_output()
        wait_for(lambda: pair.guest_steps() > steps + 1000, "the guest runs on")
        assert pair.last_output() == before
        assert wait_for(lambda: pair.held()["condition"] == "waiting", "the secondary keeps what it holds")
        assert pair.held()["epoch"] == held

        pair.primary.start()  # attaches to the same guest, and lets go of what was held
        pair.protected()
        assert pair.guest_pid() == pid
        wait_for(lambda: pair.last_output() > before, "output leaves again")
        pair.verify()
        pair.check_outputs()
    finally:
        pair.close()


def test_without_its_secondary_it_ends_too(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    try:
        pair.start()
        pair.secondary.kill()
        wait_for(lambda: pair.condition() == "unprotected", "the secondary is missed")
        epoch = pair.primary.ask()["epoch"]
        done = detach(pair, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"guest": "vm1", "epoch": epoch, "output_flows": False}
        assert pair.primary.exit_code() == 0
        assert pair.guest_pid()
    finally:
        pair.close()


def test_nobody_there_is_exit_code_4(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    done = detach(pair, "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["error"] == "Unreachable"


def test_a_secondary_cannot_be_detached(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    try:
        pair.secondary.start()
        wait_for(pair.secondary.answers, "the secondary answers")
        command = [sys.executable, "-m", "ckptd", "detach", "--socket", str(pair.secondary.socket), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 4
        assert "does not know" in json.loads(done.stdout)["message"]
    finally:
        pair.close()
