"""Which daemon a command talks to, when it is said and when it is not."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.cli.daemons import find_daemon
from ckptd.errors import ConfigError, StateError, Unreachable

SAMPLES = Path(__file__).parents[2] / "config"


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make a socket that answers, at this place under tmp_path."""
    listeners = []

    def listen(place: str) -> Path:
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()
        listeners.append(listener)
        return path

    yield listen
    for listener in listeners:
        listener.close()


def test_a_file_names_its_daemon() -> None:
    assert find_daemon(SAMPLES / "primary.toml", None) == Path("/run/ckptd/demo/primary.sock")
    assert find_daemon(SAMPLES / "secondary.toml", None, "secondary") == Path("/run/ckptd/secondary/secondary.sock")


def test_the_file_of_the_other_role_is_refused() -> None:
    with pytest.raises(ConfigError, match="the file of a primary; the command is for a secondary"):
        find_daemon(SAMPLES / "primary.toml", None, "secondary")


def test_a_socket_is_taken_as_it_is_and_not_beside_a_file(tmp_path: Path) -> None:
    assert find_daemon(None, tmp_path / "any") == tmp_path / "any"
    with pytest.raises(ConfigError, match="both"):
        find_daemon(SAMPLES / "primary.toml", tmp_path / "any")


def test_the_only_daemon_of_the_right_role_is_found(tmp_path: Path, listening: Callable[[str], Path]) -> None:
    primary, secondary = listening("vm1/primary.sock"), listening("secondary/secondary.sock")
    listening("vm1/guest.sock")
    assert find_daemon(None, None, "primary", run=tmp_path) == primary
    assert find_daemon(None, None, "secondary", run=tmp_path) == secondary
    with pytest.raises(StateError, match="several daemons") as raised:
        find_daemon(None, None, run=tmp_path)
    assert str(primary) in raised.value.message and str(secondary) in raised.value.message


def test_what_a_killed_daemon_left_gives_way_to_one_that_answers(
    tmp_path: Path, listening: Callable[[str], Path]
) -> None:
    alive = listening("vm1/primary.sock")
    left = tmp_path / "vm2" / "primary.sock"
    left.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
        gone.bind(str(left))
    assert find_daemon(None, None, "primary", run=tmp_path) == alive


def test_no_daemon_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no secondary has a control socket"):
        find_daemon(None, None, "secondary", run=tmp_path)
