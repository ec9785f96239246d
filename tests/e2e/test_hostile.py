"""Whoever else comes to the secondary's port: nothing of it disturbs the link that protects a guest."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from crc32c import crc32c

from ckptd.errors import CkptdError
from ckptd.memory.regions import Geometry
from ckptd.protocol.peer import PeerClosed, Timing
from ckptd.protocol.primary import PrimaryMachine, Welcomed
from ckptd.protocol.wire import Type
from tests.e2e.pair import GUEST, Pair, wait_for

Make = Callable[..., Pair]
_FIELDS = struct.Struct("<4sBBHQQQIII")


def header(kind: Type, *, meta: int, payload: int) -> bytes:
    """A header that is right but for what it promises."""
    head = _FIELDS.pack(b"CKPD", 1, kind, 0, 1, 0, 0, meta, payload, 0)
    return head + struct.pack("<I", crc32c(head))


def ended(sock: socket.socket) -> bool:
    """The other side has closed it."""
    sock.settimeout(30)
    with suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass
    return True


def greet(
    port: int, geometry: Geometry, *, guest: str = GUEST, kind: str = "sim", run: bytes = bytes(16), term: int = 1,
    replace: bool = False,
) -> PeerClosed | Welcomed:  # fmt: skip
    """Say HELLO as a primary would; the answer."""
    machine = PrimaryMachine(geometry, Timing(10**9, 10**10), 0)
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        sock.sendall(b"".join(machine.hello(guest, kind, run, 1, term, "memory", replace)))
        while True:
            area = machine.buffer()
            count = sock.recv_into(area)
            assert count, "closed without a word"
            machine.received(count, 0)
            event = machine.next_event()
            if isinstance(event, PeerClosed | Welcomed):
                return event


@pytest.fixture
def pair(make_pair: Make) -> Iterator[Pair]:
    pair = make_pair(secondary_link={"handshake_timeout": "1s", "max_connections": 8}).start()
    before = pair.primary.ask()
    yield pair
    after = pair.protected()
    assert (after["connections"], after["epochs_rolled_back"]) == (before["connections"], 0)
    pair.verify()


def test_strangers_do_not_disturb_the_protected_link(pair: Pair) -> None:
    chance, before = random.Random(3), pair.secondary.rss()
    address = ("127.0.0.1", pair.port)
    for _ in range(20):  # a port scanner
        socket.create_connection(address, 30).close()
    for size in (1, 47, 48, 4096, 1 << 20):  # garbage
        with socket.create_connection(address, 30) as sock:
            with suppress(OSError):  # it may be closed at once: link.max_connections, or too much garbage
                sock.sendall(chance.randbytes(size))
                sock.shutdown(socket.SHUT_WR)
            assert ended(sock)
    promises = [(Type.HELLO, 0xFFFF_FFFF, 0), (Type.HELLO, 1 << 16, 0xFFFF_FFFF), (Type.PAGES, 64, 0xFFFF_FFFF),
                (Type.STATE, 16, 1 << 30), (Type.HEARTBEAT, 0, 0)]  # fmt: skip
    for kind, meta, payload in promises:
        with socket.create_connection(address, 30) as sock:
            with suppress(ConnectionError):
                sock.sendall(header(kind, meta=meta, payload=payload) + bytes(4096))
            assert ended(sock)
    with socket.create_connection(address, 30) as sock:  # a slow loris
        head = header(Type.HELLO, meta=200, payload=0)
        with suppress(ConnectionError):
            for byte in head:
                sock.sendall(bytes([byte]))
                time.sleep(0.05)
        assert ended(sock)
    assert "no HELLO within link.handshake_timeout" in pair.secondary.log()
    assert pair.secondary.rss() - before < 64 << 20


def test_no_more_connections_than_configured(pair: Pair) -> None:
    with ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", pair.port), 30)) for _ in range(20)
        ]
        wait_for(lambda: "max_connections are open" in pair.secondary.log())
        assert pair.secondary.ask()["connections"] <= 8
        assert all(ended(sock) for sock in socks)
    wait_for(lambda: pair.secondary.ask()["connections"] == 1, "only the primary is left")


def test_wrong_greetings_are_refused_and_name_both(pair: Pair) -> None:
    geometry = pair.params().geometry

    def refusal(**said: Any) -> PeerClosed:
        answer = greet(pair.port, said.pop("geometry", geometry), **said)
        assert isinstance(answer, PeerClosed), answer
        return answer

    unknown = refusal(guest="vm2")
    assert unknown.code == "unknown_guest" and "'vm2'" in unknown.text and GUEST in unknown.text
    kind = refusal(kind="qemu")
    assert kind.code == "other_guest" and "'qemu'" in kind.text and "'sim'" in kind.text
    # while a guest is protected its replica is not given up, and its link not cut, not even with --replace
    for replace in (False, True):
        for other in ({"run": b"another guest's."}, {"geometry": Geometry.of(ram=4097)}):
            refused = refusal(replace=replace, **other)
            assert refused.code == "other_run" and "is connected" in refused.text
    assert pair.primary.ask()["connections"] == pair.held()["term"] == 1
    assert pair.primary.terminate() == 0
    wait_for(lambda: pair.held()["condition"] == "waiting")
    other_run = refusal(run=b"another guest's.")
    assert other_run.code == "other_run" and b"another guest's.".hex()[:8] in other_run.text
    size = refusal(geometry=Geometry.of(ram=4097))
    assert size.code == "other_guest" and "4096 pages" in size.text and "4097 pages" in size.text
    assert pair.held()["holding"] == "committed"
    pair.primary.start()
    pair.protected()


def test_another_run_of_the_guest_needs_replace_or_discard(make_pair: Make) -> None:
    first = make_pair().start()
    other = make_pair()
    other.sections["secondary"]["address"] = f"127.0.0.1:{first.port}"
    other.write()
    assert first.primary.terminate() == 0
    wait_for(lambda: first.held()["condition"] == "waiting")
    epoch = first.held()["epoch"]
    other.primary.start()
    reason = wait_for(
        lambda: (now := other.status()) and "another run" in now["reason"] and now["reason"], "refused"
    )  # fmt: skip
    assert "--replace" in reason and f"epoch {epoch}" in reason
    assert first.held()["holding"] == "committed" and first.held()["epoch"] == epoch
    assert other.primary.terminate() == 0
    other.primary.start("--replace")
    other.protected()
    other.verify()
    with pytest.raises(CkptdError, match="connected"):
        first.secondary.wish("discard")
    assert other.primary.terminate() == 0
    wait_for(lambda: first.held()["condition"] == "waiting")
    assert first.secondary.wish("discard")["discarded_epoch"] > 0
    assert first.held()["holding"] == "empty"
    first.primary.start()
    first.protected()
    first.verify()
    first.check_outputs()
