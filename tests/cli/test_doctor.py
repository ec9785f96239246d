"""`ckptd doctor`: its JSON, its table, and that it ends well as whoever runs it."""

from __future__ import annotations

import ctypes
import json
import os
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from ckptd.cli.main import main
from ckptd.doctor import GROUPS
from ckptd.doctor.system import in_child

NAMES = [check.__name__ for group in GROUPS.values() for check in group]
STATES = {"yes", "no", "unknown"}
RATINGS = {"recommended", "possible", "discouraged", "unavailable", "unknown"}
TRACKERS = {
    "sim": ["bitmap", "ring"],
    "kvm": ["kvm-manual", "kvm-bitmap", "kvm-ring"],
    "qemu": ["pagemap", "soft-dirty"],
}


def doctor(*arguments: str) -> tuple[int, str]:
    shown = StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    return int(ended.value.code or 0), shown.getvalue()


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    code, text = doctor("--json")
    assert code == 0
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def theirs(ours: dict[str, Any]) -> dict[str, Any]:
    """As an ordinary user; after `ours`, since such a user may not be able to load this Python's modules."""

    def dropped() -> tuple[int, str]:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as a user's own process is
        return doctor("--json")

    code, text = in_child(dropped, 100)
    assert code == 0
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_the_shape_of_the_json(who: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(who)
    assert found.keys() == {"findings", "advice"}
    assert [one["name"] for one in found["findings"]] == NAMES
    for one in found["findings"]:
        assert one.keys() == {"name", "state", "detail", "cure", "data"}
        assert one["state"] in STATES and one["detail"]
        assert isinstance(one["data"], dict)
    assert {
        guest: [one["tracker"] for one in advice["trackers"]] for guest, advice in found["advice"].items()
    } == TRACKERS
    for advice in found["advice"].values():
        assert advice.keys() == {"ready", "recommended", "trackers", "cures", "notes"}
        assert advice["ready"] in STATES
        assert all(
            one.keys() == {"tracker", "rating", "why"} and one["rating"] in RATINGS for one in advice["trackers"]
        )


def test_names_are_for_scripts(ours: dict[str, Any]) -> None:
    assert len(set(NAMES)) == len(NAMES)
    keys = [key for one in ours["findings"] for key in one["data"]]
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in (*NAMES, *keys))


def test_what_a_user_lacks_has_a_cure(theirs: dict[str, Any]) -> None:
    """But for what follows from something else, which is named then."""
    for one in theirs["findings"]:
        if one["state"] == "no" and not one["cure"]:
            assert re.search(r"see \w+|there is no ring|all that tracking needs", one["detail"]), one


def test_the_table_has_every_name_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, shown = doctor()
    assert code == 0
    assert all(name in shown for name in NAMES)
    for guest, trackers in TRACKERS.items():
        assert f"{guest} guests: ready" in shown
        assert all(tracker in shown for tracker in trackers)


def test_a_machine_that_offers_nothing_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every check fails in a way that it does not know."""
    monkeypatch.setattr("ckptd.doctor.in_child", lambda check, seconds: int("not a number"))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text = doctor("--json")
    found = json.loads(text)
    assert (code, {one["state"] for one in found["findings"]}) == (0, {"unknown"})
    assert "not a number" in found["findings"][0]["detail"]
    assert [advice["ready"] for advice in found["advice"].values()] == ["yes", "unknown", "unknown"]
    assert doctor()[0] == 0


def test_nothing_is_left_behind(ours: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def seen() -> tuple[object, ...]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return len(os.listdir("/proc/self/fd")), children, sorted(os.listdir("/sys/class/net")), os.listdir(tmp_path)

    def looked() -> tuple[object, object]:
        before = seen()
        doctor("--json")
        return before, seen()

    before, after = in_child(looked, 100)
    assert before == after
