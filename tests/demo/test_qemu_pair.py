"""What the qemu demo takes for a proof, and what it writes for its daemons."""

from __future__ import annotations

import os
import socket
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.config import load_primary, load_secondary
from ckptd.demo.linux import LinuxGuest
from ckptd.demo.network import Bridge, Network, User
from ckptd.demo.qemu_pair import CountingClient, QemuPair, QemuSetting

Make = Callable[..., QemuPair]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def pair(network: Network | None = None, **setting: object) -> QemuPair:
        found = QemuSetting(**setting)  # type: ignore[arg-type]
        return QemuPair(found, LinuxGuest(tmp_path), network or Bridge(), tmp_path, tmp_path / "r")

    return pair


# --- the proof


@pytest.mark.parametrize("network", [Bridge(), User([7])], ids=["tap", "user"])
@pytest.mark.parametrize("numbers", [[], [5], list(range(3, 90))])
def test_consecutive_numbers_are_right(make: Make, network: Network, numbers: list[int]) -> None:
    assert make(network).failures(numbers) == []


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([1, 2, 4, 5], ["1 numbers are missing, from 3 on"]),
        ([1, 2, 2, 3], ["1 numbers came twice"]),
        ([1, 3, 2, 4], ["the counter went back"]),
        ([4, 5, 1, 2], ["the counter went back"]),
        ([5, 6, 1, 2, 3, 4, 5], ["1 numbers came twice", "the counter went back"]),
        ([1, 2, 3, 9, 5], ["the counter went back", "1 numbers are missing, from 4 on"]),
        ([1, 7, 7, 7], ["2 numbers came twice", "5 numbers are missing, from 2 on"]),
    ],
)
def test_what_is_wrong_is_said(make: Make, numbers: list[int], said: list[str]) -> None:
    assert make().failures(numbers) == said


def test_a_connection_that_ends_with_qemu_may_take_one_reply_along(make: Make) -> None:
    pair = make(User([7]))
    assert pair.failures([1, 2, 4, 5]) == []
    assert pair.failures([1, 2, 5, 6]) == ["2 numbers are missing, from 3 on"]
    assert pair.failures([1, 2, 2, 3]) == ["1 numbers came twice"]
    assert pair.failures([1, 2, 1]) == ["1 numbers came twice", "the counter went back"]


# --- the client


def test_a_client_that_loses_its_connection_keeps_what_it_was_told_and_says_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, sock.makefile("rwb", 0) as stream:
                for number in (4, 5, 6):
                    assert stream.readline() == b"next\n"
                    stream.write(b"%d\n" % number)

        server = threading.Thread(target=serve)
        server.start()
        client = CountingClient(listener.getsockname())
        client.start()
        server.join()
        client._thread.join(60)
    assert [number for number, _ in client.numbers] == [4, 5, 6]
    assert "connection" in client.error.lower()


def test_nobody_there_is_said() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        client = CountingClient(bound.getsockname())
        client.start()
        client.stop()
    assert "refused" in client.error and client.numbers == []


# --- the daemons' files


def test_both_files_are_valid_and_say_what_was_set(make: Make, tmp_path: Path) -> None:
    pair = make(Bridge(2), interval_ms=40, gate_kib=16)
    pair._write_files()
    primary = load_primary(tmp_path / "primary.toml", {}).config
    assert (primary.guest.kind, primary.guest.qmp) == ("qemu", pair.monitor)
    assert primary.guest.gate_capacity == 16 << 10
    assert primary.checkpoint.interval == 40_000_000
    secondary = load_secondary(tmp_path / "secondary.toml", {}).config
    (guest,) = secondary.guest
    assert guest.kind == "qemu" and guest.standby.replace == {"tap-a0": "tap-b0", "tap-a1": "tap-b1"}
    assert guest.standby.binary is None


def test_a_standby_is_started_with_the_same_script(make: Make, tmp_path: Path) -> None:
    pair = make(binary="/opt/other/qemu")
    pair._write_files()
    written = tomllib.loads((tmp_path / "secondary.toml").read_text())
    assert written["guest"][0]["standby"]["binary"] == "/opt/other/qemu"


def test_a_pair_that_never_began_can_be_closed(make: Make, tmp_path: Path) -> None:
    pair = make()
    pair.close()
    assert pair.qemu_pid == 0 and os.listdir(tmp_path) == []
