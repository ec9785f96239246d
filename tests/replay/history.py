"""One recorded history, and how it is fed to a replica: shared by the tests and by what made it.

    kv.ckptd    a recording, as `ckptd record` writes it: a sim guest of two regions that runs a key-value store
    kv.json     its parameters, and for each epoch what the guest itself was then: step, digest of its memory, outputs
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ckptd.guests.sim.machine import Params
from ckptd.memory.regions import Geometry, Region
from ckptd.protocol.messages import Hello, decode
from ckptd.protocol.peer import Timing
from ckptd.protocol.secondary import EpochReady, SecondaryMachine
from ckptd.protocol.wire import Type
from ckptd.replica.recording import read_frames
from ckptd.replica.replica import Replica

__all__ = ["ABOUT", "RECORDING", "About", "Place", "about", "feed", "open_replica", "places"]

RECORDING = Path(__file__).with_name("kv.ckptd")
ABOUT = RECORDING.with_suffix(".json")
NEVER = Timing(1 << 62, 1 << 62)


class About(NamedTuple):
    """What kv.json says. Each epoch is a dict with epoch, term, step, digest, chain, released, mark and
    deltas, the pages that went as such."""

    params: Params
    epochs: list[dict[str, Any]]


class Place(NamedTuple):
    """Where a frame is in the file, and of which epoch."""

    type: Type
    epoch: int
    offset: int
    meta: int
    payload: int
    end: int


def about(path: Path = ABOUT) -> About:
    raw = json.loads(path.read_text())
    return About(Params.from_dict(raw["params"]), raw["epochs"])


def places(recording: Path) -> list[Place]:
    found, offset = [], 0
    for frame in read_frames(recording):
        header = frame.header
        meta = offset + header.frame_length - header.payload_length - header.meta_length
        end = offset + header.frame_length
        found.append(Place(header.type, header.epoch, offset, meta, meta + header.meta_length, end))
        offset = end
    return found


def open_replica(directory: Path, history: int) -> Replica:
    return Replica.open(directory, guest="kv", history=history, history_bytes=1 << 30, reserve=1 << 20)


def feed(recording: Path, replica: Replica) -> None:
    """An empty replica takes in a recording from epoch 1 on, by the machine that takes in a connection."""
    frames = places(recording)
    data = memoryview(recording.read_bytes())
    hello = decode(Type.HELLO, bytes(data[frames[0].meta : frames[0].payload]))
    assert isinstance(hello, Hello) and frames[2].epoch == 1
    geometry = Geometry(tuple(Region(name, pages) for name, pages in hello.regions))
    replica.create(kind=hello.kind, geometry=geometry, seed=hello.seed, run=hello.run, term=1)
    machine = SecondaryMachine(NEVER, 0, replaying=True)
    machine.replay(replica)
    data = data[frames[2].offset :]
    while data:
        area = machine.buffer()
        count = min(len(area), len(data))
        area[:count], data = data[:count], data[count:]
        machine.received(count, 0)
        while (event := machine.next_event()) is not None:
            assert isinstance(event, EpochReady)
            replica.commit(event.epoch, event.term, event.chain, event.digest, event.level)
            machine.acknowledge(event.level)
            replica.apply()
