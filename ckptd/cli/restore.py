"""`ckptd restore`: the image as it was at an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ckptd.cli.common import Json, emit
from ckptd.cli.daemons import Config, GuestName, ReplicaDirectory, Socket, find_daemon

__all__ = ["restore"]


def restore(
    *,
    epoch: Annotated[int, Parameter(help="One that `ckptd history` lists.")],
    out: Annotated[Path, Parameter(help="The directory to write; it must be empty or not be there.")],
    directory: ReplicaDirectory = None,
    config: Config = None,
    socket: Socket = None,
    guest: GuestName = None,
    as_json: Json = False,
) -> None:
    """Write memory, state and held output of an epoch to a directory, checked against its digest."""
    out = out.absolute()
    if directory is None:
        from ckptd.control.client import wish

        answer = wish(find_daemon(config, socket, "secondary"), "restore", guest=guest, epoch=epoch, out=str(out))
    else:
        from ckptd.replica.history import restore as restore_offline

        answer = restore_offline(directory, epoch, out).as_dict()
    emit(answer, as_json, _said)


def _said(answer: dict[str, Any]) -> str:
    return (
        f"epoch {answer['epoch']} of term {answer['term']} is in {answer['out']}\n"
        f"digest {answer['digest']}, as committed"
    )
