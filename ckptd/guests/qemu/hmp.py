"""What the human monitor prints, read strictly: a line that is not understood is an error. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ckptd.errors import GuestError
from ckptd.guests.qemu.survey import Netdev, Nic

__all__ = [
    "FlatRange", "classify", "firmware_ranges", "host_address", "parse_flat_ranges", "parse_network",
    "parse_ram_blocks",
]  # fmt: skip

_VIDEO = re.compile(r"(?:.*/)?(?:[\w-]+[.-]vram|qxl\.\w+|vmsvga\.fifo)")
_ROM = re.compile(r"/rom@.+|(?:[\w.-]+\.)?bios|isa-bios|pc\.rom|[0-9a-f:.]+/.+\.rom")
_FIRMWARE = re.compile(r"(?:[\w.-]+\.)?bios")
_FLASH = re.compile(r"system\.flash\d+")
_RANGE = re.compile(r"  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([\w/+-]+)\): (.*?)(?: @([0-9a-f]{16}))?(?: KVM)?")
_BLOCK = re.compile(r"\s*(.*?)\s+(\d+) ([KMG])iB((?:\s+0x[0-9a-f]+){3,4})(?:\s+(?:ro|rw))?\s*")
_CLIENT = re.compile(r"(.+?): index=(\d+),type=([\w-]+),(.*)")
_HVA = re.compile(r"Host virtual address for (0x[0-9a-f]+) \((.+)\) is (0x[0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class FlatRange:
    """Guest-physical [start, end] that is RAM `name` from `offset` on."""

    start: int
    end: int
    name: str
    offset: int


def parse_flat_ranges(text: str) -> list[FlatRange]:
    """The writable RAM of address space "memory" in the output of `info mtree -f`."""
    return _flat_ranges(text, "ram")


def firmware_ranges(text: str) -> list[FlatRange]:
    """Of the same: where the machine's firmware is, from its beginning on; each once, where it ends last."""
    found = [part for part in _flat_ranges(text, "rom") if _FIRMWARE.fullmatch(part.name) and not part.offset]
    return list({part.name: part for part in sorted(found, key=lambda part: part.end)}.values())


def _flat_ranges(text: str, kind: str) -> list[FlatRange]:
    found: list[FlatRange] | None = None
    inside = False
    for line in text.splitlines():
        if line.startswith("FlatView #") or not line.strip():
            inside = False
        elif line == ' AS "memory", root: system':
            inside, found = True, []
        elif inside and not line.startswith((" AS ", " Root memory region:")):
            match = _RANGE.fullmatch(line)
            if match is None:
                raise _unread("info mtree -f", line)
            if match[3] == kind and found is not None:
                found.append(FlatRange(int(match[1], 16), int(match[2], 16), match[4], int(match[5] or "0", 16)))
    if found is None:
        raise _unread("info mtree -f", text[:200])
    return found


def host_address(text: str, part: FlatRange) -> int:
    """Of `gpa2hva START`: where the beginning of this range is in QEMU's address space. Raises GuestError."""
    match = _HVA.fullmatch(text.strip())
    if match is None or int(match[1], 16) != part.start or match[2] != part.name:
        raise _unread(f"gpa2hva {part.start:#x}", text)
    return int(match[3], 16)


def parse_ram_blocks(text: str) -> list[tuple[str, int, int]]:
    """(name, page size, size) of each RAM block in the output of `info ramblock`; unused backends have no name."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or not lines[0].split()[:4] == ["Block", "Name", "PSize", "Offset"]:
        raise _unread("info ramblock", text[:200])
    found = []
    for line in lines[1:]:
        match = _BLOCK.fullmatch(line)
        if match is None:
            raise _unread("info ramblock", line)
        page = int(match[2]) << {"K": 10, "M": 20, "G": 30}[match[3]]
        found.append((match[1], page, int(match[4].split()[1], 16)))
    return found


def parse_network(text: str) -> tuple[list[Netdev], list[Nic]]:
    """Backends and cards in the output of `info network`. It does not tell vhost=on, so that is False in all."""
    netdevs: dict[str, Netdev] = {}
    nics: dict[str, Nic] = {}
    on_hub: dict[str, list[str]] = {}
    hub = peer = ""
    for line in text.splitlines():
        if not line.strip() or line == "filters:" or line.startswith("  - "):
            continue
        if match := re.fullmatch(r"hub (\d+)", line):
            hub = match[1]
            continue
        below = line.startswith(" \\ ")
        if not below:
            hub = ""
        entry = line.removeprefix(" \\ ")
        if below and hub:
            entry = entry.partition(": ")[2]  # the port's own name
            if not entry:
                continue
        match = _CLIENT.fullmatch(entry)
        if match is None:
            raise _unread("info network", line)
        name, kind, details = match[1], match[3], match[4]
        if kind == "nic":
            pairs = dict(part.partition("=")[::2] for part in details.split(","))
            nics.setdefault(name, Nic(name, pairs.get("model", ""), pairs.get("macaddr", "")))
            peer = name
            if hub:
                on_hub.setdefault(hub, []).append(name)
        else:
            old = netdevs.get(name)
            queues = old.queues + 1 if old else 1
            netdevs[name] = Netdev(name, kind, peer if below and not hub else "", hub, queues, False, details)
    return [
        replace(netdev, peer=",".join(on_hub.get(netdev.hub, ()))) if netdev.hub else netdev
        for netdev in netdevs.values()
    ], list(nics.values())


def classify(name: str, read_only_flash: Iterable[str] = ()) -> str:
    """The kind of a RAM block that is no backend: "rom", "video", "flash" (writable) or "other"."""
    if _FLASH.fullmatch(name):
        return "rom" if name in read_only_flash else "flash"
    return "video" if _VIDEO.fullmatch(name) else "rom" if _ROM.fullmatch(name) else "other"


def _unread(what: str, text: str) -> GuestError:
    return GuestError(
        f"QEMU's answer to `{what}` is not understood: {text!r}",
        hint="report it with the output of `qemu-system-... --version`",
    )
