"""SIGHUP takes over what can change; SIGTERM leaves the guest running and the replica whole."""

from __future__ import annotations

import signal
from collections.abc import Callable

from ckptd.replica.replica import Replica
from tests.e2e.pair import GUEST, Pair, wait_for

Make = Callable[..., Pair]


def epochs_in(pair: Pair, steps: int) -> int:
    """Epochs while the guest makes so many steps: a measure that a busy machine leaves alone."""
    before = pair.primary.ask()
    until = before["guest_facts"]["steps"] + steps
    after = wait_for(lambda: (now := pair.primary.ask())["guest_facts"]["steps"] >= until and now, "the guest goes on")
    return int(after["epochs_committed"] - before["epochs_committed"])


def test_sighup_takes_over_what_can_change(make_pair: Make) -> None:
    pair = make_pair(guest={"dirty_rate": 6400}, checkpoint={"interval": "500ms"}).start()
    seldom = epochs_in(pair, 150)
    pair.sections["checkpoint"]["interval"] = "20ms"
    pair.write()
    pair.primary.signal(signal.SIGHUP)
    wait_for(lambda: pair.primary.ask()["interval_ms"] == 20, "taken over")
    assert epochs_in(pair, 150) > 4 * seldom
    assert "checkpoint.interval" in pair.primary.log()

    right = pair.primary.config.read_text()
    for wrong in (right.replace('"20ms"', '"soon"'), "[guest\n", right + "\n[colour]\nred = 1\n"):
        count = pair.primary.log().count("the old one stays")
        pair.primary.config.write_text(wrong)
        pair.primary.signal(signal.SIGHUP)
        wait_for(lambda: pair.primary.log().count("the old one stays") > count, "refused")  # noqa: B023
    pair.primary.config.unlink()
    pair.primary.signal(signal.SIGHUP)
    wait_for(lambda: pair.primary.log().count("the old one stays") == 4, "a file that is gone is refused, too")
    assert pair.primary.ask()["interval_ms"] == 20

    pair.sections["checkpoint"] |= {"interval": {"min": "5ms", "max": "50ms"}, "encoding": "auto", "stage": "8MiB"}
    pair.write()
    pair.primary.signal(signal.SIGHUP)
    wait_for(lambda: "these keys change only with a restart" in pair.primary.log(), "named")
    assert "checkpoint.stage" in pair.primary.log()
    wait_for(lambda: pair.primary.ask()["interval_ms"] != 20, "adaptive now")
    pair.secondary_sections["replica"] |= {"history": 3, "reserve": "8MiB"}
    pair.secondary_sections["link"]["heartbeat"] = "100ms"
    pair.write()
    pair.secondary.signal(signal.SIGHUP)
    wait_for(lambda: len(pair.secondary.ask("history")["epochs"]) <= 3 + 1, "less history")
    assert "replica.reserve" in pair.secondary.log() and "link.heartbeat" in pair.secondary.log()
    pair.advances("epochs_committed", 5)
    pair.verify()
    assert pair.primary.ask()["epochs_rolled_back"] == 0


def test_sigterm_leaves_guest_and_replica_as_they_are(make_pair: Make) -> None:
    pair = make_pair().start()
    pid = pair.guest_pid()
    assert pair.primary.terminate() == 0
    assert not pair.primary.socket.exists()
    released, steps = pair.last_output(), pair.guest_steps()
    wait_for(lambda: pair.guest_steps() > steps + 20, "the guest runs on")
    assert pair.last_output() == released and pair.guest_pid() == pid
    wait_for(lambda: pair.held()["primary"] is None, "the secondary knows")
    assert "the primary" in pair.held()["reason"]
    held = pair.held()
    standby = int(held["standby"]["pid"])
    assert standby
    assert pair.secondary.terminate() == 0
    assert not pair.guest_pid("s"), "the standby ends with its daemon"
    replica = Replica.open(pair.replica_dir / GUEST, guest=GUEST, history=100, history_bytes=1 << 30, reserve=4 << 20)
    try:
        assert (replica.holding, replica.epoch, replica.digest.hex()) == ("committed", held["epoch"], held["digest"])
        table = replica.table
        assert table is not None
        assert not table.copy().rehash(replica.images).pages  # exactly that epoch (P2)
    finally:
        replica.close()
    pair.start()
    assert pair.guest_pid() == pid
    pair.verify()
    pair.check_outputs()


def test_sigterm_does_not_wait_for_a_silent_secondary(make_pair: Make) -> None:
    pair = make_pair(link={"timeout": "5min"}, secondary_link={"timeout": "5min"}).start()
    pair.secondary.signal(signal.SIGSTOP)
    wait_for(pair.no_more_fits, "the window fills")
    assert pair.primary.terminate() == 0
    assert pair.guest_pid()
    pair.primary.start()  # connects to a socket that nobody reads
    wait_for(pair.primary.answers, "it is up")
    wait_for(lambda: pair.status().get("connections"), "it waits for an answer to its HELLO")
    assert pair.primary.terminate() == 0
    pair.secondary.signal(signal.SIGCONT)


def test_sigterm_of_a_secondary_does_not_wait_for_a_silent_primary(make_pair: Make) -> None:
    pair = make_pair(link={"timeout": "5min"}, secondary_link={"timeout": "5min"}).start()
    pair.primary.signal(signal.SIGSTOP)
    assert pair.secondary.terminate() == 0
    pair.primary.signal(signal.SIGCONT)
    pair.secondary.start()
    pair.protected()
    pair.verify()
