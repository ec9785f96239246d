"""What the sending machine notices in what comes back, and what it does not let its daemon do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckptd.errors import CkptdError, CorruptFrame, DigestMismatch, LocalProtocolError, RemoteProtocolError
from ckptd.memory.regions import Geometry
from ckptd.protocol.messages import Ack, Heartbeat, Message, Promoted, Table, Verified, Verify, Welcome
from ckptd.protocol.primary import PrimaryMachine, PrimaryState
from ckptd.protocol.wire import Type

from .world import TIMING, Frame, Side, World, frames, message_frame

GEOMETRY = Geometry.of(low=8, ram=64)
D = bytes(16)


def in_flight() -> World:
    """One epoch acknowledged, numbers 2 and 3 in flight."""
    world = World(GEOMETRY)
    world.write(1, range(9), 3)
    world.epoch([(1, range(9))])
    for value in (4, 5):
        world.write(1, [value], value)
        world.pages(1, [value])
        world.close_epoch()
    return world


def refused(world: World, data: bytes, error: type[CkptdError], code: str, **where: object) -> None:
    with pytest.raises(error) as caught:
        world.here.deliver(data)
    assert type(caught.value) is error
    assert {**caught.value.where, **where} == caught.value.where
    (nack,) = frames(b"".join(world.primary.nack(caught.value)))
    assert code.encode() in nack.meta
    world.goes_on()


@pytest.mark.parametrize(
    ("message", "fields", "error", "code", "where"),
    [
        (Ack("memory", D), {"epoch": 3}, RemoteProtocolError, "protocol", {"epoch": 3}),
        (Ack("memory", D), {"epoch": 1}, RemoteProtocolError, "protocol", {"epoch": 1}),
        (Ack("memory", D), {"epoch": 2}, DigestMismatch, "digest", {"epoch": 2}),
        (Ack("memory", D), {"epoch": 2, "term": 2}, RemoteProtocolError, "protocol", {"frame": "ACK"}),
        (Ack("memory", D), {"epoch": 2, "version": 1}, CorruptFrame, "corrupt", {"field": "version"}),
        (Ack("memory", D), {"epoch": 2, "sequence": 7}, CorruptFrame, "corrupt", {"field": "sequence"}),
        (Heartbeat(), {"meta": b"\x81\xa1a\x01"}, CorruptFrame, "corrupt", {"frame": "HEARTBEAT"}),
        (Heartbeat(), {"term": 0}, RemoteProtocolError, "protocol", {"frame": "HEARTBEAT"}),
        (Verified(D), {"epoch": 1}, RemoteProtocolError, "protocol", {"epoch": 1}),
        (Promoted(D), {"epoch": 1, "term": 2}, RemoteProtocolError, "protocol", {"frame": "PROMOTED"}),
        (Table(0, 0, False), {"payload": bytes(16)}, RemoteProtocolError, "protocol", {"frame": "TABLE"}),
        (Welcome(2, "x", "empty", 0, 0, D, D), {}, RemoteProtocolError, "protocol", {"frame": "WELCOME"}),
        (Verify(), {"epoch": 1}, RemoteProtocolError, "protocol", {"frame": "VERIFY"}),
    ],
)  # fmt: skip
def test_what_must_not_come(
    message: Message, fields: dict[str, object], error: type[CkptdError], code: str, where: dict[str, object]
) -> None:
    refused(in_flight(), message_frame(message, **{"sequence": 2, **fields}), error, code, **where)


def test_an_acknowledgement_without_an_epoch_in_flight() -> None:
    world = World(GEOMETRY)
    refused(world, message_frame(Ack("memory", D), epoch=1, sequence=1), RemoteProtocolError, "protocol", epoch=1)


def test_an_acknowledgement_of_less_than_was_asked() -> None:
    world = World(GEOMETRY)
    world.primary.save_state(b"")
    world.primary.output(b"", 0, 0)
    world.primary.commit(world.table.digest, "durable")
    less = message_frame(Ack("memory", world.table.digest), epoch=1, sequence=1)
    refused(world, less, RemoteProtocolError, "protocol", epoch=1)


def asked() -> tuple[PrimaryMachine, Side]:
    """A primary that waits for the table."""
    world = World(GEOMETRY)
    world.primary.request_table()
    return world.primary, world.here


def table(region: int, first: int, rows: int, last: bool, sequence: int = 1) -> bytes:
    return message_frame(Table(region, first, last), bytes(16 * rows), sequence=sequence)


@pytest.mark.parametrize(
    "parts",
    [
        [(1, 0, 64, True)],
        [(0, 1, 7, False)],
        [(0, 0, 9, False)],
        [(0, 0, 0, False)],
        [(0, 0, 8, True)],
        [(0, 0, 4, False), (0, 0, 4, False)],
        [(0, 0, 4, False), (0, 5, 3, False)],
        [(0, 0, 4, False), (1, 0, 64, True)],
        [(0, 0, 8, False), (1, 0, 64, False)],
        [(0, 0, 8, False), (1, 0, 65, True)],
        [(0, 0, 8, False), (2, 0, 1, True)],
    ],
)
def test_misplaced_parts_of_the_table(parts: list[tuple[int, int, int, bool]]) -> None:
    _, here = asked()
    with pytest.raises(CorruptFrame) as caught:
        for number, (region, first, rows, last) in enumerate(parts):
            here.deliver(table(region, first, rows, last, number + 1))
    assert "region" in caught.value.where and "gfn" in caught.value.where


def test_half_a_hash_is_corrupt() -> None:
    _, here = asked()
    with pytest.raises(CorruptFrame):
        here.deliver(message_frame(Table(0, 0, False), bytes(15), sequence=1))


@pytest.mark.parametrize("kind", [Type.PAGES, Type.STATE, Type.OUTPUT])
def test_only_a_table_may_bring_a_payload(kind: Type) -> None:
    _, here = asked()
    (frame,) = frames(message_frame(Heartbeat(), sequence=1))
    head = Frame(frame.header, b"", b"").pack(type=kind, payload_length=16 << 20)
    with pytest.raises(RemoteProtocolError) as caught:  # at its header, before anything is allocated
        here.deliver(head)
    assert caught.value.where["frame"] == kind.name


@pytest.mark.parametrize(("term", "epoch"), [(1, 1), (0, 1), (2, 0), (2, 2)])
def test_a_promotion_that_cannot_be(term: int, epoch: int) -> None:
    world = World(GEOMETRY)
    for part in world.close_epoch(final=True):
        world.to_secondary(part)
    world.settle()
    world.primary.handover()
    with pytest.raises(RemoteProtocolError):
        world.here.deliver(message_frame(Promoted(D), term=term, epoch=epoch, sequence=2))


def test_a_welcome_of_no_known_version() -> None:
    world = World(GEOMETRY, greet=False)
    world.hello()
    with pytest.raises(RemoteProtocolError) as caught:
        world.here.deliver(message_frame(Welcome(3, "x", "empty", 0, 0, D, D)))
    assert caught.value.code == "version"


# --- what the daemon must not do

Act = Callable[[PrimaryMachine], object]
ACTS: dict[str, Act] = {
    "hello": lambda p: p.hello("vm", "sim", D, 0, 1, "memory", False),
    "request_table": lambda p: p.request_table(),
    "end_iteration": lambda p: p.end_iteration(1),
    "save_state": lambda p: p.save_state(b""),
    "output": lambda p: p.output(b"", 0, 0),
    "commit": lambda p: p.commit(D, "memory"),
    "commit final": lambda p: p.commit(D, "memory", final=True),
    "verify": lambda p: p.verify(),
    "handover": lambda p: p.handover(),
}
STATES: dict[PrimaryState, list[str]] = {
    PrimaryState.START: ["hello"],
    PrimaryState.GREETED: [],
    PrimaryState.READY: ["request_table", "save_state", "verify"],
    PrimaryState.STATED: ["output"],
    PrimaryState.SEALED: ["commit", "commit final"],
    PrimaryState.CLOSED: [],
}


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
@pytest.mark.parametrize("name", ACTS)
def test_a_method_out_of_turn_sends_nothing(state: PrimaryState, name: str) -> None:
    machine = PrimaryMachine(GEOMETRY, TIMING, 0)
    machine.state, machine.chain = state, D
    if name in STATES[state]:
        assert ACTS[name](machine)
    else:
        with pytest.raises(LocalProtocolError) as caught:
            ACTS[name](machine)
        assert caught.value.where == {"state": state.name}
        assert machine.state is state and machine.epoch == 0


def test_a_message_that_the_peer_would_refuse_is_not_sent() -> None:
    machine = PrimaryMachine(GEOMETRY, TIMING, 0)
    with pytest.raises(LocalProtocolError) as caught:
        machine.hello("x" * 65, "sim", D, 0, 1, "memory", False)
    assert caught.value.where["field"] == "guest"
