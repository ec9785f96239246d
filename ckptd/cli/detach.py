"""`ckptd detach`: end the protection of a guest, which is left running."""

from __future__ import annotations

from typing import Any

from ckptd.cli.common import Json, emit
from ckptd.cli.daemons import Config, Socket, find_daemon

__all__ = ["detach"]


def detach(*, config: Config = None, socket: Socket = None, as_json: Json = False) -> None:
    """End the protection of a guest, which is left running; the primary daemon ends. SIGTERM does the same.

    Nothing is left in a QEMU, and its network flows. A sim or kvm guest keeps its output until a daemon is back.
    """
    from ckptd.control.client import wish

    emit(wish(find_daemon(config, socket, "primary"), "detach"), as_json, _said)


def _said(answer: dict[str, Any]) -> str:
    output = "its output flows" if answer["output_flows"] else "its output stays held until a daemon is back"
    return (
        f"guest {answer['guest']} is not protected any more and goes on; {output}\n"
        f"the secondary holds it as of epoch {answer['epoch']}: do not promote that while the guest runs here"
    )
