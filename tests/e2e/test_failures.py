"""Daemons that die and links that fail: partial epochs are dropped, nothing is lost, and little is sent again."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable

from tests.e2e.pair import Pair, Relay, wait_for

Make = Callable[..., Pair]
MEMORY = 16 << 20


def relay_of(pair: Pair) -> Relay:
    assert pair.relay is not None
    return pair.relay


def test_a_killed_secondary_goes_on_from_its_image(make_pair: Make) -> None:
    pair = make_pair().start()
    pair.advances("epochs_committed", 30)
    for _ in range(2):
        pair.secondary.kill()
        before = wait_for(lambda: (now := pair.status()) and now["condition"] == "unprotected" and now, "unprotected")
        assert before["reason"]
        pair.secondary.start()
        pair.protected(10)
    status = pair.primary.ask()
    assert status["rescans"] == 1  # its own table is that of the image once the epochs in flight are put back
    pair.verify()
    pair.check_outputs()


def test_little_is_sent_again_to_a_restarted_secondary(make_pair: Make) -> None:
    pair = make_pair(guest={"dirty_rate": 3200}).start()
    wait_for(lambda: pair.steps() > 200, "most pages were written once")
    before = pair.primary.ask()
    pid = pair.guest_pid()
    pair.secondary.kill()
    os.kill(pid, signal.SIGSTOP)  # so that what the guest writes meanwhile is not counted
    pair.secondary.start()
    wait_for(lambda: pair.held().get("holding") == "committed", "the replica is opened")
    os.kill(pid, signal.SIGCONT)
    after = pair.protected(1)
    assert after["rescans"] == before["rescans"] == 1
    sent, dirty = (after[key] - before[key] for key in ("wire_bytes", "raw_bytes"))
    assert sent < dirty + MEMORY // 2  # however many epochs went by
    pair.verify()


def test_a_guest_outlives_its_daemon_and_its_output_stays_held(make_pair: Make) -> None:
    pair = make_pair(guest={"dirty_rate": 3200}).start()
    wait_for(lambda: pair.steps() > 200, "most pages were written once")
    pid = pair.guest_pid()
    pair.primary.kill()
    released, steps = pair.last_output(), pair.guest_steps()
    wait_for(lambda: pair.guest_steps() > steps + 10, "the guest lives on")
    assert pair.last_output() == released  # P5
    os.kill(pid, signal.SIGSTOP)
    pair.primary.start()
    wait_for(pair.primary.answers, "the daemon is there")
    os.kill(pid, signal.SIGCONT)
    status = pair.protected(1)
    assert pair.guest_pid() == pid and pair.steps() > steps
    assert status["rescans"] == 1 and status["wire_bytes"] < MEMORY // 2  # by hash, not by resend
    wait_for(lambda: pair.last_output() > released + 5, "held output leaves")
    pair.verify()
    pair.check_outputs()


def test_both_are_killed_at_once(make_pair: Make) -> None:
    pair = make_pair().start()
    for first, second in ((pair.primary, pair.secondary), (pair.secondary, pair.primary)):
        pair.advances("epochs_committed", 5)
        first.signal(signal.SIGKILL)
        second.signal(signal.SIGKILL)
        first.exit_code()
        second.exit_code()
        second.start()
        first.start()
        pair.protected()
        pair.verify()
    pair.check_outputs()


def test_a_link_cut_at_any_byte_drops_the_partial_epoch(make_pair: Make) -> None:
    pair = make_pair(relay=True).start()
    relay, chance = relay_of(pair), random.Random(7)
    for count in range(1, 21):
        relay.set("up" if count % 4 else "down", cut_at=chance.randrange(1, 400_000 if count % 4 else 2_000))
        wait_for(lambda: relay.happened == count, "the cut")  # noqa: B023
    status = pair.protected()
    assert status["epochs_rolled_back"] > 0
    assert status["rescans"] == 1
    pair.verify()
    pair.check_outputs()


def test_a_frozen_link_is_noticed_by_both_sides(make_pair: Make) -> None:
    pair = make_pair(relay=True, link={"timeout": "1s"}, secondary_link={"timeout": "1s"}).start()
    relay = relay_of(pair)
    for direction in (None, "up", "down"):
        relay.set(direction, frozen=True)  # type: ignore[arg-type]
        reason = wait_for(lambda: (now := pair.status())["condition"] == "unprotected" and now["reason"], "unprotected")
        released, steps = pair.last_output(), pair.steps()
        wait_for(lambda: pair.held()["condition"] == "waiting", "the secondary knows, too")
        wait_for(lambda: pair.steps() > steps + 20, "the guest goes on")  # noqa: B023
        assert pair.last_output() == released
        assert reason
        relay.set()
        pair.protected()
    assert "nothing heard from the peer" in pair.primary.log()
    pair.verify()
    pair.check_outputs()


def test_a_flipped_bit_ends_the_connection_and_touches_nothing(make_pair: Make) -> None:
    pair = make_pair(relay=True).start()
    relay, chance = relay_of(pair), random.Random(11)
    places = [("up", chance.randrange(0, most)) for most in (48, 250, 5_000, 100_000, 300_000, 300_000)]
    places += [("down", chance.randrange(0, most)) for most in (48, 150, 600, 2_000)]
    for count, (direction, place) in enumerate(places, 1):
        pair.protected(1)
        closed = pair.secondary.log().count("connection closed")
        relay.set(direction, flip_at=place)  # type: ignore[arg-type]
        relay.cut()
        wait_for(lambda: relay.happened == count, "the flip")  # noqa: B023
        wait_for(lambda: pair.secondary.log().count("connection closed") >= closed + 2, "closed")  # noqa: B023
    pair.protected()
    pair.verify()
    assert pair.primary.ask()["rescans"] == 1
    pair.check_outputs()
