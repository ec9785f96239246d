"""What a running QEMU is, by QMP and /proc alone: its machine, RAM, devices, disks, network and state.

Host addresses come from `info mtree -f` (which guest-physical ranges are which RAM) and `gpa2hva`, and are checked
against /proc/PID/maps. The text of the human monitor is parsed strictly: a line that is not understood is an error.
Nothing in QEMU is changed. Sizes are bytes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints

from ckptd.errors import GuestError
from ckptd.guests.qemu.cmdline import Option, parse
from ckptd.units import PAGE_SIZE

__all__ = [
    "Backend", "Block", "Chardev", "ConfigFile", "Device", "Disk", "Monitor", "Netdev", "Nic", "Survey", "classify",
    "parse_flat_ranges", "parse_network", "parse_ram_blocks", "survey",
]  # fmt: skip

COMMANDS = (
    "announce-self", "blockdev-mirror", "chardev-add", "chardev-change", "migrate", "migrate-incoming", "object-add",
    "xen-save-devices-state",
)  # fmt: skip
CAPABILITIES = ("events", "mapped-ram", "x-ignore-shared")
"""What Survey.commands and Survey.capabilities tell of; other parts of ckptd ask for these."""

_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")
_SPECIAL = ("/dev/vhost-net", "/dev/vhost-vsock", "/dev/vhost-scsi", "/dev/vhost-vdpa", "/dev/vfio/")
_VIDEO = re.compile(r"(?:.*/)?(?:[\w-]+[.-]vram|qxl\.\w+|vmsvga\.fifo)")
_ROM = re.compile(r"/rom@.+|(?:[\w.-]+\.)?bios|isa-bios|pc\.rom|[0-9a-f:.]+/.+\.rom")
_FLASH = re.compile(r"system\.flash\d+")


class Monitor(Protocol):
    """A QMP connection. Both raise GuestError when QEMU answers with an error."""

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any: ...

    async def human(self, line: str) -> str:
        """What the human monitor prints for a line (`human-monitor-command`)."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A memory backend. `block` is the name of its RAM block, empty while nothing uses it.

    `address` is where it begins in QEMU's address space. `file_*` tell what a mapping of it is, from /proc/PID/maps:
    a file or memfd (`file_offset` is where in it the backend begins), all empty for anonymous memory. `problem` says
    why it cannot be protected; `address` is None then.
    """

    id: str
    kind: str
    size: int
    share: bool
    default: bool
    block: str
    page_size: int
    address: int | None
    file_device: str = ""
    file_inode: int = 0
    file_offset: int = 0
    file_path: str = ""
    problem: str | None = None

    @property
    def used(self) -> bool:
        return bool(self.block)


@dataclass(frozen=True, slots=True)
class Block:
    """A RAM block that is no memory backend. `kind`: rom, video, flash (writable) or other."""

    name: str
    size: int
    kind: str


@dataclass(frozen=True, slots=True)
class Netdev:
    """A network backend; `peer` is the NIC (or, on a hub, the NICs) that it serves."""

    id: str
    kind: str
    peer: str
    hub: str
    queues: int
    vhost: bool
    details: str


@dataclass(frozen=True, slots=True)
class Nic:
    """A network card of the guest's, in the order of `info network`."""

    name: str
    model: str
    mac: str


@dataclass(frozen=True, slots=True)
class Chardev:
    label: str
    filename: str


@dataclass(frozen=True, slots=True)
class Disk:
    """A block device as the guest has it; `file` is empty while nothing is inserted."""

    name: str
    qdev: str
    node: str
    file: str
    driver: str
    writable: bool
    removable: bool
    inserted: bool


@dataclass(frozen=True, slots=True)
class Device:
    """What -device or device_add made; `id` is empty where it was given none. `reporting`: free page reporting."""

    id: str
    driver: str
    path: str
    hotplugged: bool
    reporting: bool


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A file that -readconfig named."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Survey:
    """All of it. Tuples and plain values only, so that `as_dict` travels by msgpack."""

    version: str
    package: str
    architecture: str
    machine: str
    accelerator: str
    cpus: int
    pid: int
    argv: tuple[str, ...]
    executable: str
    cwd: str
    config_files: tuple[ConfigFile, ...]
    ram: tuple[Backend, ...]
    blocks: tuple[Block, ...]
    netdevs: tuple[Netdev, ...]
    nics: tuple[Nic, ...]
    chardevs: tuple[Chardev, ...]
    disks: tuple[Disk, ...]
    devices: tuple[Device, ...]
    descriptors: tuple[str, ...]
    confidential: str
    status: str
    migration: str
    blocked: tuple[str, ...]
    jobs: tuple[str, ...]
    commands: tuple[str, ...]
    capabilities: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Survey:
        """Raises GuestError for anything that `as_dict` did not make: the other side sent it."""
        values: dict[str, Any] = {}
        for name, value in raw.items():
            if isinstance(value, list | tuple):
                part = _PARTS.get(name)
                value = tuple(_built(part, item) if part else _text(item) for item in value)
            values[name] = value
        return _built(cls, values)


_PARTS: dict[str, type[Any]] = {
    "config_files": ConfigFile, "ram": Backend, "blocks": Block, "netdevs": Netdev, "nics": Nic,
    "chardevs": Chardev, "disks": Disk, "devices": Device,
}  # fmt: skip
_T = TypeVar("_T")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise GuestError(f"not a survey of a QEMU: {value!r} instead of a text")
    return value


def _built(kind: type[_T], raw: Any) -> _T:
    hints = get_type_hints(kind)
    if not isinstance(raw, Mapping) or set(raw) != {field.name for field in fields(kind)}:  # type: ignore[arg-type]
        raise GuestError(f"not a survey of a QEMU: the fields of {kind.__name__} differ", hint="run one ckptd version")
    for name, value in raw.items():
        hint = hints[name]
        if not isinstance(value, tuple if getattr(hint, "__origin__", None) is tuple else hint):
            raise GuestError(f"not a survey of a QEMU: {kind.__name__}.{name} is {type(value).__name__}")
    return kind(**raw)


# ---------------------------------------------------------------------------------------------- the human monitor

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
            if match[3] == "ram" and found is not None:
                found.append(FlatRange(int(match[1], 16), int(match[2], 16), match[4], int(match[5] or "0", 16)))
    if found is None:
        raise _unread("info mtree -f", text[:200])
    return found


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


# ------------------------------------------------------------------------------------------------------------ /proc


@dataclass(frozen=True, slots=True)
class _Mapping:
    start: int
    end: int
    access: str
    offset: int
    device: str
    inode: int
    path: str


_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+)\s*(.*)")


def _proc(pid: int, name: str) -> str:
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


def _mappings(pid: int) -> list[_Mapping]:
    found = []
    for line in _proc(pid, "maps").splitlines():
        match = _MAP.fullmatch(line)
        if match is None:
            raise GuestError(f"/proc/{pid}/maps is not understood: {line!r}")
        start, end, access, offset, device, inode, path = match.groups()
        found.append(_Mapping(int(start, 16), int(end, 16), access, int(offset, 16), device, int(inode), path))
    return found


def _fit(maps: Sequence[_Mapping], address: int, size: int, share: bool) -> tuple[_Mapping | None, str | None]:
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


def _descriptors(pid: int) -> list[str]:
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


def _threads(pid: int) -> set[int]:
    """Thread ids as the process itself sees them, also in a pid namespace of its own."""
    found = set()
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):  # workers end at any time
            found |= {int(line.split()[-1]) for line in status.read_text().splitlines() if line.startswith("NSpid:")}
    return found


def _config_files(pid: int, options: Iterable[Option]) -> list[ConfigFile]:
    found = []
    for option in options:
        if option.name == "readconfig" and option.value:
            place = f"root{option.value}" if option.value.startswith("/") else f"cwd/{option.value}"
            found.append(ConfigFile(option.value, _proc(pid, place)))
    return found


# ------------------------------------------------------------------------------------------------------- the survey


async def survey(qmp: Monitor, pid: int) -> Survey:
    """Ask everything. Raises GuestError when QEMU's answers, or the process `pid`, do not make sense."""
    try:
        return await _survey(qmp, pid)
    except KeyError as error:
        raise GuestError(f"an answer of QEMU's has no {error}", hint="report it with QEMU's version") from error


async def _survey(qmp: Monitor, pid: int) -> Survey:
    version = await qmp.execute("query-version")
    cpus = await qmp.execute("query-cpus-fast")
    tids = {cpu["thread-id"] for cpu in cpus}
    if not tids <= _threads(pid):
        raise GuestError("that process is not the QEMU that answers at this QMP socket", pid=pid)
    argv = tuple(_proc(pid, "cmdline").split("\0")[:-1])
    if any("\udc80" <= letter <= "\udcff" for word in argv for letter in word):
        raise GuestError("the command line of QEMU is not UTF-8", pid=pid)
    options = parse(argv[1:])
    descriptors = _descriptors(pid)
    machine = {item["name"] for item in await qmp.execute("qom-list", {"path": "/machine"})}

    async def of_machine(name: str) -> str:
        return str(await qmp.execute("qom-get", {"path": "/machine", "property": name})) if name in machine else ""

    disks = [_disk(entry) for entry in await qmp.execute("query-block")]
    fixed = {disk.qdev.rpartition("/")[2] for disk in disks if not disk.writable}
    ram, blocks = await _memory(qmp, pid, (await of_machine("memory-backend")).rpartition("/")[2], fixed)
    netdevs, nics = parse_network(await qmp.human("info network"))
    migrate = await qmp.execute("query-migrate")
    known = {entry["name"] for entry in await qmp.execute("query-commands")}
    able = {entry["capability"] for entry in await qmp.execute("query-migrate-capabilities")}
    numbers = version["qemu"]
    return Survey(
        version=f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}",
        package=version.get("package", ""),
        architecture=(await qmp.execute("query-target"))["arch"],
        machine=(await of_machine("type")).removesuffix("-machine"),
        accelerator=await _accelerator(qmp),
        cpus=len(cpus),
        pid=pid,
        argv=argv,
        executable=_proc(pid, "exe").removesuffix(" (deleted)"),
        cwd=_proc(pid, "cwd"),
        config_files=tuple(_config_files(pid, options)),
        ram=tuple(ram),
        blocks=tuple(blocks),
        netdevs=tuple(_with_vhost(netdevs, options, descriptors)),
        nics=tuple(nics),
        chardevs=tuple(Chardev(entry["label"], entry["filename"]) for entry in await qmp.execute("query-chardev")),
        disks=tuple(disks),
        devices=tuple([device for path in _CONTAINERS for device in await _devices(qmp, path)]),
        descriptors=tuple(descriptors),
        confidential=await of_machine("confidential-guest-support"),
        status=(await qmp.execute("query-status"))["status"],
        migration=migrate.get("status", "none"),
        blocked=tuple(migrate.get("blocked-reasons", ())),
        jobs=tuple(f"{job['type']} {job['id']}" for job in await qmp.execute("query-jobs")),
        commands=tuple(sorted(known.intersection(COMMANDS))),
        capabilities=tuple(sorted(able.intersection(CAPABILITIES))),
    )


async def _accelerator(qmp: Monitor) -> str:
    """ "kvm", "tcg" or "unknown": no QMP command of older versions tells it."""
    if (await qmp.execute("query-kvm"))["enabled"]:
        return "kvm"
    return "tcg" if "TB count" in await qmp.human("info jit") else "unknown"


async def _memory(qmp: Monitor, pid: int, default: str, fixed: set[str]) -> tuple[list[Backend], list[Block]]:
    kinds = {item["name"]: item["type"] for item in await qmp.execute("qom-list", {"path": "/objects"})}
    ranges = parse_flat_ranges(await qmp.human("info mtree -f"))
    blocks = parse_ram_blocks(await qmp.human("info ramblock"))
    maps = _mappings(pid)
    found: list[Backend] = []
    taken: set[str] = set()
    idle: Counter[int] = Counter()
    for entry in sorted(await qmp.execute("query-memdev"), key=lambda entry: str(entry.get("id", ""))):
        name, size, share = str(entry.get("id", "")), int(entry["size"]), bool(entry["share"])
        kind = kinds.get(name, "").removeprefix("child<").removesuffix(">")
        # devices that own their backend's block (ivshmem) put their address before its name
        block = next((b for b in blocks if b[0] in (name, f"/objects/{name}") or b[0].endswith(f"/{name}")), None)
        if block is None or not name:
            idle[size] += 1
            found.append(Backend(name, kind, size, share, False, "", PAGE_SIZE, None))
            continue
        taken.add(block[0])
        backend = Backend(name, kind, size, share, name == default, block[0], block[1], None)
        found.append(await _located(qmp, backend, ranges, maps))
    others = []
    for name, _, size in blocks:
        if not name and idle[size]:
            idle[size] -= 1  # a backend that nothing uses
        elif name not in taken:
            others.append(Block(name or "(unnamed)", size, classify(name, fixed)))
    return found, others


async def _located(qmp: Monitor, backend: Backend, ranges: list[FlatRange], maps: Sequence[_Mapping]) -> Backend:
    """The backend with its address and file, or with the problem that it has."""
    mine = [part for part in ranges if part.name in (backend.id, backend.block)]
    if not mine:
        return replace(backend, problem="the guest has it nowhere in its address space, so its host address is unknown")
    addresses = set()
    for part in {mine[0], mine[-1], max(mine, key=lambda part: part.end - part.start)}:
        answer = await qmp.human(f"gpa2hva {part.start:#x}")
        match = _HVA.fullmatch(answer.strip())
        if match is None or int(match[1], 16) != part.start or match[2] != part.name:
            raise _unread(f"gpa2hva {part.start:#x}", answer)
        addresses.add(int(match[3], 16) - part.offset)
    if len(addresses) != 1:
        return replace(backend, problem=f"its ranges are not one: {', '.join(map(hex, sorted(addresses)))}")
    address = addresses.pop()
    first, problem = _fit(maps, address, backend.size, backend.share)
    if first is None or problem:
        return replace(backend, problem=problem)
    if not first.inode:
        return replace(backend, address=address)
    return replace(
        backend, address=address, file_device=first.device, file_inode=first.inode,
        file_offset=first.offset + address - first.start, file_path=first.path,
    )  # fmt: skip


def _disk(entry: Mapping[str, Any]) -> Disk:
    medium: Mapping[str, Any] = entry.get("inserted") or {}
    qdev, node = entry.get("qdev", ""), medium.get("node-name", "")
    return Disk(
        name=entry["device"] or qdev or node,
        qdev=qdev,
        node=node,
        file=medium.get("file", ""),
        driver=medium.get("drv", ""),
        writable=not medium.get("ro", True),
        removable=entry["removable"],
        inserted=bool(medium),
    )


def _with_vhost(netdevs: Sequence[Netdev], options: Iterable[Option], descriptors: Sequence[str]) -> list[Netdev]:
    """The kernel's vhost by what is open: QEMU falls back silently, and only its own arguments tell which netdev."""
    if "/dev/vhost-net" not in descriptors:
        return list(netdevs)
    asked = set()
    for option in options:
        pairs = option.pairs if option.name in ("netdev", "net", "nic") else {}
        if pairs.get("vhost") in ("on", True) or pairs.get("vhostforce") in ("on", True) or "vhostfd" in pairs:
            asked.add(str(pairs.get("id", "")))
    sure = asked and asked <= {netdev.id for netdev in netdevs}
    return [
        replace(netdev, vhost=netdev.id in asked if sure else netdev.kind in ("tap", "bridge")) for netdev in netdevs
    ]


async def _devices(qmp: Monitor, container: str) -> list[Device]:
    found = []
    for item in await qmp.execute("qom-list", {"path": container}):
        if not item["type"].startswith("child<"):
            continue
        path, driver = f"{container}/{item['name']}", item["type"].removeprefix("child<").removesuffix(">")
        properties = {entry["name"] for entry in await qmp.execute("qom-list", {"path": path})}
        told = {
            name: bool(name in properties and await qmp.execute("qom-get", {"path": path, "property": name}))
            for name in ("hotplugged", "free-page-reporting")
        }
        name = "" if container.endswith("-anon") else item["name"]
        found.append(Device(name, driver, path, told["hotplugged"], told["free-page-reporting"]))
    return found
