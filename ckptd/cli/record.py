"""`ckptd record`: a guest's retained past as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ckptd.cli.common import Json, emit
from ckptd.cli.daemons import Config, GuestName, ReplicaDirectory, Socket, find_daemon
from ckptd.units import format_size

__all__ = ["record"]


def record(
    *,
    out: Annotated[Path, Parameter(help="The file to write; it must not be there.")],
    directory: ReplicaDirectory = None,
    config: Config = None,
    socket: Socket = None,
    guest: GuestName = None,
    as_json: Json = False,
) -> None:
    """Write the retained history of a guest as one recording, which `ckptd replay` reads."""
    out = out.absolute()
    if directory is None:
        from ckptd.control.client import wish

        answer = wish(find_daemon(config, socket, "secondary"), "record", guest=guest, out=str(out))
    else:
        from ckptd.replica.recording import export

        answer = export(directory, out).as_dict()
    emit(answer, as_json, _said)


def _said(answer: dict[str, Any]) -> str:
    size = format_size(answer["bytes"])
    return f"epochs {answer['first']} to {answer['last']} are in {answer['path']}, {size}"
