"""Both moments of a primary's death that matter, and a proof that sees what is wrong with the outcome."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.demo.pair import Moment, Pair, Setting


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    for name in ("d", "r"):
        (tmp_path / name).mkdir()
    one = Pair(Setting(memory=16 << 20, stage_mib=8), tmp_path / "d", tmp_path / "r", random.Random(4))
    try:
        one.start()
        one.wait_protected()
        one.protect(0.5)
        yield one
    finally:
        one.close()


@pytest.mark.parametrize("moment", ["within", "unheard"])
def test_a_failover_is_proved(pair: Pair, moment: Moment) -> None:
    killed = pair.kill_primary(moment)
    promoted = pair.promote()
    pair.run_on(0.3)
    proof, failures = pair.check()
    assert failures == []
    assert promoted["epoch"] >= killed.acknowledged
    assert proof.outputs.released > killed.released


def test_a_lost_output_and_a_rolled_back_epoch_fail_the_check(pair: Pair) -> None:
    killed = pair.kill_primary()
    pair.promote()
    output = pair.directory / "p" / "output"
    output.write_text("".join(line for line in output.open() if not line.startswith("2 ")))
    killed.acknowledged = killed.released = 10**6
    _, failures = pair.check()
    assert len(failures) == 3
    assert "though 1000000 was acknowledged" in failures[0]
    assert "knows of outputs up to" in failures[1]
    assert failures[2] == "1 outputs are lost, from number 2 on"


def test_each_daemon_can_be_killed_and_started_again(pair: Pair) -> None:
    before = pair.primary.status()
    pair.kill_secondary()
    pair.restart_secondary()
    pair.wait_protected()
    pair.kill_primary(host=False, seconds=0.2)
    pair.restart_primary()
    after = pair.wait_protected()
    assert after["guest_facts"]["pid"] == before["guest_facts"]["pid"]  # the guest outlives its daemon
    assert after["epoch"] > before["epoch"]
