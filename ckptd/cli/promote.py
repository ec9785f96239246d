"""`ckptd promote`: resume a guest whose primary is gone."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from ckptd.cli.common import Json, emit
from ckptd.cli.daemons import Config, GuestName, Socket, find_daemon

__all__ = ["promote"]


def promote(
    *,
    config: Config = None,
    socket: Socket = None,
    guest: GuestName = None,
    force: Annotated[bool, Parameter(negative=(), help="Even while the primary is connected: it is fenced.")] = False,
    as_json: Json = False,
) -> None:
    """Failover: resume the guest from the replica on this secondary, in a new term."""
    from ckptd.control.client import wish

    emit(wish(find_daemon(config, socket, "secondary"), "promote", guest=guest, force=force), as_json, _said)


def _said(answer: dict[str, Any]) -> str:
    return (
        f"guest {answer['guest']} runs here from epoch {answer['epoch']} on, in term {answer['term']}"
        f" ({answer['promote_ms']:.1f} ms)\ndigest {answer['digest']}"
    )
