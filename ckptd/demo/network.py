"""How a guest of the qemu demo talks to the world: by tap devices on a bridge, in a network namespace of its own, or,
without the rights for that, by QEMU's user networking.

A namespace belongs to the thread that enters it and to all that this thread starts; it is gone when the last of them
is. On a bridge the guest keeps its address when it moves, so that its clients' connections go on. With user networking
the connections are QEMU's own, and end with it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckptd.demo.pair import free_port
from ckptd.errors import CkptdError

__all__ = ["Bridge", "Network", "User", "enter"]

_CLONE_NEWNET = 0x40000000
_MAC = "52:54:00:12:34:{:02x}"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Bridge:
    """`cards` network devices, each with a tap on both hosts of this one machine, and a bridge that both are on."""

    cards: int = 1
    same_connection: bool = True
    forwards: dict[int, tuple[int, int]] = field(default_factory=dict)

    def netdevs(self) -> list[str]:
        """QEMU's arguments on the side where it begins."""
        arguments = []
        for card in range(self.cards):
            arguments += [
                "-netdev", f"tap,id=n{card},ifname=tap-a{card},script=no,downscript=no,vhost=off",
                "-device", f"virtio-net-pci,netdev=n{card},mac={_MAC.format(0x56 + card)}",
            ]  # fmt: skip
        return arguments

    def replace(self) -> dict[str, str]:
        """What is otherwise on the side that takes over."""
        return {f"tap-a{card}": f"tap-b{card}" for card in range(self.cards)}

    def address(self, port: int, *, there: bool, card: int = 0) -> tuple[str, int]:
        """Where a port of the guest is found."""
        return f"10.0.{2 + card}.15", port


@dataclass(slots=True)
class User:
    """QEMU's user networking, with ports of this host that lead to the guest's."""

    ports: Sequence[int]
    cards: int = 1
    same_connection: bool = False
    forwards: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forwards = {port: (free_port(), free_port()) for port in self.ports}

    def netdevs(self) -> list[str]:
        leading = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{port}" for port, (here, _) in self.forwards.items())
        return ["-netdev", f"user,id=n0{leading}", "-device", f"virtio-net-pci,netdev=n0,mac={_MAC.format(0x56)}"]

    def replace(self) -> dict[str, str]:
        return {f"127.0.0.1:{here}-": f"127.0.0.1:{there}-" for here, there in self.forwards.values()}

    def address(self, port: int, *, there: bool, card: int = 0) -> tuple[str, int]:
        return "127.0.0.1", self.forwards[port][there]


Network = Bridge | User


def enter(ports: Sequence[int], cards: int = 1, *, wanted: str = "auto") -> tuple[Network, str]:
    """The best network that can be had: this thread enters a namespace for it if it may. And why not, if it may not.

    `wanted`: "auto", "tap" or "user". Raises CkptdError if taps are wanted and cannot be had.
    """
    if wanted == "user":
        return User(ports), ""
    why = _why_not()
    if why and wanted == "tap":
        raise CkptdError(f"there can be no tap devices: {why}", hint="use --network user")
    if why:
        return User(ports), why
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        why = _own_namespace(cards)
        if not why:
            return Bridge(cards), ""
        if _libc.setns(before, _CLONE_NEWNET) < 0:
            raise CkptdError(f"there is no way back to this host's network: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(before)
    if wanted == "tap":
        raise CkptdError(f"there can be no tap devices: {why}", hint="use --network user")
    return User(ports), why


def _own_namespace(cards: int) -> str:
    """This thread enters one with bridges and taps in it. What has failed, if anything has."""
    if _libc.unshare(_CLONE_NEWNET) < 0:
        return f"a network namespace cannot be made: {os.strerror(ctypes.get_errno())}"
    commands = ["link set lo up"]
    for card in range(cards):
        commands += [f"link add br{card} type bridge", f"addr add 10.0.{2 + card}.2/24 dev br{card}"]
        commands += [f"link set br{card} up"]
        for tap in (f"tap-{side}{card}" for side in "ab"):
            commands += [f"tuntap add {tap} mode tap", f"link set {tap} master br{card} up"]
    for command in commands:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"`ip {command}` failed: {done.stderr.strip()}"
    return ""


def _why_not() -> str:
    if os.geteuid():
        return "tap devices need root"
    if shutil.which("ip") is None:
        return "the command ip is missing (apt-get install iproute2)"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun here"
    return ""
