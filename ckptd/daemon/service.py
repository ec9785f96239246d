"""What both daemons do as processes: signals, reloading, the collector, the log."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import structlog
from pydantic import BaseModel

from ckptd.config import Loaded, changed_keys
from ckptd.daemon.logs import set_up_log
from ckptd.errors import ConfigError

__all__ = ["Daemon", "serve"]

Config = TypeVar("Config", bound=BaseModel)
_SWITCH = 0.001  # seconds; a thread that hashes must not keep the loop from an acknowledgement for the default 5 ms


class Daemon(Protocol):
    async def run(self) -> None: ...
    def stop(self) -> None: ...


async def serve(
    daemon: Daemon,
    loaded: Loaded[Config],
    load: Callable[[], Loaded[Config]],
    apply: Callable[[Config], None],
    start: Callable[[], Awaitable[None]],
    stop: Callable[[], Awaitable[None]],
) -> None:
    """Run a daemon until it ends or SIGTERM or SIGINT stops it; SIGHUP reloads.

    `start` and `stop` are its control socket's.
    """
    loop = asyncio.get_running_loop()
    log = structlog.get_logger()
    current = loaded.config

    def reload() -> None:
        nonlocal current
        try:
            new = load().config
        except ConfigError as error:
            log.error("the changed configuration is wrong; the old one stays", reason=str(error))
            return
        changed, restart = changed_keys(current, new)
        if restart:
            log.warning("these keys change only with a restart", keys=", ".join(restart))
        current = _with(current, new, changed)
        runtime = current.runtime  # type: ignore[attr-defined]
        set_up_log(runtime.log_level, runtime.log_format)
        apply(current)
        log.info("configuration reloaded", changed=", ".join(changed) or "nothing")

    loop.add_signal_handler(signal.SIGHUP, reload)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop)
    sys.setswitchinterval(_SWITCH)
    await start()
    gc.collect()
    gc.freeze()
    try:
        await daemon.run()
    finally:
        await stop()


def _with(old: Config, new: Config, keys: list[str]) -> Config:
    """The old configuration with these keys ("section.key") of the new one."""
    sections: dict[str, dict[str, object]] = {}
    for key in keys:
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = getattr(getattr(new, section), name)
    return old.model_copy(
        update={section: getattr(old, section).model_copy(update=values) for section, values in sections.items()}
    )
