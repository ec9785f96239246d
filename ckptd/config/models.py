"""The sections and keys of both daemons' files, as frozen models. One that is not known is an error.

Knows where a default follows another key (`runtime.dir` the guest's name, the sockets and outputs `runtime.dir`), and
which keys a running daemon can take over. Must never know what the keys do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ckptd.config.values import (
    GIB,
    KIB,
    MIB,
    MINUTE,
    MS,
    SECOND,
    TIB,
    Address,
    Duration,
    FilePath,
    Memory,
    Name,
    Size,
    durations,
    limits,
    parse_address,
    power_of_two,
    sizes,
    write_duration,
    wrong,
)  # fmt: skip
from ckptd.units import PAGE_SIZE

__all__ = [
    "Adaptive", "Checkpoint", "GuestConfig", "GuestEntry", "Listen", "PrimaryConfig", "PrimaryLink", "Replica",
    "Runtime", "SecondaryAddress", "SecondaryConfig", "SecondaryLink", "changed_keys",
]  # fmt: skip

SOCKET_PATH_LIMIT = 107
"""Bytes: sun_path of unix(7), less its closing zero."""

Heartbeat = Annotated[Duration, durations(10 * MS, MINUTE)]
Timeout = Annotated[Duration, durations(20 * MS, 10 * MINUTE)]
Backoff = Annotated[Duration, durations(MS, 10 * MINUTE)]
LinkBuffer = Annotated[Size, sizes(64 * KIB, GIB)]
Words = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
Interval = Annotated[Duration, durations(MS, 10 * MINUTE)]


def _own_files(value: dict[str, Path]) -> dict[str, Path]:
    for label, path in value.items():
        if not label:
            raise wrong("has an empty label", "labels are those of query-chardev: serial0, or an id of your own")
        if twin := next((other for other in value if other != label and value[other] == path), None):
            raise wrong(f"has the file {path} for both {label} and {twin}", "give each chardev a file of its own")
    return value


Chardevs = Annotated[dict[str, FilePath], Field(max_length=64), AfterValidator(_own_files)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Sections that both files have.


class Runtime(_Section):
    """[runtime]: where the daemon keeps its sockets, and what it logs. Without them, `dir` follows the guest's name."""

    dir: FilePath
    socket: FilePath
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(bytes(self.socket)) > SOCKET_PATH_LIMIT:
            raise wrong(f"socket {self.socket} has more than {SOCKET_PATH_LIMIT} bytes, the limit of a socket's path")
        return self


class _Link(_Section):
    heartbeat: Heartbeat = 500 * MS
    timeout: Timeout = 2 * SECOND
    buffer: LinkBuffer = 4 * MIB

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.timeout <= self.heartbeat:
            raise wrong(
                f"timeout ({write_duration(self.timeout)}) must be longer than heartbeat "
                f"({write_duration(self.heartbeat)}), or every quiet link counts as lost"
            )
        return self


# The primary's file.


class _KindKeys(NamedTuple):
    """What some keys of [guest] may be for a kind; the first workload is the default."""

    workloads: tuple[str, ...]
    trackers: tuple[str, ...]
    ring_entries: tuple[int, int]


_KINDS: Mapping[str, _KindKeys] = {
    "sim": _KindKeys(
        ("zipf", "uniform", "sequential", "kv", "idle", "bursts"), ("auto", "bitmap", "ring"), (64, 1 << 20)
    ),
    "kvm": _KindKeys(
        ("random", "counter", "patterns", "kv"), ("auto", "kvm-bitmap", "kvm-manual", "kvm-ring"), (256, 1 << 16)
    ),
    "qemu": _KindKeys(("",), ("auto", "pagemap", "soft-dirty"), (64, 1 << 20)),
}
Kind = Literal["sim", "kvm", "qemu"]

_OF_QEMU = ("qmp", "disks", "ignore_ram", "chardevs")
_NOT_OF_QEMU = ("memory", "regions", "vcpus", "workload", "seed", "ring_entries", "dirty_rate", "output_every")


_WHY_NOT = ("it says how a QEMU that runs already is protected", "QEMU says it itself: leave the key out")


class GuestConfig(_Section):
    """[guest]: what is protected."""

    name: Name
    kind: Kind = "sim"
    memory: Memory | None = None
    regions: Annotated[dict[Name, Memory], Field(min_length=1, max_length=1024)] | None = None
    vcpus: Annotated[int, limits(1, 64)] = 2
    workload: str
    seed: Annotated[int, limits(0, 2**63 - 1)] = 1
    tracker: str = "auto"
    ring_entries: Annotated[int, AfterValidator(power_of_two)] = 65536
    dirty_rate: Annotated[int, limits(0, 10**9)] = 20_000
    output_every: Annotated[int, limits(1, 10**9)] = 16
    output: FilePath
    gate_capacity: Annotated[Size, sizes(4 * KIB, GIB)] = MIB
    qmp: FilePath | None = None
    disks: Literal["refuse", "shared", "ignore"] = "refuse"
    ignore_ram: Words = ()
    chardevs: Chardevs = {}

    @field_validator("workload", "tracker", "ring_entries")
    @classmethod
    def _of_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("kind")
        if kind is not None:  # a kind that is wrong is reported once
            keys = _KINDS[kind]
            if info.field_name == "ring_entries":
                limits(*keys.ring_entries).func(value)  # type: ignore[call-arg]
            else:
                allowed = keys.workloads if info.field_name == "workload" else keys.trackers
                if value not in allowed:
                    raise wrong(f"must be one of {', '.join(allowed)} for a {kind} guest, not {value!r}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping):
            kind = raw.get("kind", "sim")
            for key in _NOT_OF_QEMU if kind == "qemu" else _OF_QEMU:
                if key in raw:
                    raise wrong(f"{key} is not a key of a {kind} guest", _WHY_NOT[kind == "qemu"])
            if kind == "qemu":
                if "qmp" not in raw:
                    raise wrong("a qemu guest needs qmp, the path of its monitor", 'qmp = "/run/vm.qmp"')
                return {"gate_capacity": 64 * MIB, **raw, "workload": ""}
            if "workload" not in raw and kind in _KINDS:
                raw = {**raw, "workload": _KINDS[kind].workloads[0]}
            if "memory" in raw and "regions" in raw:
                raise wrong("has both memory and regions", "write memory for a single region, or name the regions")
            if "memory" not in raw and "regions" not in raw:
                return {**raw, "memory": 256 * MIB}
        return raw

    @property
    def pages(self) -> dict[str, int]:
        """Pages of each region, in the order of their numbers; `memory` is one region called ram. QEMU says its own."""
        if self.kind == "qemu":
            return {}
        sizes = self.regions if self.regions is not None else {"ram": self.memory or 0}
        return {name: size // PAGE_SIZE for name, size in sizes.items()}


class SecondaryAddress(_Section):
    """[secondary]: where the secondary listens."""

    address: Address

    @property
    def host_port(self) -> tuple[str, int]:
        return parse_address(self.address)


class Adaptive(_Section):
    """checkpoint.interval as a table: an epoch's length follows the dirty rate, aiming at a held output's delay."""

    min: Interval = 5 * MS
    max: Interval = 200 * MS
    target_lag: Interval = 50 * MS

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise wrong(f"min ({write_duration(self.min)}) must not exceed max ({write_duration(self.max)})")
        return self


def _interval_form(value: object) -> str:
    return "(adaptive)" if isinstance(value, Mapping | Adaptive) else "(fixed)"


class Checkpoint(_Section):
    """[checkpoint]: how often, how safe, and with how much memory. A fixed `interval` is in nanoseconds."""

    interval: Annotated[
        Annotated[Interval, Tag("(fixed)")] | Annotated[Adaptive, Tag("(adaptive)")], Discriminator(_interval_form)
    ] = 25 * MS
    level: Literal["memory", "durable"] = "memory"
    window: Annotated[int, limits(1, 64)] = 4
    stage: Annotated[Size, sizes(MIB, TIB)] = 64 * MIB
    batch: Annotated[Size, sizes(256 * KIB, 4 * MIB)] = 4 * MIB
    encoding: Literal["raw", "xor-lz4", "auto"] = "raw"
    delta_cache: Annotated[Size, sizes(0, TIB)] = 64 * MIB
    max_iterations: Annotated[int, limits(1, 1000)] = 30


class PrimaryLink(_Link):
    """[link] of the primary, which connects."""

    backoff_min: Backoff = 50 * MS
    backoff_max: Backoff = 2 * SECOND
    connect_timeout: Timeout = 2 * SECOND

    @model_validator(mode="after")
    def _backoff_ordered(self) -> Self:
        if self.backoff_min > self.backoff_max:
            raise wrong("backoff_min must not exceed backoff_max")
        return self


class PrimaryConfig(_Section):
    """The primary's file."""

    guest: GuestConfig
    secondary: SecondaryAddress
    checkpoint: Checkpoint = Checkpoint()
    link: PrimaryLink = PrimaryLink()
    runtime: Runtime

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        guest = raw.get("guest")
        name = guest.get("name") if isinstance(guest, Mapping) else None
        runtime, place = _derived_runtime(raw, f"/run/ckptd/{name}", "primary.sock")
        derived = {**raw, "runtime": runtime}
        if isinstance(guest, Mapping):
            derived["guest"] = {"output": f"{place}/output", **guest}
        return derived


# The secondary's file.


class Listen(_Section):
    """[listen]: where primaries connect."""

    address: Address

    @property
    def host_port(self) -> tuple[str, int]:
        return parse_address(self.address)


class Replica(_Section):
    """[replica]: where the replicas are, and how much of their past is kept."""

    dir: FilePath = Path("/var/lib/ckptd")
    history: Annotated[int, limits(0, 10**6)] = 100
    history_bytes: Annotated[Size, sizes(0, 16 * TIB)] = GIB
    reserve: Annotated[Size, sizes(0, TIB)] = 64 * MIB
    max_memory: Annotated[Size, sizes(MIB, 16 * TIB)] = 64 * GIB


class StandbyCommand(_Section):
    """[guest.standby]: what is otherwise on this host than in the command line of the primary's QEMU."""

    command: Words = ()
    binary: str | None = None
    replace: dict[str, str] = {}
    drop: Words = ()
    append: Words = ()


class GuestEntry(_Section):
    """[[guest]]: one guest that this secondary accepts."""

    name: Name
    kind: Kind = "sim"
    output: FilePath
    chardevs: Chardevs = {}
    standby: StandbyCommand = StandbyCommand()

    @model_validator(mode="after")
    def _of_qemu(self) -> Self:
        if self.kind != "qemu" and self.standby != StandbyCommand():
            raise wrong(f"standby is not a key of a {self.kind} guest", "only QEMU has a command line")
        if self.kind != "qemu" and self.chardevs:
            raise wrong(f"chardevs is not a key of a {self.kind} guest", "only QEMU has chardevs")
        return self


class SecondaryLink(_Link):
    """[link] of the secondary, which listens."""

    handshake_timeout: Timeout = 5 * SECOND
    max_connections: Annotated[int, limits(1, 1024)] = 16


class SecondaryConfig(_Section):
    """The secondary's file."""

    listen: Listen
    replica: Replica = Replica()
    guest: tuple[GuestEntry, ...]
    link: SecondaryLink = SecondaryLink()
    runtime: Runtime

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        runtime, place = _derived_runtime(raw, "/run/ckptd/secondary", "secondary.sock")
        derived = {**raw, "runtime": runtime}
        if isinstance(guests := raw.get("guest"), list):
            derived["guest"] = tuple(
                {"output": f"{place}/{item.get('name')}.output", **item} if isinstance(item, Mapping) else item
                for item in guests
            )
        return derived

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [entry.name for entry in self.guest]
        if not names or len(set(names)) != len(names):
            raise wrong("guest: at least one [[guest]] is needed, and their names must differ")
        return self


def _derived_runtime(raw: Mapping[str, Any], default: str, socket: str) -> tuple[Any, str]:
    """[runtime] with the defaults that follow from its directory, and the directory."""
    runtime = raw.get("runtime", {})
    given = str(runtime.get("dir")) if isinstance(runtime, Mapping) else ""
    # A directory that is wrong is reported once, not again with everything that follows from it.
    place = given if given.startswith("/") else default
    return {"dir": place, "socket": f"{place}/{socket}", **runtime} if isinstance(runtime, Mapping) else runtime, place


# Reloading.

_RELOADABLE: dict[type[BaseModel], frozenset[str]] = {
    PrimaryConfig: frozenset(
        {f"checkpoint.{key}" for key in Checkpoint.model_fields} - {"checkpoint.stage", "checkpoint.delta_cache"}
        | {"link.heartbeat", "link.timeout", "link.backoff_min", "link.backoff_max", "runtime.log_level"}
    ),
    SecondaryConfig: frozenset(
        {f"link.{key}" for key in SecondaryLink.model_fields}
        | {"replica.history", "replica.history_bytes", "runtime.log_level"}
    ),
}


def changed_keys(old: BaseModel, new: BaseModel) -> tuple[list[str], list[str]]:
    """The keys that differ: those that a running daemon takes over (SIGHUP), and those that need a restart."""
    before, after = _keys(old), _keys(new)
    changed = [key for key in after if before.get(key) != after[key]]
    reloadable = _RELOADABLE[type(new)]
    return [key for key in changed if key in reloadable], [key for key in changed if key not in reloadable]


def _keys(config: BaseModel) -> dict[str, object]:
    """Section.key and value; a list of sections is one key."""
    found: dict[str, object] = {}
    for section, value in config:
        found |= {f"{section}.{key}": item for key, item in value} if isinstance(value, BaseModel) else {section: value}
    return found
