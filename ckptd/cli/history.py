"""`ckptd history`: the past that a secondary still has."""

from __future__ import annotations

import time
from typing import Any

from rich.table import Table

from ckptd.cli.common import Json, emit
from ckptd.cli.daemons import Config, GuestName, Socket, find_daemon
from ckptd.units import format_size

__all__ = ["history"]


def history(*, config: Config = None, socket: Socket = None, guest: GuestName = None, as_json: Json = False) -> None:
    """List the committed epochs that can be restored, oldest first; `--json` has the digests in full."""
    from ckptd.control.client import ask

    question = "history" if guest is None else f"history?guest={guest}"
    emit(ask(find_daemon(config, socket, "secondary"), question), as_json, _shown)


def _shown(answer: dict[str, Any]) -> Table | str:
    if not answer["epochs"]:
        return f"nothing of guest {answer['guest']} can be restored"
    table = Table("epoch", "term", "committed", "pages", "size", "digest", title=f"guest {answer['guest']}")
    for index, column in enumerate(table.columns):
        column.no_wrap, column.justify = True, "left" if index in (2, 5) else "right"
    for one in answer["epochs"]:
        table.add_row(
            str(one["epoch"]), str(one["term"]), _at(one["time"]), str(one["pages"]), format_size(one["bytes"]),
            one.get("damage") or one["digest"][:16],
        )  # fmt: skip
    return table


def _at(ns: int) -> str:
    """To the millisecond; with its date when that is another day."""
    at, now = time.localtime(ns / 1e9), time.localtime()
    form = "%H:%M:%S" if at[:3] == now[:3] else "%Y-%m-%d %H:%M:%S"
    return f"{time.strftime(form, at)}.{ns // 10**6 % 1000:03}"
