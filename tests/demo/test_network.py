"""The networks of the qemu demo: what QEMU is told of them, and what happens where taps cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.demo import network
from ckptd.demo.network import Bridge, User, enter
from ckptd.errors import CkptdError


def in_thread(work: Callable[[], None]) -> None:
    """In a thread of its own, whose namespace ends with it."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def namespace() -> str:
    return os.readlink("/proc/thread-self/ns/net")


# --- what QEMU is told


def test_each_card_has_a_tap_on_either_side_a_mac_and_an_address() -> None:
    bridge = Bridge(2)
    assert bridge.netdevs() == [
        "-netdev", "tap,id=n0,ifname=tap-a0,script=no,downscript=no,vhost=off",
        "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56",
        "-netdev", "tap,id=n1,ifname=tap-a1,script=no,downscript=no,vhost=off",
        "-device", "virtio-net-pci,netdev=n1,mac=52:54:00:12:34:57",
    ]  # fmt: skip
    assert bridge.replace() == {"tap-a0": "tap-b0", "tap-a1": "tap-b1"}
    assert bridge.address(7, there=False) == bridge.address(7, there=True) == ("10.0.2.15", 7)
    assert bridge.address(8, there=True, card=1) == ("10.0.3.15", 8)
    assert bridge.same_connection


def test_user_networking_has_a_port_of_this_host_for_each_of_the_guests_and_another_one_there() -> None:
    user = User([7, 8])
    (here, there), (here8, there8) = user.forwards[7], user.forwards[8]
    assert len({here, there, here8, there8}) == 4
    assert user.netdevs()[1] == f"user,id=n0,hostfwd=tcp:127.0.0.1:{here}-:7,hostfwd=tcp:127.0.0.1:{here8}-:8"
    assert user.netdevs()[3] == Bridge(1).netdevs()[3]
    moved = {here: there, here8: there8}
    assert user.replace() == {f"127.0.0.1:{ours}-": f"127.0.0.1:{theirs}-" for ours, theirs in moved.items()}
    assert user.address(7, there=False) == ("127.0.0.1", here)
    assert user.address(7, there=True) == ("127.0.0.1", there)
    assert not user.same_connection


# --- what can be had


def test_without_root_it_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    before = namespace()
    found, why = enter([7])
    assert isinstance(found, User) and list(found.forwards) == [7]
    assert why == "tap devices need root"
    assert namespace() == before
    with pytest.raises(CkptdError, match="tap devices need root") as raised:
        enter([7], wanted="tap")
    assert raised.value.hint == "use --network user"


def test_without_ip_or_tun_it_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda _: None)
        assert "apt-get install iproute2" in enter([7])[1]
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os.path, "exists", lambda _: False)
    assert enter([7])[1] == "there is no /dev/net/tun here"


def test_user_networking_that_was_asked_for_needs_no_reason() -> None:
    before = namespace()
    found, why = enter([7, 9], wanted="user")
    assert isinstance(found, User) and why == ""
    assert namespace() == before


@pytest.fixture
def taps() -> None:
    """Skips, saying so, where there can be none."""

    def look() -> None:
        try:
            enter([7], wanted="tap")
        except CkptdError as error:
            pytest.skip(str(error))

    in_thread(look)


@pytest.mark.usefixtures("taps")
def test_a_namespace_is_the_threads_own_and_has_a_bridge_for_each_card() -> None:
    before = namespace()

    def work() -> None:
        found, why = enter([7], 2)
        assert isinstance(found, Bridge) and (found.cards, why) == (2, "")
        assert namespace() != before
        shown = subprocess.run(["ip", "-br", "addr"], capture_output=True, text=True, check=True).stdout
        lines = {line.split()[0]: line for line in shown.splitlines()}
        assert lines.keys() == {"lo", "br0", "br1", "tap-a0", "tap-b0", "tap-a1", "tap-b1"}
        assert "10.0.2.2/24" in lines["br0"] and "10.0.3.2/24" in lines["br1"]
        for side in "ab":
            assert master_of(f"tap-{side}1") == "br1"

    in_thread(work)
    assert namespace() == before


def master_of(tap: str) -> str:
    """The bridge that it is on."""
    shown = subprocess.run(["ip", "-o", "link", "show", tap], capture_output=True, text=True, check=True).stdout
    words = shown.split()
    return words[words.index("master") + 1]


@pytest.mark.usefixtures("taps")
@pytest.mark.parametrize("failing", ["br0 type bridge", "tap-b0 mode tap"])
def test_a_kernel_without_bridges_or_taps_leaves_this_thread_where_it_was(
    failing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, before = shutil.which("ip"), namespace()
    pretender = tmp_path / "ip"
    fails = f'case "$*" in *"{failing}"*) echo no such thing >&2; exit 2;; esac'
    pretender.write_text(f'#!/bin/sh\n{fails}\nexec {real} "$@"\n')
    pretender.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def work() -> None:
        found, why = enter([7])
        assert isinstance(found, User)
        assert failing in why and why.endswith("failed: no such thing")
        assert namespace() == before
        with pytest.raises(CkptdError, match=r"there can be no tap devices: .*no such thing"):
            enter([7], wanted="tap")
        assert namespace() == before

    in_thread(work)


def test_a_namespace_that_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def unshare(self, _: int) -> int:
            return -1

        def setns(self, *_: int) -> int:
            return 0

    monkeypatch.setattr(network, "_why_not", lambda: "")
    monkeypatch.setattr(network, "_libc", Refusing())
    found, why = enter([7])
    assert isinstance(found, User) and why.startswith("a network namespace cannot be made: ")
