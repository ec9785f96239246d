"""The control socket: its owner's alone, one daemon's alone, and every error arrives as it was raised."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ckptd.control.client import Answered, ask, wish
from ckptd.control.server import ControlServer
from ckptd.errors import CkptdError, ConfigError, Fenced, Inconsistent, NoSpace, StateError, Unreachable, VerifyFailed

ERRORS: list[CkptdError] = [
    StateError("not now", hint="later", epoch=5), Inconsistent("half of it"), Fenced("over", term=3),
    VerifyFailed("they differ", epoch=7, region="ram"), NoSpace("full", file=Path("/a/b")), CkptdError("something"),
]  # fmt: skip


async def status(_: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "test"}


async def echo(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"given": dict(given), "epoch": int(given["epoch"])}


async def fail(given: Mapping[str, Any]) -> dict[str, Any]:
    raise ERRORS[int(given["which"])]


async def never(_: Mapping[str, Any]) -> dict[str, Any]:
    await asyncio.sleep(3600)
    return {}


def server(path: Path) -> ControlServer:
    return ControlServer(path, {"status": status, "query": echo}, {"echo": echo, "fail": fail, "never": never})


def with_server(path: Path, client: Callable[[], None]) -> None:
    """Serve while `client` runs in a thread."""

    async def main() -> None:
        control = server(path)
        await control.start()
        try:
            await asyncio.to_thread(client)
        finally:
            await control.stop()
        assert not path.exists()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "test.sock"


def raw(path: Path, method: str, target: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        connection = http.client.HTTPConnection("localhost")
        connection.sock = sock
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def test_questions_and_wishes(path: Path) -> None:
    def client() -> None:
        assert ask(path, "status") == {"role": "test"}
        assert wish(path, "echo", epoch=3, guest=None) == {"given": {"epoch": 3}, "epoch": 3}
        assert ask(path, "query?epoch=4&guest=vm1") == {"given": {"epoch": "4", "guest": "vm1"}, "epoch": 4}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for which, error in enumerate(ERRORS):
            with pytest.raises(Answered) as answered:
                wish(path, "fail", which=which)
            assert answered.value.exit_code == error.exit_code
            assert answered.value.as_dict() == error.as_dict()
        for method, target, code in [
            ("POST", "/v1/status", 405), ("GET", "/v1/echo", 405), ("GET", "/v1/nothing", 404), ("GET", "/", 404)
        ]:  # fmt: skip
            assert raw(path, method, target)[0] == code
        with pytest.raises(Unreachable, match="does not know 'nothing'"):
            ask(path, "nothing")

    with_server(path, client)


def test_wrong_parameters_are_the_askers_fault(path: Path) -> None:
    def client() -> None:
        bodies = (b"{}", b'{"epoch": "soon"}', b"[1]", b"3", b'{"epoch"', b"\xff\xfe", b'{"epoch": null}', b'"epoch"')
        for body in bodies:
            code, answer = raw(path, "POST", "/v1/echo", body, **{"Content-Type": "application/json"})
            assert code == 400 and json.loads(answer)["exit_code"] == 2, body
        with pytest.raises(Answered, match="wrong parameters") as answered:
            wish(path, "echo", epoch="soon")
        assert answered.value.exit_code == 2
        assert raw(path, "POST", "/v1/echo", b"x" * (65 << 10))[0] == 413
        assert raw(path, "POST", "/v1/echo", b" " * (60 << 10) + b'{"epoch": 1}')[0] == 200
        with pytest.raises(CkptdError):
            wish(path, "echo", epoch="9" * (65 << 10))
        assert ask(path, "status") == {"role": "test"}

    with_server(path, client)


def test_what_a_killed_daemon_left_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(Unreachable, match="no daemon answers"):
        ask(path, "status")

    def client() -> None:
        assert ask(path, "status") == {"role": "test"}

    with_server(path, client)


def test_a_living_daemon_keeps_its_socket(path: Path) -> None:
    async def main() -> None:
        first = server(path)
        await first.start()
        with pytest.raises(ConfigError, match="another daemon answers"):
            await server(path).start()
        assert (await asyncio.to_thread(ask, path, "status"))["role"] == "test"
        await first.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")

    async def main() -> None:
        with pytest.raises(ConfigError, match="control socket"):
            await server(tmp_path / "file" / "test.sock").start()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_wish_that_takes_too_long(path: Path) -> None:
    def client() -> None:
        with pytest.raises(Unreachable, match="did not answer within"):
            wish(path, "never", timeout=0.2)
        assert ask(path, "status") == {"role": "test"}

    with_server(path, client)


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{]x"])
def test_whatever_else_answers_there_is_no_daemon(path: Path, answer: bytes) -> None:
    path.parent.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def other() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(4096)
            sock.sendall(answer)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        with pytest.raises(Unreachable):
            ask(path, "status")
    finally:
        thread.join(20)
        listener.close()
