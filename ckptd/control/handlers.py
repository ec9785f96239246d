"""What each daemon's control socket offers: names and parameters on the outside, daemon methods on the inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptd.control.server import Handler
from ckptd.daemon.primary import PrimaryDaemon
from ckptd.daemon.requests import Request
from ckptd.daemon.secondary import SecondaryDaemon

__all__ = ["primary_handlers", "secondary_handlers"]

Handlers = tuple[dict[str, Handler], dict[str, Handler]]


def primary_handlers(daemon: PrimaryDaemon) -> Handlers:
    """Questions and wishes of a primary: status; checkpoint, verify, switchover, detach."""

    async def status(_: Mapping[str, Any]) -> dict[str, Any]:
        return daemon.status()

    def at_next_epoch(kind: Any) -> Handler:
        async def handler(_: Mapping[str, Any]) -> dict[str, Any]:
            request = Request(kind)
            daemon.request(request)
            return await request.answer

        return handler

    async def detach(_: Mapping[str, Any]) -> dict[str, Any]:
        return await daemon.detach()

    wishes = {kind: at_next_epoch(kind) for kind in ("checkpoint", "verify", "switchover")}
    return {"status": status}, {**wishes, "detach": detach}


def secondary_handlers(daemon: SecondaryDaemon) -> Handlers:
    """Questions and wishes of a secondary: status, history; promote, restore, record, discard."""

    async def status(_: Mapping[str, Any]) -> dict[str, Any]:
        return daemon.status()

    async def history(given: Mapping[str, Any]) -> dict[str, Any]:
        return await daemon.history(given.get("guest"))

    async def promote(given: Mapping[str, Any]) -> dict[str, Any]:
        return await daemon.promote(given.get("guest"), force=bool(given.get("force", False)))

    async def restore(given: Mapping[str, Any]) -> dict[str, Any]:
        return await daemon.restore(given.get("guest"), int(given["epoch"]), Path(given["out"]))

    async def record(given: Mapping[str, Any]) -> dict[str, Any]:
        return await daemon.record(given.get("guest"), Path(given["out"]))

    async def discard(given: Mapping[str, Any]) -> dict[str, Any]:
        return await daemon.discard(given.get("guest"))

    wishes: dict[str, Handler] = {"promote": promote, "restore": restore, "record": record, "discard": discard}
    return {"status": status, "history": history}, wishes
