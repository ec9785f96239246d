"""`ckptd primary`: run the primary daemon."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ckptd.cli.common import run_async

__all__ = ["primary"]


def primary(
    *,
    config: Annotated[Path, Parameter(name=("-c", "--config"))],
    term: int | None = None,
    replace: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Protect a guest until SIGTERM; the guest is left running.

    Parameters
    ----------
    config
        The primary's file; `ckptd sample-config primary` prints one.
    term
        Raise the term to this number, for a primary that takes over from a promoted one.
    replace
        Give up what the secondary holds of another run of this guest.
    """
    run_async(_primary(config, term, replace))


async def _primary(path: Path, term: int | None, replace: bool) -> None:
    from ckptd.config import load_primary
    from ckptd.control.handlers import primary_handlers
    from ckptd.control.server import ControlServer
    from ckptd.daemon.logs import set_up_log
    from ckptd.daemon.primary import PrimaryDaemon
    from ckptd.daemon.service import serve
    from ckptd.guests.base import guest_kind

    loaded = load_primary(path, os.environ)
    settings = loaded.config
    set_up_log(settings.runtime.log_level, settings.runtime.log_format)
    guest = guest_kind(settings.guest.kind).make_guest(settings.guest, settings.runtime.dir)
    daemon = PrimaryDaemon(settings, guest, term=term or 1, replace=replace)
    control = ControlServer(settings.runtime.socket, *primary_handlers(daemon))
    await serve(daemon, loaded, lambda: load_primary(path, os.environ), daemon.reload, control.start, control.stop)
