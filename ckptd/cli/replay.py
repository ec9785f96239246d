"""`ckptd replay`: recorded epochs through the receiving machine once more, each proved by its digest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from cyclopts import Parameter

from ckptd.cli.common import Json, emit
from ckptd.errors import VerifyFailed

__all__ = ["replay"]


def replay(
    source: Annotated[Path, Parameter(help="A recording, or a guest's replica directory that no daemon has open.")],
    /,
    *,
    as_json: Json = False,
) -> int:
    """Replay recorded epochs and check every digest; names the first that differs, with exit code 7."""
    from rich.console import Console

    from ckptd.replica.replay import replay as replayed

    first = last = count = 0
    digest, reason = "", ""
    with _recording(source) as file, Console(stderr=True).status("replaying") as shown:
        for one in replayed(file):
            if not one.ok:
                reason = one.reason
                break
            first, last, count, digest = first or one.epoch, one.epoch, count + 1, one.digest.hex()
            shown.update(f"replaying: epoch {one.epoch}")
    differs = {"epoch": one.epoch, "reason": reason} if reason else None
    report = {
        "source": str(source), "ok": not reason, "epochs": count, "first": first, "last": last, "digest": digest,
        "differs": differs,
    }  # fmt: skip
    emit(report, as_json, _said)
    return VerifyFailed.exit_code if reason else 0


@contextmanager
def _recording(source: Path) -> Iterator[Path]:
    """The file itself, or a recording made of the directory, for as long as the block runs."""
    if not source.is_dir():
        yield source
        return
    from ckptd.replica.recording import export

    with TemporaryDirectory(prefix="ckptd-replay-") as place:
        yield export(source, Path(place) / "recording").path


def _said(report: dict[str, Any]) -> str:
    differs = report["differs"]
    if differs is not None:
        return f"epoch {differs['epoch']} DIFFERS after {report['epochs']} that do not: {differs['reason']}"
    return (
        f"{report['epochs']} epochs, {report['first']} to {report['last']}, each with the digest of its COMMIT\n"
        f"digest {report['digest']}"
    )
