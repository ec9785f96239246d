"""The gate's place in QEMU: a filter-redirector on each network device, put in and taken out while the guest lives.

The sockets are made here and given to QEMU as descriptors: it opens no path of ours. `queue: rx` is what the device's
backend receives from the guest: what the guest says to the world (docs/COLO-FT.txt and net/filter-mirror.c of QEMU).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress

from ckptd.guests.qemu.qmp import Monitor, QmpError

__all__ = ["insert", "is_ours", "remove"]

_FILTER, _OUT, _BACK = "ckptd-gate-", "ckptd-out-", "ckptd-back-"
_BUFFER = 4 << 20  # bytes of a socket: what QEMU can write without waiting for the holder


def insert(monitor: Monitor, netdevs: Sequence[str]) -> list[tuple[str, socket.socket, socket.socket]]:
    """A filter for each: its name, the socket its packets come out of, and the one they go back into."""
    made = []
    for number, netdev in enumerate(netdevs):
        out, back = _chardev(monitor, f"{_OUT}{number}"), _chardev(monitor, f"{_BACK}{number}")
        monitor.execute("object-add", {
            "qom-type": "filter-redirector", "id": f"{_FILTER}{number}", "netdev": netdev, "queue": "rx",
            "outdev": f"{_OUT}{number}", "indev": f"{_BACK}{number}",
        })  # fmt: skip
        made.append((netdev, out, back))
    return made


def is_ours(chardev: str) -> bool:
    return chardev.startswith((_OUT, _BACK))


def remove(monitor: Monitor) -> int:
    """Every filter of ours, whoever put it in; how many there were. While the guest is stopped: or packets pass by."""
    objects = [one["name"] for one in monitor.execute("qom-list", {"path": "/objects"})]
    ours = [name for name in objects if name.startswith(_FILTER)]
    for name in ours:
        monitor.execute("object-del", {"id": name})
    for one in monitor.execute("query-chardev"):
        if is_ours(one["label"]):
            with suppress(QmpError):  # busy, if somebody else uses it: it does no harm
                monitor.execute("chardev-remove", {"id": one["label"]})
    return len(ours)


def _chardev(monitor: Monitor, name: str) -> socket.socket:
    """A character device of QEMU that is our socket's other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        monitor.execute("getfd", {"fdname": name}, [theirs.fileno()])
        monitor.execute("chardev-add", {"id": name, "backend": {"type": "socket", "data": {
            "addr": {"type": "fd", "data": {"str": name}}, "server": False,
        }}})  # fmt: skip
    return ours
