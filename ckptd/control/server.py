"""Serves a daemon's methods on its unix socket.

    GET  /v1/status          and the other questions
    POST /v1/checkpoint      and the other wishes; parameters as a JSON object

Errors are {"error", "message", "hint", "where", "exit_code"} with status 400 (parameters), 409 (this state does not
allow it) or 500. The socket is only for its owner (mode 0600).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from ckptd.errors import CkptdError, ConfigError, Fenced, Inconsistent, StateError

__all__ = ["ControlServer", "Handler"]

Handler = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Gets the parameters, returns the answer; CkptdErrors become error answers, KeyError and TypeError mean wrong
parameters.
"""

_MAX_BODY = 64 << 10


class ControlServer:
    """One daemon's socket. `questions` are GET, `wishes` are POST."""

    def __init__(self, path: Path, questions: Mapping[str, Handler], wishes: Mapping[str, Handler]) -> None:
        self._path = path
        app = web.Application(client_max_size=_MAX_BODY)
        app.add_routes([web.get(f"/v1/{name}", _answer(handler)) for name, handler in questions.items()])
        app.add_routes([web.post(f"/v1/{name}", _answer(handler)) for name, handler in wishes.items()])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def start(self) -> None:
        """Bind the socket. Raises ConfigError when another daemon answers there."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the control socket's directory: {error.strerror}", key="runtime.socket", file=self._path
            ) from error
        if _answers(self._path):
            raise ConfigError(
                f"another daemon answers on {self._path}", hint="end it, or give this one another runtime.dir"
            )
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot remove the control socket that another daemon left: {error.strerror}", key="runtime.socket",
                file=self._path,
            ) from error  # fmt: skip
        await self._runner.setup()
        old = os.umask(0o177)
        try:
            await web.UnixSite(self._runner, str(self._path)).start()
        except OSError as error:
            raise ConfigError(
                f"cannot make the control socket: {error.strerror}", key="runtime.socket", file=self._path
            ) from error
        finally:
            os.umask(old)

    async def stop(self) -> None:
        await self._runner.cleanup()
        with suppress(OSError):
            self._path.unlink()


def _answer(handler: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def respond(request: web.Request) -> web.Response:
        try:
            parameters = await request.json() if request.can_read_body else dict(request.query)
            if not isinstance(parameters, dict):
                raise TypeError("the parameters must be a JSON object")
            return web.json_response(await handler(parameters))
        except CkptdError as error:
            status = 409 if isinstance(error, StateError | Inconsistent | Fenced) else 500
            return web.json_response({**error.as_dict(), "exit_code": error.exit_code}, status=status)
        except (KeyError, TypeError, ValueError) as error:
            body = CkptdError(f"wrong parameters: {error!r}").as_dict()
            return web.json_response({**body, "error": "BadRequest", "exit_code": 2}, status=400)

    return respond


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
