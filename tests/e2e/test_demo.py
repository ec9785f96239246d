"""`ckptd demo`, as a user starts it: it proves what it claims, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.guests.kvm.machines import needs_kvm

KEYS = {
    "ok", "failures", "guest", "seed", "workload", "seconds", "memory_bytes", "epochs_committed", "epochs_rolled_back",
    "dirty_pages", "wire_bytes", "raw_bytes", "pause_ms", "commit_ms", "promote_ms", "outputs_released",
    "outputs_lost", "outputs_contradicted", "digest_equal", "machine",
}  # fmt: skip


def command(tmp_path: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "CKPTD_GUEST__MEMORY": "1MiB"}
    return [sys.executable, "-m", "ckptd", "demo", *arguments], environment


def left_behind(tmp_path: Path) -> list[str]:
    """Processes whose command line or environment names this test's directory."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(tmp_path) in line:
            found.append(line)
    return found


@pytest.mark.parametrize("kind", ["sim", pytest.param("kvm", marks=[pytest.mark.kvm, needs_kvm])])
def test_proves_a_failover(kind: str, tmp_path: Path) -> None:  # a short name: sockets' paths are short
    arguments = ("--guest", kind, "--seconds", "2", "--memory", "32MiB", "--seed", "11", "--json")
    line, environment = command(tmp_path, *arguments)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= KEYS
    assert report["ok"] is True and report["failures"] == []
    assert report["digest_equal"] is True and report["digest"] == report["expected_digest"]
    assert (report["outputs_lost"], report["outputs_contradicted"], report["outputs_wrong"]) == (0, 0, 0)
    assert report["guest"] == kind and report["state_equal"] is True
    assert (report["seed"], report["memory_bytes"]) == (11, 32 << 20)  # the CKPTD_ variable above is not the demo's
    assert report["epochs_committed"] > 5 and report["outputs_released"] > 5
    assert report["pause_ms"].keys() == report["commit_ms"].keys() == {"p50", "p99", "max"}
    assert report["epochs_rolled_back"] >= report["killed_within_an_epoch"]
    assert list(tmp_path.iterdir()) == []
    assert not Path(report["replica"]).exists()
    assert left_behind(tmp_path) == []


def test_interrupted_ends_all(tmp_path: Path) -> None:
    line, environment = command(tmp_path, "--seconds", "60", "--memory", "16MiB")
    demo = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not any("guests.sim.process" in one for one in left_behind(tmp_path)):
            assert time.monotonic() < until and demo.poll() is None
            time.sleep(0.05)
        for _ in range(2):  # people press it twice
            demo.send_signal(signal.SIGINT)
        _, said = demo.communicate(timeout=60)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 130
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
    assert left_behind(tmp_path) == []


def test_a_demo_whose_daemon_cannot_start_shows_why(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)  # a control socket's path has at most 107 bytes
    deep.mkdir()
    line, environment = command(deep, "--seconds", "1", "--memory", "16MiB", "--json")
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["error"] == "ChildFailed"
    assert "107 bytes" in answer["hint"]
    assert left_behind(deep) == []
    places = done.stderr.splitlines()[-1].partition("files and logs are in ")[2].split(" and ")
    assert Path(places[0]).parent == deep
    for place in places:
        shutil.rmtree(place)
