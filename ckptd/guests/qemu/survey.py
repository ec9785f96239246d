"""Survey: what a running QEMU is, as data that can travel. Who asks for it is in surveyor.py.

Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, get_type_hints

from ckptd.errors import GuestError

__all__ = ["ROM", "Backend", "Block", "Chardev", "ConfigFile", "Device", "Disk", "Netdev", "Nic", "Survey"]


ROM = "rom"


@dataclass(frozen=True, slots=True)
class Backend:
    """A memory backend, or the firmware (`kind` is ROM; `gpa` is where the guest finds it). `block` is the name of its
    RAM block, empty while nothing uses it.

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
    gpa: int = 0
    problem: str | None = None

    @property
    def firmware(self) -> bool:
        return self.kind == ROM

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
