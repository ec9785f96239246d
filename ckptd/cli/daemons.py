"""Which daemon a command talks to: by its file, by its socket, or the only one that runs here."""

from __future__ import annotations

import os
import socket as sockets
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ckptd.config import Role
from ckptd.errors import ConfigError, StateError, Unreachable

__all__ = ["Config", "GuestName", "ReplicaDirectory", "Socket", "find_daemon"]

Config = Annotated[Path | None, Parameter(name=("-c", "--config"), help="The daemon's configuration file.")]
Socket = Annotated[Path | None, Parameter(help="The daemon's control socket.")]
GuestName = Annotated[str | None, Parameter(name="--guest", help="Which guest, where the secondary has several.")]
ReplicaDirectory = Annotated[
    Path | None, Parameter(name="--dir", help="A guest's replica directory, while no daemon has it open.")
]

RUN = Path("/run/ckptd")


def find_daemon(config: Path | None, socket: Path | None, role: Role | None = None, *, run: Path = RUN) -> Path:
    """The control socket to talk to.

    `role` is the one that understands the command; None takes either. Without a file or a socket, looks under `run`.
    Raises ConfigError (the file is wrong or of the other role), StateError (several daemons), Unreachable (none).
    """
    if config is not None and socket is not None:
        raise ConfigError("-c and --socket both name a daemon", hint="say one of them")
    if socket is not None:
        return socket
    if config is not None:
        return _of_file(config, role)
    found = sorted(path for name in _names(role) for path in run.glob(f"*/{name}"))
    if len(found) > 1:  # what a killed daemon left does not count beside one that answers
        found = [path for path in found if _answers(path)] or found
    who = role or "daemon"
    if not found:
        raise Unreachable(f"no {who} has a control socket under {run}", hint="say -c FILE or --socket PATH")
    if len(found) > 1:
        raise StateError(
            f"several daemons are here: {', '.join(str(path) for path in found)}", hint="say -c FILE or --socket PATH"
        )
    return found[0]


def _of_file(config: Path, role: Role | None) -> Path:
    from ckptd.config import detect_role, load_primary, load_secondary

    found = detect_role(config)
    if role is not None and found != role:
        raise ConfigError(f"this is the file of a {found}; the command is for a {role}", file=config)
    load = load_primary if found == "primary" else load_secondary
    return load(config, os.environ).config.runtime.socket


def _names(role: Role | None) -> list[str]:
    return [f"{one}.sock" for one in ("primary", "secondary") if role in (None, one)]


def _answers(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
