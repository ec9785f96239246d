"""Promotion, switchover, fencing: the guest goes on where the world last saw it, and never on both sides (P1, P3)."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from ckptd.control.client import Answered
from ckptd.errors import CkptdError, Fenced, Inconsistent, StateError
from ckptd.protocol.wire import Type
from tests.e2e.pair import GUEST, Pair, frame_of, wait_for

Make = Callable[..., Pair]


def promoted_runs(pair: Pair) -> None:
    """The guest runs on the secondary, and speaks."""
    last = pair.last_output("s")
    wait_for(lambda: pair.last_output("s") > last + 20, "the promoted guest speaks")
    assert pair.held()["condition"] == "promoted" and pair.held()["standby"]["active"]


def fenced(pair: Pair) -> None:
    wait_for(lambda: pair.condition() == "fenced", "fenced")
    released, steps = pair.last_output("p"), pair.guest_steps()
    promoted_runs(pair)
    assert pair.last_output("p") == released and pair.guest_steps() == steps
    assert pair.primary.ask()["guest_facts"]["paused"]


def test_failover_loses_and_contradicts_nothing(make_pair: Make) -> None:
    pair = make_pair().start()
    pair.advances("outputs_released", 50)
    epoch = pair.held()["epoch"]
    pair.kill_guest("p")
    pair.primary.kill()
    answer = wait_for(lambda: promote(pair), "promoted")
    assert answer["epoch"] >= epoch and answer["term"] == 2
    promoted_runs(pair)
    assert pair.check_outputs() > 50
    with pytest.raises(Answered, match="runs here already") as twice:
        pair.secondary.wish("promote")
    assert twice.value.exit_code == StateError.exit_code
    with pytest.raises(Answered, match="runs here") as discarded:
        pair.secondary.wish("discard")
    assert discarded.value.exit_code == StateError.exit_code
    # it outlives the daemon that promoted it, whichever way that ends
    for end in (pair.secondary.kill, pair.secondary.terminate):
        pid = pair.guest_pid("s")
        end()
        last = pair.last_output("s")
        wait_for(lambda: pair.last_output("s") > last + 20, "it goes on")  # noqa: B023
        pair.secondary.start()
        wait_for(lambda: pair.held().get("condition") == "promoted", "found again")
        assert pair.guest_pid("s") == pid == pair.held()["standby"]["pid"]
    pair.check_outputs()


def promote(pair: Pair) -> dict[str, object] | None:
    """None while the primary's connection is still there."""
    try:
        return pair.secondary.wish("promote", guest=GUEST)
    except Answered as error:
        assert "connected and alive" in error.message
        return None


def discarded(pair: Pair) -> bool:
    """False while the secondary has not seen its guest's end."""
    try:
        return bool(pair.secondary.wish("discard"))
    except Answered as error:
        assert "the guest runs here" in error.message
        return False


def test_promotion_by_force_fences_the_old_primary(make_pair: Make) -> None:
    pair = make_pair().start()
    pair.advances("outputs_released", 20)
    with pytest.raises(Answered, match="connected and alive") as refused:
        pair.secondary.wish("promote")
    assert refused.value.exit_code == StateError.exit_code
    pair.advances("epochs_committed", 3)
    answer = pair.secondary.wish("promote", force=True)
    assert answer["term"] == 2
    fenced(pair)
    for wish in ("checkpoint", "verify", "switchover"):
        with pytest.raises(Answered) as after:
            pair.primary.wish(wish)
        assert after.value.exit_code == Fenced.exit_code
    pair.check_outputs()
    # a restarted primary is told again; its guest's output stays where it is
    pair.primary.kill()
    released = pair.last_output("p")
    pair.primary.start()
    wait_for(lambda: pair.condition() == "fenced", "fenced again")
    assert pair.last_output("p") == released
    assert pair.primary.terminate() == 0
    # and so it is by a secondary that was restarted meanwhile
    pair.secondary.kill()
    pair.secondary.start()
    pair.primary.start()
    wait_for(lambda: pair.condition() == "fenced", "fenced by the restarted secondary")
    assert pair.last_output("p") == released
    pair.check_outputs()


def test_what_is_no_committed_epoch_is_not_promoted(make_pair: Make) -> None:
    pair = make_pair(relay=True)
    pair.secondary.start()
    wait_for(pair.held, "it is up")
    with pytest.raises(Answered, match="no committed epoch") as empty:
        pair.secondary.wish("promote")
    assert empty.value.exit_code == Inconsistent.exit_code
    assert pair.relay is not None
    pair.relay.set("up", cut_before=frame_of(Type.COMMIT))
    pair.primary.start()
    wait_for(lambda: pair.relay.happened, "cut before the first COMMIT")  # type: ignore[union-attr]
    pair.relay.open = False
    pair.relay.cut()
    wait_for(lambda: pair.held()["primary"] is None, "alone")
    assert pair.held()["holding"] == "partial"
    for force in (False, True):
        with pytest.raises(Answered, match="no committed epoch") as partial:
            pair.secondary.wish("promote", force=force)
        assert partial.value.as_dict()["error"] == "Inconsistent"
    assert not pair.outputs("s") and not pair.held()["standby"]["active"]
    pair.relay.open = True
    pair.protected()
    pair.verify()
    with pytest.raises(CkptdError, match="no guest 'vm2'"):
        pair.secondary.wish("promote", guest="vm2")


def test_switchover_moves_the_guest(make_pair: Make) -> None:
    pair = make_pair().start()
    pair.advances("outputs_released", 20)
    answer = pair.primary.wish("switchover")
    assert answer["digest_equal"] and answer["term"] == 2 and answer["downtime_ms"] > 0 and answer["iterations"] >= 0
    assert answer["digest"] == pair.held()["digest"]
    assert pair.primary.exit_code() == 0
    wait_for(lambda: not pair.guest_pid("p"), "the guest's old process ends")
    assert pair.last_output("p") > 0
    promoted_runs(pair)
    pair.check_outputs()


@pytest.mark.parametrize("moment", ["STATE", "COMMIT", "ACK", "HANDOVER", "HANDOVER passed", "PROMOTED"])
def test_a_link_cut_in_a_switchover_leaves_one_guest(make_pair: Make, moment: str) -> None:
    # no epoch but the first, before which the cut is not yet set, and the last
    pair = make_pair(relay=True, checkpoint={"interval": "1min"}, guest={"output_every": 2}).start_quietly()
    assert pair.relay is not None
    kind = frame_of(Type[moment.split(maxsplit=1)[0]])
    way = "down" if moment in ("ACK", "PROMOTED") else "up"
    pair.relay.set(way, **{"cut_after" if "passed" in moment else "cut_before": kind})  # type: ignore[arg-type]
    with pytest.raises(Answered) as error:
        pair.primary.wish("switchover")
    assert pair.relay.happened == 1
    if moment in ("STATE", "COMMIT", "ACK"):
        assert error.value.exit_code != Fenced.exit_code
        steps = pair.steps()
        wait_for(lambda: pair.steps() > steps + 10, "the guest goes on here")
        pair.protected(0)
        pair.primary.wish("checkpoint")
        assert not pair.held()["standby"]["active"] and not pair.outputs("s")
        pair.verify()
        assert pair.primary.wish("switchover")["digest_equal"]
        assert pair.primary.exit_code() == 0
    else:
        assert error.value.exit_code == Fenced.exit_code
        wait_for(lambda: pair.condition() == "fenced", "fenced")
        if moment == "HANDOVER":
            wait_for(lambda: pair.held()["primary"] is None, "alone")
            assert not pair.held()["standby"]["active"]  # the operator decides
            pair.secondary.wish("promote")
        wait_for(lambda: pair.held()["standby"]["active"], "it runs there")
        fenced(pair)
    promoted_runs(pair)
    assert pair.check_outputs() > 0


def test_a_verification_whose_link_breaks_pauses_nothing_for_good(make_pair: Make) -> None:
    pair = make_pair(relay=True, checkpoint={"interval": "1min"}).start_quietly()
    assert pair.relay is not None
    wait_for(lambda: pair.steps() > 200, "a large epoch, so that the link breaks while it is being sent")
    cuts = [("up", Type.PAGES), ("up", Type.STATE), ("up", Type.VERIFY), ("down", Type.VERIFIED)]
    for count, (way, kind) in enumerate(cuts, 1):
        pair.relay.set(way, cut_before=frame_of(kind))  # type: ignore[arg-type]
        with pytest.raises(Answered):
            pair.primary.wish("verify")
        assert pair.relay.happened == count
        steps = pair.steps()
        wait_for(lambda: pair.steps() > steps + 10, "the guest goes on")  # noqa: B023
        pair.protected(0)
    pair.verify()


def test_a_standby_that_died_is_replaced(make_pair: Make) -> None:
    pair = make_pair().start()
    pair.kill_guest("s")
    pair.advances("epochs_committed", 3)
    pair.primary.signal(signal.SIGKILL)
    pair.primary.exit_code()
    pair.kill_guest("p")
    wait_for(lambda: promote(pair), "promoted all the same")
    promoted_runs(pair)
    pair.check_outputs()
    # the promoted guest ends; the place can be used again
    pair.kill_guest("s")
    wait_for(lambda: discarded(pair), "discarded")
    outputs = pair.root / "p" / "output"
    outputs.unlink()
    (pair.root / "s" / f"{GUEST}.output").unlink()
    pair.primary.start("--term", "9")
    pair.protected()
    assert pair.primary.wish("switchover")["digest_equal"]
    promoted_runs(pair)
    pair.check_outputs()
