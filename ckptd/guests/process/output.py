"""The file that released output goes to: all of it or none."""

from __future__ import annotations

import os
from pathlib import Path

from ckptd.errors import GuestError

__all__ = ["append"]


def append(path: Path, data: bytes | memoryview) -> None:
    """One write at the end, taken back when the file system has no room for all of it. Raises GuestError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            before = os.fstat(fd).st_size
            done = os.write(fd, data)
            if done < len(data):
                os.ftruncate(fd, before)
                raise OSError(f"{done} of {len(data)} bytes were written")
        finally:
            os.close(fd)
    except OSError as error:
        raise GuestError(f"output cannot be written: {error}", hint="it stays in the gate", file=str(path)) from error
