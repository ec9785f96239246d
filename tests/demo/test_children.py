"""Processes are ended by what they are, not by what a pid file says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.demo.children import Child, ChildFailed, guest_pid, kill_guest
from ckptd.guests.process.link import GuestLink


def test_a_pid_file_that_names_a_stranger_kills_nobody(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "guest.pid").write_text(f"{stranger.pid}\n")
        assert guest_pid(tmp_path) == 0
        assert kill_guest(tmp_path) is False
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_the_guest_of_this_directory_is_found_and_killed_once(tmp_path: Path) -> None:
    assert kill_guest(tmp_path) is False
    link = asyncio.run(GuestLink.open(tmp_path, "ckptd.guests.sim.process"))
    try:
        assert guest_pid(tmp_path) == link.pid
        assert kill_guest(tmp_path) is True
        assert not link.alive()
        assert kill_guest(tmp_path) is False
    finally:
        asyncio.run(link.end())


def test_a_daemon_that_ends_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[guest]\nname = 1\n")
    child = Child("primary", tmp_path / "bad.toml", tmp_path / "sock", tmp_path / "log")
    child.start()
    try:
        with pytest.raises(ChildFailed, match="the primary ended with code 3") as raised:
            child.wait_ready()
        assert "guest.name" in (raised.value.hint or "")
    finally:
        child.end()
