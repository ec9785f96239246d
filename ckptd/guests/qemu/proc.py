"""What /proc says of QEMU's process: its mappings, descriptors, threads and files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import GuestError
from ckptd.guests.qemu.cmdline import Option
from ckptd.guests.qemu.survey import ConfigFile

__all__ = ["Mapped", "config_files", "descriptors", "fit", "mappings", "read_proc", "threads"]

_SPECIAL = ("/dev/vhost-net", "/dev/vhost-vsock", "/dev/vhost-scsi", "/dev/vhost-vdpa", "/dev/vfio/")


@dataclass(frozen=True, slots=True)
class Mapped:
    start: int
    end: int
    access: str
    offset: int
    device: str
    inode: int
    path: str


_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+)\s*(.*)")


def read_proc(pid: int, name: str) -> str:
    """A text file of /proc/PID, or where a link of it leads."""
    path = f"/proc/{pid}/{name}"
    try:
        if os.path.islink(path):
            return os.readlink(path)
        return Path(path).read_bytes().decode(errors="surrogateescape")
    except PermissionError as error:
        raise GuestError(
            f"{path} may not be read", hint="run ckptd as root, or as QEMU's user with CAP_SYS_PTRACE", pid=pid
        ) from error
    except OSError as error:
        raise GuestError(f"the process of QEMU is gone: {error}", pid=pid) from error


def mappings(pid: int) -> list[Mapped]:
    found = []
    for line in read_proc(pid, "maps").splitlines():
        match = _MAP.fullmatch(line)
        if match is None:
            raise GuestError(f"/proc/{pid}/maps is not understood: {line!r}")
        start, end, access, offset, device, inode, path = match.groups()
        found.append(Mapped(int(start, 16), int(end, 16), access, int(offset, 16), device, int(inode), path))
    return found


def fit(maps: Sequence[Mapped], address: int, size: int, share: bool) -> tuple[Mapped | None, str | None]:
    """The mapping in which the backend begins, and why it does not fit if it does not."""
    inside = [part for part in maps if part.start < address + size and part.end > address]
    if not inside or inside[0].start > address:
        return None, f"no memory is mapped at {address:#x}"
    first, at = inside[0], address
    file = (first.device, first.inode, first.offset - first.start)
    for part in inside:
        if part.start > at:
            return None, f"{part.start - at} bytes at {at:#x} are not mapped"
        if part.access[:2] != "rw" or (part.access[3] == "s") != share:
            return None, f"the mapping at {part.start:#x} is {part.access}, not {'shared' if share else 'private'} rw"
        if share and (part.device, part.inode, part.offset - part.start) != file:
            return None, f"the mapping at {part.start:#x} is of another file ({part.path})"
        at = part.end
    return (first, None) if at >= address + size else (None, f"it is mapped to {at:#x} only")


def descriptors(pid: int) -> list[str]:
    """The special files that QEMU has open, by name."""
    found = set()
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            try:
                name = os.readlink(f"/proc/{pid}/fd/{number}")
            except FileNotFoundError:
                continue
            if name.startswith(_SPECIAL):
                found.add(name)
    except OSError as error:
        raise GuestError(
            f"/proc/{pid}/fd cannot be read: {error}", hint="run ckptd as root, or with CAP_SYS_PTRACE", pid=pid
        ) from error
    return sorted(found)


def threads(pid: int) -> set[int]:
    """Thread ids as the process itself sees them, also in a pid namespace of its own."""
    found = set()
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):  # workers end at any time
            found |= {int(line.split()[-1]) for line in status.read_text().splitlines() if line.startswith("NSpid:")}
    return found


def config_files(pid: int, options: Iterable[Option]) -> list[ConfigFile]:
    found = []
    for option in options:
        if option.name == "readconfig" and option.value:
            place = f"root{option.value}" if option.value.startswith("/") else f"cwd/{option.value}"
            found.append(ConfigFile(option.value, read_proc(pid, place)))
    return found
