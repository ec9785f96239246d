"""A few thousand mutated frames, and proof that the run notices a machine that is not careful."""

from __future__ import annotations

import pytest

from ckptd.protocol.collect import Collector

from .frames import Fuzz, main


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
