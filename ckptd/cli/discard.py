"""`ckptd discard`: give up what a secondary holds of a guest."""

from __future__ import annotations

from typing import Any

from ckptd.cli.common import Json, emit
from ckptd.cli.daemons import Config, GuestName, Socket, find_daemon

__all__ = ["discard"]


def discard(*, config: Config = None, socket: Socket = None, guest: GuestName = None, as_json: Json = False) -> None:
    """Give up the replica of a guest, its history too; refused while it is in use."""
    from ckptd.control.client import wish

    emit(wish(find_daemon(config, socket, "secondary"), "discard", guest=guest), as_json, _said)


def _said(answer: dict[str, Any]) -> str:
    return f"what was held of guest {answer['guest']}, up to epoch {answer['discarded_epoch']}, is gone"
