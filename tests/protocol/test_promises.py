"""What the receiving machine promises to notice: each with the error it raises, where it was, and what stays untouched.

After each of them image, table, epoch and chain are what they were, and a fresh connection brings the replica up to
date.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

import lz4.block
import numpy as np
import pytest

from ckptd.errors import (
    CkptdError,
    CorruptFrame,
    DigestMismatch,
    EpochGap,
    NoSpace,
    RemoteProtocolError,
    TransportError,
    VersionMismatch,
)
from ckptd.memory.regions import Geometry
from ckptd.protocol.messages import Commit, Handover, Iteration, Message, Nack, Output, State, Verify, decode, encode
from ckptd.protocol.peer import PeerClosed
from ckptd.protocol.wire import Header, Type

from .world import Frame, Side, World, frames, message_frame

GEOMETRY = Geometry.of(low=8, ram=32)


def staged() -> World:
    """A world with one committed epoch, and writes that the next one has to carry."""
    world = World(GEOMETRY)
    world.write(1, range(20), 1)
    world.epoch([(1, range(20))])
    world.write(0, [2], 3)
    world.write(1, [4, 5, 9, 10], 4)
    world.write(1, [6], 0)
    return world


def whole(world: World) -> list[Frame]:
    """The frames of the next epoch, not sent: two of PAGES, STATE, OUTPUT, COMMIT."""
    parts = [world.pages(0, [2]), world.pages(1, [4, 5, 6, 9, 10]), *world.close_epoch()]
    return list(frames(b"".join(parts)))


def refused(world: World, data: bytes, error: type[CkptdError], code: str, **where: object) -> CkptdError:
    """Sending this is refused, by name, and leaves no trace."""
    before = world.holding.state()
    with pytest.raises(error) as caught:
        world.to_secondary(data)
    assert type(caught.value) is error
    assert {**caught.value.where, **where} == caught.value.where
    assert world.holding.state() == before  # at once
    leaves_no_trace(world, caught.value, code, before)
    return caught.value


def leaves_no_trace(world: World, error: CkptdError, code: str, before: tuple[object, ...]) -> None:
    for frame in frames(b"".join(world.secondary.nack(error))):
        nack = decode(frame.header.type, frame.meta)
        assert isinstance(nack, Nack) and nack.code == code and nack.text
        if isinstance(epoch := error.where.get("epoch"), int):
            assert nack.epoch == epoch
    world.secondary.abandon()
    assert world.holding.state() == before
    assert not world.holding.staged
    world.goes_on()


def joined(parts: list[Frame]) -> bytes:
    return b"".join(frame.pack() for frame in parts)


# --- one frame of the epoch is changed; every checksum is right again unless that is the point

Change = Callable[[Frame], bytes]


def flipped(at: int) -> Change:
    def change(frame: Frame) -> bytes:
        data = bytearray(frame.pack())
        data[at] ^= 1
        return bytes(data)

    return change


def meta_at(at: int, form: str, value: int) -> Change:
    size = struct.calcsize(form)
    return lambda frame: frame.pack(meta=frame.meta[:at] + struct.pack(form, value) + frame.meta[at + size :])


def fields(**changes: object) -> Change:
    def change(frame: Frame) -> bytes:
        message = dataclasses.replace(decode(frame.header.type, frame.meta), **changes)
        return frame.pack(meta=encode(message))

    return change


def payload_flipped(at: int) -> Change:
    def change(frame: Frame) -> bytes:
        payload = bytearray(frame.payload)
        payload[at] ^= 1
        return frame.pack(payload=bytes(payload))

    return change


P1, STATE, OUTPUT, COMMIT = range(1, 5)


@pytest.mark.parametrize(
    ("number", "change", "error", "code", "where"),
    [
        (P1, flipped(0), CorruptFrame, "corrupt", {"field": "magic"}),
        (P1, flipped(20), CorruptFrame, "corrupt", {"field": "header_crc"}),
        (P1, flipped(47), CorruptFrame, "corrupt", {"field": "header_crc"}),
        (P1, flipped(60), CorruptFrame, "corrupt", {"field": "meta_crc", "frame": "PAGES"}),
        (P1, lambda f: f.pack(version=3), VersionMismatch, "version", {}),
        (P1, lambda f: f.pack(version=1), CorruptFrame, "corrupt", {"field": "version"}),
        (P1, lambda f: f.pack(flags=1), CorruptFrame, "corrupt", {"field": "flags"}),
        (P1, lambda f: f.pack(meta_length=1 << 20), CorruptFrame, "corrupt", {"field": "meta_length"}),
        (P1, lambda f: f.pack(payload_length=1 << 31), CorruptFrame, "corrupt", {"field": "payload_length"}),
        (P1, lambda f: f.pack(payload_length=5), CorruptFrame, "corrupt", {"field": "payload_length"}),
        (P1, lambda f: f.pack(sequence=f.header.sequence - 1), CorruptFrame, "corrupt", {"field": "sequence"}),
        (P1, lambda f: f.pack(sequence=f.header.sequence + 1), CorruptFrame, "corrupt", {"field": "sequence"}),
        (P1, lambda f: f.pack(term=0), RemoteProtocolError, "stale_term", {}),
        (P1, lambda f: f.pack(term=2), RemoteProtocolError, "protocol", {}),
        (P1, lambda f: f.pack(epoch=1), EpochGap, "gap", {"epoch": 1, "frame": "PAGES"}),
        (P1, lambda f: f.pack(epoch=3), EpochGap, "gap", {"epoch": 3, "frame": "PAGES"}),
        (P1, meta_at(0, "<H", 7), CorruptFrame, "corrupt", {"region": 7}),
        (P1, meta_at(40, "<I", 32), CorruptFrame, "corrupt", {"region": "ram", "gfn": 32}),
        (P1, meta_at(40, "<I", 9), CorruptFrame, "corrupt", {"region": "ram", "gfn": 9}),
        (P1, meta_at(28, "<I", 4), CorruptFrame, "corrupt", {"region": "ram", "gfn": 4}),
        (P1, payload_flipped(4095), CorruptFrame, "corrupt", {"region": "ram", "gfn": 4, "epoch": 2}),
        (P1, payload_flipped(3 * 4096), CorruptFrame, "corrupt", {"region": "ram", "gfn": 10, "epoch": 2}),
        (STATE, payload_flipped(0), CorruptFrame, "corrupt", {"frame": "STATE", "epoch": 2}),
        (OUTPUT, payload_flipped(0), CorruptFrame, "corrupt", {"frame": "OUTPUT", "epoch": 2}),
        (OUTPUT, fields(released=2), CorruptFrame, "corrupt", {"field": "released", "epoch": 2}),
        (STATE, lambda f: f.pack(meta=b"\x91" * 60_000), CorruptFrame, "corrupt", {"frame": "STATE"}),
        (STATE, lambda f: f.pack(meta=b"\xdd\xff\xff\xff\xff"), CorruptFrame, "corrupt", {"frame": "STATE"}),
        (COMMIT, fields(pages=5), EpochGap, "gap", {"epoch": 2}),
        (COMMIT, fields(pages=7), EpochGap, "gap", {"epoch": 2}),
        (COMMIT, fields(chain=bytes(16)), EpochGap, "gap", {"epoch": 2}),
        (COMMIT, fields(digest=bytes(16)), EpochGap, "gap", {"epoch": 2}),
        (COMMIT, lambda f: f.pack(meta=b"\x80"), CorruptFrame, "corrupt", {"frame": "COMMIT"}),
    ],
)  # fmt: skip
def test_a_wrong_frame(
    number: int, change: Change, error: type[CkptdError], code: str, where: dict[str, object]
) -> None:
    world = staged()
    parts = whole(world)
    data = joined(parts[:number]) + change(parts[number])
    refused(world, data, error, code, **where)


def test_a_flipped_bit_anywhere_in_an_epoch_is_noticed_before_it_commits() -> None:
    world = staged()
    parts = whole(world)
    before, data = world.holding.state(), joined(parts)
    for at in [*range(0, 700, 7), *range(700, len(data), 211), len(data) - 1]:
        broken = bytearray(data)
        broken[at] ^= 0x10
        twin = staged()
        whole(twin)
        with pytest.raises(CkptdError):
            twin.to_secondary(bytes(broken))
            twin.secondary.end_of_stream()  # a longer length waits for bytes that never come
        twin.secondary.abandon()
        assert twin.holding.state() == before


def test_a_stream_that_ends_in_a_frame() -> None:
    world = staged()
    before = world.holding.state()
    world.to_secondary(joined(whole(world))[:-1])
    with pytest.raises(CorruptFrame, match="middle of a frame") as caught:
        world.secondary.end_of_stream()
    leaves_no_trace(world, caught.value, "corrupt", before)


def test_a_page_named_twice_across_frames() -> None:
    world = staged()
    data = world.pages(1, [4, 5]) + world.pages(1, [5, 6])
    refused(world, data, CorruptFrame, "corrupt", region="ram", gfn=5, epoch=2)


def test_regions_out_of_order_across_frames() -> None:
    world = staged()
    data = world.pages(1, [4]) + world.pages(0, [2])
    refused(world, data, CorruptFrame, "corrupt", region="low", gfn=2)


def test_a_replayed_epoch() -> None:
    world = staged()
    again = enumerate(frames(b"".join(world.sent[1:])))
    refused(world, b"".join(frame.pack(sequence=5 + number) for number, frame in again), EpochGap, "gap", epoch=1)


def test_a_skipped_epoch() -> None:
    world = staged()
    whole(world)  # made, and lost on the way
    later = [*frames(world.pages(1, [4])), *frames(b"".join(world.close_epoch()))]
    data = b"".join(frame.pack(sequence=5 + number) for number, frame in enumerate(later))
    refused(world, data, EpochGap, "gap", epoch=3)


def test_an_exchanged_epoch_breaks_the_chain() -> None:
    """Another epoch 2 of the same guest in the same term, with every number right, over another epoch 1."""
    world = staged()
    world.primary.chain = bytes(16)
    error = refused(world, joined(whole(world)), EpochGap, "gap", epoch=2)
    assert "chain" in error.message


def test_a_wrong_digest_takes_the_table_back() -> None:
    world = staged()
    world.table.update(1, np.array([30], dtype=np.int64), world.hasher.hash_rows(world.memory[1][4:5]))
    refused(world, joined(whole(world)), DigestMismatch, "digest", epoch=2)


def test_a_decompression_bomb() -> None:
    world = staged()
    world.cache.remember(1, *_gathered(world, [4]))
    frame = next(frames(world.deltas(1, [4])))
    bomb = lz4.block.compress(bytes(600_000), store_size=False)
    assert len(bomb) < 4096
    refused(world, frame.pack(payload=bomb), CorruptFrame, "corrupt", pages=1)


def test_a_delta_block_larger_than_its_pages() -> None:
    world = staged()
    world.cache.remember(1, *_gathered(world, [4]))
    frame = next(frames(world.deltas(1, [4])))
    refused(world, frame.pack(payload=bytes(4097)), CorruptFrame, "corrupt", field="payload_length", region="ram")


def test_a_delta_against_another_copy() -> None:
    world = staged()
    world.write(1, [4], 1)
    world.memory[1][4, 100] = 9
    world.cache.remember(1, *_gathered(world, [4]))  # not what the receiver has under that hash
    world.memory[1][4, 200] = 9
    refused(world, world.deltas(1, [4]), CorruptFrame, "corrupt", region="ram", gfn=4)


def _gathered(world: World, gfns: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    where = np.array(gfns, dtype=np.int64)
    rows = world.memory[1][where]
    return where, rows, world.table.lookup(1, where)


# --- frames where they do not belong

OUT_OF_PLACE: dict[str, Callable[[list[Frame]], list[Frame]]] = {
    "commit without state and output": lambda f: [f[0], f[1], f[4]],
    "commit without output": lambda f: [f[0], f[1], f[2], f[4]],
    "output before state": lambda f: [f[0], f[1], f[3]],
    "pages after state": lambda f: [f[0], f[2], f[1]],
    "state twice": lambda f: [f[0], f[2], f[2]],
    "output twice": lambda f: [f[0], f[2], f[3], f[3]],
    "commit at once": lambda f: [f[4]],
    "output at once": lambda f: [f[3]],
}


@pytest.mark.parametrize("order", OUT_OF_PLACE.values(), ids=OUT_OF_PLACE)
def test_a_frame_out_of_place(order: Callable[[list[Frame]], list[Frame]]) -> None:
    world = staged()
    chosen = order(whole(world))
    data = b"".join(frame.pack(sequence=5 + number) for number, frame in enumerate(chosen))
    last = chosen[-1].header.type.name
    error = refused(world, data, RemoteProtocolError, "protocol", epoch=2, frame=last)
    assert error.where["state"]


@pytest.mark.parametrize("kind", [Type.HELLO, Type.WELCOME, Type.TABLE, Type.ACK, Type.PROMOTED, Type.VERIFIED])
def test_a_frame_that_is_not_for_a_secondary(kind: Type) -> None:
    world = staged()
    payload = bytes(4 << 20) if kind is Type.TABLE else b""
    frame = Frame(Header(kind, 1, 1, 5, 0, 0, 0), b"\x80", payload)
    refused(world, frame.pack(), RemoteProtocolError, "protocol", frame=kind.name, state="READY")


@pytest.mark.parametrize(
    ("message", "epoch", "error", "code"),
    [
        (Verify(), 0, EpochGap, "gap"),
        (Verify(), 2, EpochGap, "gap"),
        (Handover(), 1, RemoteProtocolError, "protocol"),
        (Iteration(1, 1), 2, RemoteProtocolError, "protocol"),
        (State(0), 1, EpochGap, "gap"),
        (Output(0, 0, 0), 2, RemoteProtocolError, "protocol"),
        (Commit(0, bytes(16), bytes(16), "memory", False), 2, RemoteProtocolError, "protocol"),
    ],
)
def test_a_message_at_the_wrong_time(message: Message, epoch: int, error: type[CkptdError], code: str) -> None:
    world = staged()
    data = message_frame(message, epoch=epoch, sequence=5)
    refused(world, data, error, code)


def test_anything_before_hello() -> None:
    for message in (Verify(), State(0), Handover()):
        world = staged()
        world.secondary.abandon()
        world.connect()
        refused(world, message_frame(message), RemoteProtocolError, "protocol", state="GREETING")


# --- precopy iterations

ITERATIONS: dict[str, tuple[Callable[[World], bytes], dict[str, object]]] = {
    "another count": (lambda w: w.pages(1, [4], 1) + _sent(w, Iteration(1, 2)), {"epoch": 2}),
    "another number": (lambda w: w.pages(1, [4], 1) + _sent(w, Iteration(2, 1)), {"epoch": 2}),
    "ended twice": (lambda w: w.pages(1, [4], 1) + _ended(w, 1) + _sent(w, Iteration(1, 1)), {"epoch": 2}),
    "pages after its end": (lambda w: w.pages(1, [4], 1) + _ended(w, 1) + w.pages(1, [9], 1), {"gfn": 9}),
    "never ended, another": (lambda w: w.pages(1, [4], 1) + w.pages(1, [9], 2), {"frame": "PAGES"}),
    "never ended, paused": (lambda w: w.pages(1, [4], 1) + w.pages(1, [9]), {"frame": "PAGES"}),
    "an earlier one": (lambda w: w.pages(1, [4], 2) + _ended(w, 2) + w.pages(1, [9], 1), {"gfn": 9}),
    "after the pause": (lambda w: w.pages(1, [4]) + w.pages(1, [9], 1), {"gfn": 9}),
    "a page twice": (lambda w: w.pages(1, [4], 1) + w.pages(1, [4], 1), {"gfn": 4}),
}


def _ended(world: World, iteration: int) -> bytes:
    return b"".join(world.primary.end_iteration(iteration))


def _sent(world: World, message: Message) -> bytes:
    """Through the primary's numbering."""
    return b"".join(world.primary._send(message, 2))


@pytest.mark.parametrize(("make", "where"), ITERATIONS.values(), ids=ITERATIONS)
def test_iterations_end_once_and_rise(make: Callable[[World], bytes], where: dict[str, object]) -> None:
    world = staged()
    refused(world, make(world), CorruptFrame, "corrupt", **where)


def test_a_torn_page_that_never_comes_whole() -> None:
    world = staged()
    data = world.pages(1, [4, 5, 9], 1, torn=[5]) + _ended(world, 1) + world.pages(1, [6, 10])
    data += world.pages(1, [11]) + b"".join(world.close_epoch())
    refused(world, data, RemoteProtocolError, "torn", region="ram", gfn=5, epoch=2)


@pytest.mark.parametrize("again", [0, 2])
def test_a_torn_page_that_comes_again(again: int) -> None:
    world = staged()
    data = world.pages(1, [4, 5, 9], 1, torn=[5]) + _ended(world, 1)
    if again:
        data += world.pages(1, [5], 2) + _ended(world, 2)
    data += world.pages(0, [2]) + world.pages(1, [4, 6, 9, 10] if again else [4, 5, 6, 9, 10])
    world.to_secondary(data + b"".join(world.close_epoch()))
    assert world.settle().pages == 3 + 1 + 5
    assert world.holding.true_digest() == world.table.digest
    assert [one.tobytes() for one in world.holding.images] == [one.tobytes() for one in world.memory]


# --- the image that nobody has committed yet is written directly; table and image agree even then


def direct() -> World:
    world = World(GEOMETRY)
    world.write(1, range(20), 1)
    return world


@pytest.mark.parametrize("gfns", [range(20), [1, 3, 7]], ids=["a run", "here and there"])
def test_direct_a_flipped_page_is_noticed_and_the_table_tells_the_truth(gfns: list[int]) -> None:
    world = direct()
    frame = next(frames(world.pages(1, gfns)))
    with pytest.raises(CorruptFrame) as caught:
        world.to_secondary(payload_flipped(4096 + 3)(frame))
    assert caught.value.where == {"region": "ram", "gfn": list(gfns)[1], "epoch": 1}
    _still_partial(world)


@pytest.mark.parametrize("cut", [100, 600, 3000, 50_000])
def test_direct_a_cut_payload_leaves_a_table_that_tells_the_truth(cut: int) -> None:
    """Content that comes, is cut, and is gone again from the guest: nothing but the table could tell."""
    world = direct()
    world.to_secondary(world.pages(1, range(20))[:cut])
    world.memory[1][:] = 0
    _still_partial(world)


def test_direct_a_torn_page_must_come_again() -> None:
    world = direct()
    world.to_secondary(world.pages(1, range(20), 1, torn=[3]) + _ended(world, 1))
    with pytest.raises(RemoteProtocolError) as caught:
        world.to_secondary(b"".join(world.close_epoch()))
    assert (caught.value.code, caught.value.where["gfn"]) == ("torn", 3)
    _still_partial(world)


def test_direct_a_wrong_digest() -> None:
    world = direct()
    world.to_secondary(world.pages(1, range(20)))
    world.table.update(1, np.array([30], dtype=np.int64), world.hasher.hash_rows(world.memory[1][4:5]))
    with pytest.raises(DigestMismatch):
        world.to_secondary(b"".join(world.close_epoch()))
    _still_partial(world)


def _still_partial(world: World) -> None:
    world.secondary.abandon()
    holding = world.holding
    assert (holding.holding, holding.epoch, holding.chain) == ("partial", 0, bytes(16))
    assert holding.table is not None and holding.table.digest == holding.true_digest()
    world.goes_on()


# --- after the proof


def test_an_epoch_that_cannot_be_made_permanent_takes_the_table_back() -> None:
    world = staged()
    before = world.holding.state()
    world.to_secondary(joined(whole(world)))
    world.holding.full = True
    with pytest.raises(NoSpace) as caught:
        world.settle()
    world.holding.full = False
    leaves_no_trace(world, caught.value, "no_space", before)


def test_an_epoch_that_is_permanent_stays_when_the_link_breaks_before_the_ack() -> None:
    world = staged()
    world.to_secondary(joined(whole(world)))
    (ready,) = world.there.events()
    world.holding.commit(ready)  # type: ignore[arg-type]
    world.secondary.abandon()
    assert world.holding.epoch == 2
    assert world.holding.table is not None and world.holding.table.digest == world.holding.true_digest()
    world.goes_on()
    assert world.holding.epoch == 3


def test_silence_and_heartbeats() -> None:
    world = staged()
    before = world.holding.state()
    primary, secondary = world.primary, world.secondary
    assert primary.tick(499_999_999) == [] and secondary.tick(499_999_999) == []
    for sender, hearer in ((primary, world.there), (secondary, world.here)):
        (beat,) = frames(b"".join(sender.tick(600_000_000)))
        assert beat.header.type is Type.HEARTBEAT and sender.tick(700_000_000) == []
        hearer.deliver(beat.pack(), now=600_000_000)
        assert hearer.events() == []
    for machine in (primary, secondary):
        machine.tick(2_600_000_000)
        with pytest.raises(TransportError, match="2000 ms"):
            machine.tick(2_600_000_001)
    leaves_no_trace(world, TransportError("silence"), "failed", before)


def test_silence_is_no_sign_while_this_side_does_not_read() -> None:
    world = staged()
    world.to_secondary(joined(whole(world)))
    world.here.deliver(world.secondary.tick(60_000_000_000))  # a slow disk
    world.settle()
    world.here.deliver(world.secondary.tick(62_000_000_001, listening=False))
    world.secondary.tick(64_000_000_001)
    with pytest.raises(TransportError):
        world.secondary.tick(64_000_000_002)


def test_no_heartbeat_before_hello_nor_after_the_end() -> None:
    world = World(GEOMETRY, greet=False)
    assert world.primary.tick(1_900_000_000) == [] and world.secondary.tick(1_900_000_000) == []
    with pytest.raises(TransportError):
        world.secondary.tick(2_000_000_001)
    world = staged()
    assert world.primary.bye("done")
    assert world.primary.tick(10_000_000_000) == []


def test_the_last_word_is_heard_either_way() -> None:
    world = staged()
    world.to_secondary(world.primary.bye("the operator said so"))
    assert world.there.events() == [PeerClosed("bye", "the operator said so", 0, 1)]
    world = staged()
    world.here.deliver(world.secondary.nack(EpochGap("no", epoch=7)))
    assert world.here.events() == [PeerClosed("gap", "no (epoch 7)", 7, 0)]


def test_the_text_of_a_nack_always_fits() -> None:
    for text in ("ü" * 2000, "\udcff" * 2000, "x" * 5000):
        world = staged()
        side = Side(world.primary)
        side.deliver(world.secondary.nack(EpochGap(text)))
        (closed,) = side.events()
        assert isinstance(closed, PeerClosed) and closed.code == "gap"
