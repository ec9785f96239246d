"""Asks a running QEMU what it is, by QMP and /proc alone; nothing in it is changed.

Host addresses come from `info mtree -f` (which guest-physical ranges are which RAM) and `gpa2hva`, and are checked
against /proc/PID/maps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ckptd.errors import GuestError
from ckptd.guests.qemu.cmdline import Option, parse
from ckptd.guests.qemu.hmp import (
    FlatRange,
    classify,
    firmware_ranges,
    host_address,
    parse_flat_ranges,
    parse_network,
    parse_ram_blocks,
)
from ckptd.guests.qemu.proc import Mapped, config_files, descriptors, fit, mappings, read_proc, threads
from ckptd.guests.qemu.survey import ROM, Backend, Block, Chardev, Device, Disk, Netdev, Survey
from ckptd.units import PAGE_SIZE

__all__ = ["CAPABILITIES", "COMMANDS", "Monitor", "survey"]

COMMANDS: tuple[str, ...] = (
    "announce-self", "blockdev-mirror", "chardev-add", "chardev-change", "migrate", "migrate-incoming", "object-add",
    "xen-save-devices-state",
)  # fmt: skip
CAPABILITIES = ("events", "mapped-ram", "x-ignore-shared")
"""What Survey.commands and Survey.capabilities tell of; other parts of ckptd ask for these."""

_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")


class Monitor(Protocol):
    """A QMP connection. Both raise GuestError when QEMU answers with an error."""

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any: ...

    async def human(self, line: str) -> str:
        """What the human monitor prints for a line (`human-monitor-command`)."""


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
    if not tids <= threads(pid):
        raise GuestError("that process is not the QEMU that answers at this QMP socket", pid=pid)
    argv = tuple(read_proc(pid, "cmdline").split("\0")[:-1])
    if any("\udc80" <= letter <= "\udcff" for word in argv for letter in word):
        raise GuestError("the command line of QEMU is not UTF-8", pid=pid)
    options = parse(argv[1:])
    opened = descriptors(pid)
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
        executable=read_proc(pid, "exe").removesuffix(" (deleted)"),
        cwd=read_proc(pid, "cwd"),
        config_files=tuple(config_files(pid, options)),
        ram=tuple(ram),
        blocks=tuple(blocks),
        netdevs=tuple(_with_vhost(netdevs, options, opened)),
        nics=tuple(nics),
        chardevs=tuple(Chardev(entry["label"], entry["filename"]) for entry in await qmp.execute("query-chardev")),
        disks=tuple(disks),
        devices=tuple([device for path in _CONTAINERS for device in await _devices(qmp, path)]),
        descriptors=tuple(opened),
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
    text = await qmp.human("info mtree -f")
    ranges = parse_flat_ranges(text)
    blocks = parse_ram_blocks(await qmp.human("info ramblock"))
    maps = mappings(pid)
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
    for part in firmware_ranges(text):
        size = part.end - part.start + 1
        page_size = next((page for name, page, whole in blocks if (name, whole) == (part.name, size)), 0)
        if page_size:
            bare = Backend(part.name, ROM, size, False, False, part.name, page_size, None, gpa=part.start)
            found.append(await _located(qmp, bare, [part], maps))
    others = []
    for name, _, size in blocks:
        if not name and idle[size]:
            idle[size] -= 1  # a backend that nothing uses
        elif name not in taken:
            others.append(Block(name or "(unnamed)", size, classify(name, fixed)))
    return found, others


async def _located(qmp: Monitor, backend: Backend, ranges: list[FlatRange], maps: Sequence[Mapped]) -> Backend:
    """The backend with its address and file, or with the problem that it has."""
    mine = [part for part in ranges if part.name in (backend.id, backend.block)]
    if not mine:
        return replace(backend, problem="the guest has it nowhere in its address space, so its host address is unknown")
    addresses = set()
    for part in {mine[0], mine[-1], max(mine, key=lambda part: part.end - part.start)}:
        answer = await qmp.human(f"gpa2hva {part.start:#x}")
        addresses.add(host_address(answer, part) - part.offset)
    if len(addresses) != 1:
        return replace(backend, problem=f"its ranges are not one: {', '.join(map(hex, sorted(addresses)))}")
    address = addresses.pop()
    first, problem = fit(maps, address, backend.size, backend.share)
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
