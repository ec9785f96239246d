"""`ckptd switchover`: move a guest to its secondary on purpose."""

from __future__ import annotations

from typing import Any

from ckptd.cli.common import Json, emit
from ckptd.cli.daemons import Config, Socket, find_daemon

__all__ = ["switchover"]


def switchover(*, config: Config = None, socket: Socket = None, as_json: Json = False) -> int:
    """Move a protected guest to its secondary, on purpose and without loss; the primary daemon then ends."""
    from ckptd.control.client import wish
    from ckptd.errors import VerifyFailed

    answer = wish(find_daemon(config, socket, "primary"), "switchover")
    emit(answer, as_json, _said)
    return 0 if answer["digest_equal"] else VerifyFailed.exit_code


def _said(answer: dict[str, Any]) -> str:
    equal = "equal to ours" if answer["digest_equal"] else "NOT equal to ours"
    return (
        f"the guest runs on the secondary from epoch {answer['epoch']} on, in term {answer['term']}\n"
        f"downtime {answer['downtime_ms']:.1f} ms, {answer['pages']} pages in the last epoch"
        f" after {answer['iterations']} precopy iterations\n"
        f"digest {answer['digest']} there, {equal}"
    )
