"""`ckptd secondary`: run the secondary daemon."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ckptd.cli.common import run_async

__all__ = ["secondary"]


def secondary(*, config: Annotated[Path, Parameter(name=("-c", "--config"))]) -> None:
    """Hold replicas until SIGTERM.

    Parameters
    ----------
    config
        The secondary's file; `ckptd sample-config secondary` prints one.
    """
    run_async(_secondary(config))


async def _secondary(path: Path) -> None:
    from ckptd.config import load_secondary
    from ckptd.control.handlers import secondary_handlers
    from ckptd.control.server import ControlServer
    from ckptd.daemon.logs import set_up_log
    from ckptd.daemon.secondary import SecondaryDaemon
    from ckptd.daemon.service import serve

    loaded = load_secondary(path, os.environ)
    settings = loaded.config
    set_up_log(settings.runtime.log_level, settings.runtime.log_format)
    daemon = SecondaryDaemon(settings)
    control = ControlServer(settings.runtime.socket, *secondary_handlers(daemon))
    await serve(daemon, loaded, lambda: load_secondary(path, os.environ), daemon.reload, control.start, control.stop)
