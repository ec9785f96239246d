"""Sessions that go well: both modes, iterations, torn pages, deltas, several regions, handover, verify, versions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ckptd.errors import CorruptFrame, LocalProtocolError, RemoteProtocolError, VersionMismatch
from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import PageHasher
from ckptd.memory.regions import Geometry
from ckptd.protocol import secondary as secondary_module
from ckptd.protocol.messages import Heartbeat, Hello, Nack, decode, encode
from ckptd.protocol.pages import decode_pages
from ckptd.protocol.peer import PeerClosed
from ckptd.protocol.primary import Acknowledged, PrimaryState, PromotedThere, TablePart, VerifiedThere, Welcomed
from ckptd.protocol.secondary import (
    EpochReady,
    HandoverReady,
    HelloReceived,
    SecondaryMachine,
    SecondaryState,
    TableWanted,
    VerifyWanted,
)
from ckptd.protocol.wire import Type

from .world import SEED, TIMING, Frame, MemoryHolding, World, frames, message_frame

GEOMETRY = Geometry.of(low=8, ram=64)


def same_image(world: World) -> bool:
    images = [one.tobytes() for one in world.holding.images]
    return images == [one.tobytes() for one in world.memory] and world.holding.true_digest() == world.table.digest


@pytest.mark.parametrize("step", [1 << 30, 1000, 37])
@pytest.mark.parametrize("holding", ["partial", "committed"])
def test_epochs_in_both_modes(holding: str, step: int) -> None:
    world = World(GEOMETRY, holding=MemoryHolding(GEOMETRY, holding=holding))
    for number in range(1, 5):
        world.write(0, [number], number)
        world.write(1, range(number, 60, 3), number)
        world.write(1, [number + 7], 0)
        ready = world.epoch([(0, [number]), (1, sorted({*range(number, 60, 3), number + 7}))], step)
        assert (ready.epoch, ready.direct) == (number, holding == "partial" and number == 1)
        assert same_image(world) and world.holding.chain == world.primary.chain


@pytest.mark.parametrize("holding", ["partial", "committed"])
def test_precopy_iterations_tears_and_pages_that_become_zero(holding: str) -> None:
    world = World(GEOMETRY, holding=MemoryHolding(GEOMETRY, holding=holding))
    world.write(1, range(40), 1)
    world.to_secondary(world.pages(1, range(40), 1, torn=[3, 8, 12]))
    world.to_secondary(world.primary.end_iteration(1))
    world.write(1, [3], 5)
    world.write(1, [4], 0)
    world.to_secondary(world.pages(1, [3, 4, 8], 2, torn=[3]))
    world.to_secondary(world.primary.end_iteration(2))
    world.write(1, [5], 0)
    ready = world.epoch([(0, [1]), (1, [3, 5, 12])])
    assert ready.pages == 40 + 3 + 4 and same_image(world)


def test_a_page_torn_into_zeros_is_staged_and_comes_again() -> None:
    world = World(GEOMETRY, holding=MemoryHolding(GEOMETRY, holding="committed"))
    world.write(1, [1, 2, 3], 5)
    (frame,) = frames(world.pages(1, [1, 2, 3], 1))
    world.to_secondary(frame.pack(payload=frame.payload[:4096] + bytes(4096) + frame.payload[8192:]))
    world.to_secondary(world.primary.end_iteration(1))
    world.epoch([(1, [2])])
    assert same_image(world)


def test_a_staged_image_is_not_touched_before_its_commit() -> None:
    world = World(GEOMETRY)
    world.epoch([(1, [])][:0])
    before = world.holding.state()
    world.write(1, range(9), 3)
    world.to_secondary(world.pages(1, range(5), 1) + b"".join(world.primary.end_iteration(1)))
    world.to_secondary(world.pages(1, range(5, 9)))
    state, output, commit = world.close_epoch()
    world.to_secondary(state + output)
    assert world.holding.state() == before
    world.to_secondary(commit)
    assert world.settle().epoch == 2 and same_image(world)


@pytest.mark.parametrize("mixed", [False, True])
def test_delta_pages(mixed: bool) -> None:
    world = World(GEOMETRY)
    world.memory[1][:] = np.random.default_rng(3).integers(0, 256, world.memory[1].shape, dtype=np.uint8)
    world.epoch([(1, range(64))])
    world.memory[1][[3, 5, 9], 100] ^= 1
    gfns = [3, 5, 9]
    if mixed:  # deltas, a new page, a page of zeros
        world.memory[1][6] ^= 0x5A
        world.memory[1][7] = 0
        world.cache.remember(1, np.array([6]), world.memory[1][6:7], world.hasher.hash_rows(world.memory[1][6:7]))
        gfns = [3, 5, 6, 7, 9]
    data = world.deltas(1, gfns)
    assert len(data) < 4096 * (2 if mixed else 1)
    world.to_secondary(data + b"".join(world.close_epoch()))
    world.settle()
    assert same_image(world)
    for frame in frames(world.holding.segments[-1]):  # what is kept needs no other copy to be read
        if frame.header.type is Type.PAGES:
            assert len(frame.payload) == 4096 * (4 if mixed else 3)


def test_final_epoch_handover_and_promotion() -> None:
    world = World(GEOMETRY)
    world.write(1, range(9), 3)
    world.to_secondary(world.pages(1, range(9)))
    for part in world.close_epoch(final=True):
        world.to_secondary(part)
    with pytest.raises(LocalProtocolError):
        world.primary.handover()  # not before the acknowledgement
    assert world.settle().final
    assert world.secondary.state is SecondaryState.FINAL
    world.to_secondary(world.primary.handover())
    assert world.there.events() == [HandoverReady(1)]
    world.here.deliver(world.secondary.promoted(2))
    assert world.here.events() == [PromotedThere(1, 2, world.table.digest)]
    assert world.primary.state is PrimaryState.CLOSED and world.secondary.state is SecondaryState.CLOSED


def test_verify_between_epochs() -> None:
    world = World(GEOMETRY)
    world.write(1, range(9), 3)
    world.epoch([(1, range(9))])
    world.to_secondary(world.primary.verify())
    assert world.there.events() == [VerifyWanted()]
    world.here.deliver(world.secondary.verified(world.holding.true_digest()))
    assert world.here.events() == [VerifiedThere(1, world.table.digest)]
    world.epoch()


def test_several_epochs_in_flight() -> None:
    world = World(GEOMETRY)
    for number in range(1, 4):
        world.write(1, [number], number)
        world.to_secondary(world.pages(1, [number]) + b"".join(world.close_epoch()))
    assert world.primary.unacknowledged == 3
    for number in range(1, 4):
        (ready,) = world.there.events()  # one at a time: the next is not read before this one is settled
        assert isinstance(ready, EpochReady) and ready.epoch == number
        world.holding.commit(ready)
        world.here.deliver(world.secondary.acknowledge("memory"))
    assert world.here.events() == [Acknowledged(number, "memory") for number in range(1, 4)]
    assert world.primary.unacknowledged == 0 and same_image(world)


def test_the_table_is_stated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(GEOMETRY)
    world.write(1, range(50), 9)
    world.epoch([(1, range(50))])
    monkeypatch.setattr(secondary_module, "TABLE_ROWS", 30)
    world.secondary.abandon()
    world.connect()
    world.greet()
    world.to_secondary(world.primary.request_table())
    assert world.there.events() == [TableWanted()]
    stated = HashTable(GEOMETRY, PageHasher(SEED))
    for frame in world.secondary.table_frames():
        world.here.deliver(frame)
    parts = [part for part in world.here.events() if isinstance(part, TablePart)]
    assert [(part.region, part.first, len(part.hashes), part.last) for part in parts] == [
        (0, 0, 8, False), (1, 0, 30, False), (1, 30, 30, False), (1, 60, 4, True),
    ]  # fmt: skip
    for part in parts:
        stated.update(part.region, np.arange(part.first, part.first + len(part.hashes)), part.hashes)
    assert stated.digest == world.table.digest
    assert world.primary.state is PrimaryState.READY


def test_a_replica_that_starts_again_and_a_primary_that_starts_again() -> None:
    world = World(GEOMETRY)
    world.write(1, range(9), 3)
    world.epoch([(1, range(9))])
    world.table = HashTable(GEOMETRY, world.hasher)  # the primary has forgotten
    world.write(1, [2, 20], 8)
    world.goes_on()
    assert world.holding.epoch == 2 and same_image(world)


def test_replaying_the_kept_segments_gives_the_same_image() -> None:
    world = World(GEOMETRY, holding=MemoryHolding(GEOMETRY, holding="committed"))
    for number in range(1, 6):
        world.write(1, range(number, 40, number), number)
        world.to_secondary(world.pages(1, [2, 3], 1) + b"".join(world.primary.end_iteration(1)))
        world.epoch([(1, range(number, 40, number))])
        if number == 3:  # another connection, a later term: numbers of frames start again
            world.term = 4
            world.reconnect()
    again = MemoryHolding(GEOMETRY, holding="committed")
    machine = SecondaryMachine(TIMING, 0, replaying=True)
    machine.replay(again)
    twin = World(GEOMETRY, holding=again, greet=False)
    twin.secondary = machine
    twin.there.machine = machine
    for segment in world.holding.segments:
        twin.there.deliver(segment)
        (ready,) = twin.there.events()
        assert isinstance(ready, EpochReady)
        again.commit(ready)
        machine.acknowledge("memory")
    assert again.state() == world.holding.state()


# --- versions


def hello_of(world: World, oldest: int, newest: int, version: int = 1) -> bytes:
    (frame,) = frames(world.hello())
    assert frame.header.version == 1  # the oldest that this side speaks
    message = decode(Type.HELLO, frame.meta)
    return frame.pack(meta=encode(dataclasses.replace(message, oldest=oldest, newest=newest)), version=version)


@pytest.mark.parametrize(("oldest", "newest", "agreed"), [(1, 2, 2), (1, 1, 1), (2, 2, 2), (2, 3, 2), (1, 9, 2)])
def test_the_newest_common_version_is_agreed_on(oldest: int, newest: int, agreed: int) -> None:
    world = World(GEOMETRY, greet=False)
    world.to_secondary(hello_of(world, oldest, newest, version=min(oldest, 2)))
    (hello,) = world.there.events()
    assert isinstance(hello, HelloReceived)
    (welcome,) = frames(b"".join(world.secondary.welcome(world.holding)))
    assert welcome.header.version == agreed
    world.here.deliver(welcome.pack())
    (welcomed,) = world.here.events()
    assert isinstance(welcomed, Welcomed) and welcomed.welcome.version == agreed == world.primary.version


@pytest.mark.parametrize(("oldest", "newest"), [(3, 3), (3, 9), (0, 0), (2, 1)])
def test_no_common_version(oldest: int, newest: int) -> None:
    world = World(GEOMETRY, greet=False)
    with pytest.raises(VersionMismatch, match=f"{oldest} to {newest}") as caught:
        world.to_secondary(hello_of(world, oldest, newest))
    world.here.deliver(world.secondary.nack(caught.value))
    (closed,) = world.here.events()
    assert isinstance(closed, PeerClosed) and closed.code == "version"


def version_1() -> World:
    world = World(GEOMETRY, greet=False)
    world.to_secondary(hello_of(world, 1, 1))
    world.there.events()
    world.here.deliver(world.secondary.welcome(world.holding))
    world.here.events()
    world.primary.begin(world.hasher.zero)
    return world


def test_what_is_said_before_the_welcome_can_be_read_by_the_older_version() -> None:
    world = World(GEOMETRY, greet=False)
    with pytest.raises(RemoteProtocolError) as caught:
        world.to_secondary(message_frame(Heartbeat()))
    (nack,) = frames(b"".join(world.secondary.nack(caught.value)))
    assert nack.header.version == 1


def test_a_session_of_version_1() -> None:
    world = version_1()
    world.write(1, range(9), 3)
    world.epoch([(1, range(9))])
    world.write(1, range(9), 4)
    world.epoch([(1, range(9))])
    assert same_image(world)
    assert {frame.header.version for data in world.sent for frame in frames(data)} == {1}


def test_version_1_sends_and_takes_no_deltas() -> None:
    world = version_1()
    world.write(1, range(9), 3)
    world.epoch([(1, range(9))])
    world.write(1, [4], 5)
    with pytest.raises(LocalProtocolError, match="version 1"):
        world.deltas(1, [4])
    world.primary.version = 2  # a primary that does not care
    world.write(1, [4], 6)
    (frame,) = frames(world.deltas(1, [4]))
    decode_pages(frame.header, frame.meta, GEOMETRY, world.hasher)
    with pytest.raises(CorruptFrame, match="version 1"):
        world.to_secondary(frame.pack(version=1))


def test_a_heartbeat_sent_before_the_welcome_may_have_the_older_version() -> None:
    world = World(GEOMETRY, greet=False)
    world.to_secondary(world.hello())
    (beat,) = frames(b"".join(world.primary.tick(600_000_000)))
    assert beat.header.version == 1
    world.to_secondary(beat.pack())
    world.there.events()
    world.here.deliver(world.secondary.welcome(world.holding))
    world.here.events()
    world.primary.begin(world.hasher.zero)
    world.epoch()


def test_refusing_a_primary() -> None:
    world = World(GEOMETRY, greet=False)
    world.to_secondary(world.hello())
    (hello,) = world.there.events()
    assert isinstance(hello, HelloReceived) and isinstance(hello.hello, Hello)
    assert hello.hello.regions == [["low", 8], ["ram", 64]] and hello.term == 1
    data = b"".join(world.secondary.refuse("stale_term", "term 1 is over", epoch=7, term=3))
    (nack,) = frames(data)
    assert decode(Type.NACK, nack.meta) == Nack("stale_term", "term 1 is over", 7, 3)
    world.here.deliver(data)
    assert world.here.events() == [PeerClosed("stale_term", "term 1 is over", 7, 3)]
    assert world.secondary.state is SecondaryState.CLOSED


def test_frames_after_the_end_are_not_read() -> None:
    world = World(GEOMETRY)
    world.to_secondary(world.primary.bye("x"))
    assert len(world.there.events()) == 1
    world.to_secondary(message_frame(Heartbeat(), sequence=99)[:20])
    assert world.there.events() == []
    world.secondary.end_of_stream()  # nobody waits for the rest


def test_frames_know_their_pieces() -> None:
    (frame,) = frames(message_frame(Heartbeat(), sequence=3))
    assert isinstance(frame, Frame) and frame.header.sequence == 3
