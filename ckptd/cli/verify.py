"""`ckptd verify`: are both ends the same, byte by byte?"""

from __future__ import annotations

from typing import Any

from ckptd.cli.common import Json, emit
from ckptd.cli.daemons import Config, Socket, find_daemon

__all__ = ["verify"]


def verify(*, config: Config = None, socket: Socket = None, as_json: Json = False) -> None:
    """Hash all of the guest's memory and all of the replica's image at one epoch, and compare.

    Exit code 7 says that they differ. The guest is paused while its side is hashed.
    """
    from ckptd.control.client import wish

    emit(wish(find_daemon(config, socket, "primary"), "verify"), as_json, _said)


def _said(answer: dict[str, Any]) -> str:
    return f"both ends are equal at epoch {answer['epoch']}: digest {answer['digest']} ({answer['took_ms']:.0f} ms)"
