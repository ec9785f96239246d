"""`ckptd checkpoint`: an epoch now."""

from __future__ import annotations

from typing import Any

from ckptd.cli.common import Json, emit
from ckptd.cli.daemons import Config, Socket, find_daemon

__all__ = ["checkpoint"]


def checkpoint(*, config: Config = None, socket: Socket = None, as_json: Json = False) -> None:
    """Take a checkpoint now and wait until it is acknowledged."""
    from ckptd.control.client import wish

    emit(wish(find_daemon(config, socket, "primary"), "checkpoint"), as_json, _said)


def _said(answer: dict[str, Any]) -> str:
    return f"epoch {answer['epoch']} is acknowledged: {answer['pages']} pages, digest {answer['digest']}"
