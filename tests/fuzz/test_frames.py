"""A few thousand mutated frames, and proof that the run notices a machine that is not careful."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from ckptd.errors import CkptdError
from ckptd.protocol.collect import Collector
from ckptd.protocol.secondary import EpochReady

from ..protocol.world import World, frames
from .frames import Fuzz, main
from .mutate import GEOMETRY, ONE


def test_some_thousand_frames(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count", "3000", "--seed", "11", "--quiet"]) == 0
    said = capsys.readouterr().out
    for outcome in ("CorruptFrame", "EpochGap", "RemoteProtocolError", "VersionMismatch", "no error", "commits"):
        assert outcome in said


def test_a_case_is_the_same_every_time() -> None:
    one, other = Fuzz(3), Fuzz(3)
    for number in (5, 17, 40):
        one.case(number)
        other.case(number)
    assert (one.frames, one.outcomes, one.commits) == (other.frames, other.outcomes, other.commits)


def test_a_machine_that_does_not_clean_up_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Collector, "drop", lambda self: self.holding.drop_staged())
    assert main(["--count", "20000", "--seed", "11", "--quiet"]) == 1


def test_the_sending_machine_survives_what_comes_back() -> None:
    """Each answer of the secondary in turn is mutated on its way to a primary that is ready for it."""
    outcomes: Counter[str] = Counter()
    for number in range(600):
        chance = random.Random(number)
        world = World(GEOMETRY, greet=False)
        target = number % 6
        try:
            for step, answers in enumerate(_answers(world)):
                for frame in frames(answers):
                    hit = step == target
                    world.here.deliver(chance.choice(ONE)(chance, frame) if hit else frame.pack())
                world.here.events()
            outcomes["no error"] += 1
        except CkptdError as error:
            outcomes[type(error).__name__] += 1
            assert world.primary.nack(error)
    assert outcomes["CorruptFrame"] > 200 and outcomes["RemoteProtocolError"] > 10 and outcomes["no error"] > 20


def _answers(world: World) -> Iterator[bytes]:
    """WELCOME, TABLE, ACK, VERIFIED, the last ACK, PROMOTED, each once the primary has asked for it."""
    world.to_secondary(world.hello())
    world.there.events()
    yield b"".join(world.secondary.welcome(world.holding))
    world.to_secondary(world.primary.request_table())
    world.there.events()
    yield b"".join(b"".join(part) for part in world.secondary.table_frames())
    for final in (False, True):
        world.to_secondary(b"".join(world.close_epoch(final=final)))
        (ready,) = world.there.events()
        assert isinstance(ready, EpochReady)
        world.holding.commit(ready)
        yield b"".join(world.secondary.acknowledge("memory"))
        if not final:
            world.to_secondary(world.primary.verify())
            world.there.events()
            yield b"".join(world.secondary.verified(world.holding.true_digest()))
    world.to_secondary(world.primary.handover())
    world.there.events()
    yield b"".join(world.secondary.promoted(2))
