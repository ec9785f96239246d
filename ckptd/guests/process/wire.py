"""Packets between daemon and guest process: one msgpack map in each, descriptors beside it; and where the socket is.

to the process      hello {}                             -> {pid, active} + control page
                    create {params, gate_capacity}        makes the guest; it runs from here on
                    attach {tracker, ring_entries}        -> {params, run, pid, ...} + descriptors
                    pause {}                              -> {state?}, when no vCPU writes any more
                    resume {}                             no reply
                    activate {output} + descriptors       -> {}; runs from the state on
                    end {}                                -> {}, then the process ends
replies             {...} or {error}
attach descriptors  control page, attention (eventfd), gate, what the kind's log needs, one for each region
activate            state, gate, one for each region

A kind may have commands of its own beside these.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from ckptd.errors import GuestError

__all__ = ["MAX_REGIONS", "receive", "send", "socket_address"]

MAX_REGIONS = 240  # the kernel passes at most 253 descriptors at once
_MAX_PACKET = 1 << 16


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """One packet. Raises OSError."""
    packet = msgpack.packb(message)
    if fds:
        socket.send_fds(sock, [packet], list(fds))
    else:
        sock.send(packet)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """One packet and its descriptors; None at the end of the connection. Raises GuestError, OSError."""
    packet, fds, flags, _ = socket.recv_fds(sock, _MAX_PACKET, MAX_REGIONS + 8, socket.MSG_CMSG_CLOEXEC)
    if not packet:
        return None
    try:
        message = msgpack.unpackb(packet, max_map_len=64, max_array_len=4096, max_bin_len=_MAX_PACKET)
    except Exception as error:  # msgpack raises many kinds
        message = error
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not isinstance(message, dict):
        for fd in fds:
            os.close(fd)
        raise GuestError("a packet between daemon and guest process is damaged")
    return message, fds


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """An address for bind or connect, for paths of any length (a unix socket's own limit is 107 bytes)."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
