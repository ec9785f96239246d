"""Asks a daemon over its control socket, for the commands."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from ckptd.errors import CkptdError, Unreachable

__all__ = ["Answered", "ask", "wish"]


class Answered(CkptdError):
    """The daemon answered with an error; it is shown as if it had happened here."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(str(answer.get("message")), hint=answer.get("hint"), **(answer.get("where") or {}))
        self.exit_code = int(answer.get("exit_code", 1))
        self._name = str(answer.get("error"))

    def as_dict(self) -> dict[str, object]:
        return {**super().as_dict(), "error": self._name}


def ask(path: Path, question: str, timeout: float = 10.0) -> dict[str, Any]:
    """GET /v1/<question>. Raises Unreachable or what the daemon answered."""
    return _call(path, "GET", question, None, timeout)


def wish(path: Path, name: str, timeout: float = 600.0, **parameters: object) -> dict[str, Any]:
    """POST /v1/<name>. Raises Unreachable or what the daemon answered."""
    given = {key: value for key, value in parameters.items() if value is not None}
    return _call(path, "POST", name, json.dumps(given).encode(), timeout)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _call(path: Path, method: str, name: str, body: bytes | None, timeout: float) -> dict[str, Any]:
    connection = _Connection(path, timeout)
    try:
        connection.request(method, f"/v1/{name}", body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        answer = response.read()
    except TimeoutError as error:
        raise Unreachable(f"the daemon did not answer within {timeout:g} s", socket=path) from error
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(
            f"no daemon answers: {getattr(error, 'strerror', None) or error}", socket=path,
            hint="is it running, and is this its runtime.socket? say -c FILE or --socket PATH",
        ) from error  # fmt: skip
    finally:
        connection.close()
    if response.status == 404:
        raise Unreachable(f"this daemon does not know {name!r}", socket=path, hint="ask the other side's daemon")
    try:
        parsed = json.loads(answer)
    except ValueError as error:
        raise Unreachable(f"the daemon answered nonsense to {name!r}", socket=path) from error
    if response.status != 200:
        raise Answered(parsed)
    return dict(parsed)
