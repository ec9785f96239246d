"""Control messages: what the meta of each frame says, as one frozen class for each type, checked field by field.

The meta is a msgpack map with exactly the fields of the class, each once. Limits are set before msgpack allocates, so a
bomb is a CorruptFrame. PAGES has a binary meta of its own: pages.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import msgpack

from ckptd.errors import CorruptFrame, LocalProtocolError
from ckptd.memory.regions import MAX_REGION_PAGES, MAX_REGIONS
from ckptd.protocol.wire import Buffer, Type

__all__ = [
    "LEVELS", "NACK_CODES", "Ack", "Bye", "Commit", "Handover", "Heartbeat", "Hello", "Iteration", "Message", "Nack",
    "Output", "Promoted", "State", "Table", "TableRequest", "Verified", "Verify", "Welcome", "clip", "decode",
    "encode",
]  # fmt: skip

MAX_TEXT = 1024
"""Bytes of UTF-8 in what a NACK or BYE says to people."""
LEVELS = ("memory", "durable")
HOLDINGS = ("empty", "partial", "committed")

NACK_CODES = (
    "version",       # no protocol version in common
    "unknown_guest", # this secondary is not configured for that guest
    "other_guest",   # same name, but another kind or geometry
    "other_run",     # the replica holds an epoch of another run of the guest
    "stale_term",    # a higher term exists: the sender must fence itself
    "promoted",      # the guest runs here now: the sender must fence itself
    "busy",          # too many connections, or the guest's replica is in use
    "corrupt",       # a frame could not be read, or a page is not what its hash says
    "protocol",      # a frame that this state does not allow
    "gap",           # the epoch or the chain does not follow
    "digest",        # the image would not be what the commit says
    "torn",          # a page of a precopy iteration was never sent whole
    "no_space",      # the replica's file system is full
    "failed",        # anything else that went wrong at the receiver
)  # fmt: skip

Check = Callable[[Any], bool]


def _integer(most: int = (1 << 64) - 1) -> Check:
    return lambda value: type(value) is int and 0 <= value <= most


def _text(most: int = 256) -> Check:
    return lambda value: type(value) is str and len(value.encode(errors="surrogatepass")) <= most


def _exactly(size: int) -> Check:
    return lambda value: type(value) is bytes and len(value) == size


def _one_of(*allowed: str) -> Check:
    return lambda value: type(value) is str and value in allowed


def _flag(value: Any) -> bool:
    return type(value) is bool


def _regions(value: Any) -> bool:
    return (
        type(value) is list
        and 0 < len(value) <= MAX_REGIONS
        and all(type(item) is list and len(item) == 2 for item in value)
        and all(_text(64)(name) and type(pages) is int and 0 < pages <= MAX_REGION_PAGES for name, pages in value)
        and len({name for name, _ in value}) == len(value)
    )


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all control messages."""

    TYPE: ClassVar[Type]
    CHECKS: ClassVar[dict[str, Check]]


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Primary to secondary, first frame: who I am and which guest I protect."""

    TYPE: ClassVar[Type] = Type.HELLO
    CHECKS: ClassVar[dict[str, Check]] = {
        "oldest": _integer(255), "newest": _integer(255), "software": _text(), "guest": _text(64), "kind": _text(64),
        "run": _exactly(16), "regions": _regions, "seed": _integer(), "level": _one_of(*LEVELS), "replace": _flag,
    }  # fmt: skip
    oldest: int
    newest: int
    software: str
    guest: str
    kind: str
    run: bytes  # random, made when the guest was started: another run is another guest
    regions: list[list[Any]]  # [name, pages] of each region
    seed: int  # of the page hashes, should the secondary hold nothing yet
    level: str
    replace: bool  # the operator gave up what the secondary holds of another run


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Secondary to primary: what I hold. The next epoch is `epoch` + 1."""

    TYPE: ClassVar[Type] = Type.WELCOME
    CHECKS: ClassVar[dict[str, Check]] = {
        "version": _integer(255), "software": _text(), "holding": _one_of(*HOLDINGS), "epoch": _integer(),
        "seed": _integer(), "digest": _exactly(16), "chain": _exactly(16),
    }  # fmt: skip
    version: int
    software: str
    holding: str
    epoch: int
    seed: int
    digest: bytes
    chain: bytes


@dataclass(frozen=True, slots=True)
class Nack(Message):
    """Either way: no, for this reason; the sender of it closes the connection afterwards."""

    TYPE: ClassVar[Type] = Type.NACK
    CHECKS: ClassVar[dict[str, Check]] = {
        "code": _one_of(*NACK_CODES), "text": _text(MAX_TEXT), "epoch": _integer(), "term": _integer(),
    }  # fmt: skip
    code: str
    text: str
    epoch: int
    term: int


@dataclass(frozen=True, slots=True)
class TableRequest(Message):
    """Primary to secondary: state the hash of every page you hold."""

    TYPE: ClassVar[Type] = Type.TABLE_REQUEST
    CHECKS: ClassVar[dict[str, Check]] = {}


@dataclass(frozen=True, slots=True)
class Table(Message):
    """Secondary to primary: payload is the 16-byte hashes of pages `first` onwards of a region; `last` ends it."""

    TYPE: ClassVar[Type] = Type.TABLE
    CHECKS: ClassVar[dict[str, Check]] = {
        "region": _integer(MAX_REGIONS - 1), "first": _integer(MAX_REGION_PAGES - 1), "last": _flag,
    }  # fmt: skip
    region: int
    first: int
    last: bool


@dataclass(frozen=True, slots=True)
class Iteration(Message):
    """Primary to secondary: a precopy iteration has ended; `pages` were sent in it."""

    TYPE: ClassVar[Type] = Type.ITERATION
    CHECKS: ClassVar[dict[str, Check]] = {"iteration": _integer(0xFFFFFFFF), "pages": _integer()}
    iteration: int
    pages: int


@dataclass(frozen=True, slots=True)
class State(Message):
    """Primary to secondary: payload is the guest's device state."""

    TYPE: ClassVar[Type] = Type.STATE
    CHECKS: ClassVar[dict[str, Check]] = {"crc": _integer(0xFFFFFFFF)}
    crc: int


@dataclass(frozen=True, slots=True)
class Output(Message):
    """Primary to secondary: payload is all output after `released` up to `mark`, which the gate holds."""

    TYPE: ClassVar[Type] = Type.OUTPUT
    CHECKS: ClassVar[dict[str, Check]] = {"crc": _integer(0xFFFFFFFF), "released": _integer(), "mark": _integer()}
    crc: int
    released: int
    mark: int


@dataclass(frozen=True, slots=True)
class Commit(Message):
    """Primary to secondary: the epoch is whole; the image must now have this digest."""

    TYPE: ClassVar[Type] = Type.COMMIT
    CHECKS: ClassVar[dict[str, Check]] = {
        "pages": _integer(), "digest": _exactly(16), "chain": _exactly(16), "level": _one_of(*LEVELS), "final": _flag,
    }  # fmt: skip
    pages: int  # in PAGES frames of this epoch, iterations included
    digest: bytes
    chain: bytes
    level: str
    final: bool  # the guest stays paused: a switchover


@dataclass(frozen=True, slots=True)
class Ack(Message):
    """Secondary to primary: the epoch of this frame's header is safe as `level` says, and my digest is `digest`."""

    TYPE: ClassVar[Type] = Type.ACK
    CHECKS: ClassVar[dict[str, Check]] = {"level": _one_of(*LEVELS), "digest": _exactly(16)}
    level: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Heartbeat(Message):
    """Either way: alive."""

    TYPE: ClassVar[Type] = Type.HEARTBEAT
    CHECKS: ClassVar[dict[str, Check]] = {}


@dataclass(frozen=True, slots=True)
class Handover(Message):
    """Primary to secondary: the epoch of this header was final and I am fenced: promote it."""

    TYPE: ClassVar[Type] = Type.HANDOVER
    CHECKS: ClassVar[dict[str, Check]] = {}


@dataclass(frozen=True, slots=True)
class Promoted(Message):
    """Secondary to primary: the guest runs here, from the epoch of this header, in the term of this header."""

    TYPE: ClassVar[Type] = Type.PROMOTED
    CHECKS: ClassVar[dict[str, Check]] = {"digest": _exactly(16)}
    digest: bytes


@dataclass(frozen=True, slots=True)
class Verify(Message):
    """Primary to secondary, between epochs: hash your whole image again."""

    TYPE: ClassVar[Type] = Type.VERIFY
    CHECKS: ClassVar[dict[str, Check]] = {}


@dataclass(frozen=True, slots=True)
class Verified(Message):
    """Secondary to primary: the digest of my image at the epoch of this header, from its bytes."""

    TYPE: ClassVar[Type] = Type.VERIFIED
    CHECKS: ClassVar[dict[str, Check]] = {"digest": _exactly(16)}
    digest: bytes


@dataclass(frozen=True, slots=True)
class Bye(Message):
    """Either way: I close the connection, and mean to."""

    TYPE: ClassVar[Type] = Type.BYE
    CHECKS: ClassVar[dict[str, Check]] = {"text": _text(MAX_TEXT)}
    text: str


_ALL: tuple[type[Message], ...] = (
    Hello, Welcome, Nack, TableRequest, Table, Iteration, State, Output, Commit, Ack, Heartbeat, Handover, Promoted,
    Verify, Verified, Bye,
)  # fmt: skip
_CLASSES: dict[Type, type[Message]] = {cls.TYPE: cls for cls in _ALL}


def clip(text: str) -> str:
    """As much of a text for the peer's operator as fits in NACK and BYE."""
    return text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore")


def encode(message: Message) -> bytes:
    """The meta of a message. Raises LocalProtocolError naming the field that the peer would refuse."""
    fields = {name: getattr(message, name) for name in message.CHECKS}
    for name, check in message.CHECKS.items():
        if not check(fields[name]):
            raise LocalProtocolError("a field's value is not allowed", frame=message.TYPE.name, field=name)
    return msgpack.packb(fields, use_bin_type=True)  # type: ignore[no-any-return]


def decode(kind: Type, meta: Buffer) -> Message:
    """The message in a meta. Raises CorruptFrame naming frame and field."""
    cls = _CLASSES[kind]
    try:
        fields = msgpack.unpackb(
            meta, raw=False, strict_map_key=True, max_map_len=16, max_array_len=MAX_REGIONS,
            max_str_len=MAX_TEXT, max_bin_len=64, max_ext_len=0, object_pairs_hook=_once,
        )  # fmt: skip
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise CorruptFrame(f"the meta is no msgpack map within its limits: {error}", frame=kind.name) from error
    if type(fields) is not dict or set(fields) != set(cls.CHECKS):
        found = ", ".join(map(str, fields))[:256] if type(fields) is dict else type(fields).__name__
        due = ", ".join(cls.CHECKS) or "none"
        raise CorruptFrame(f"the meta must have the fields {due}; it has {found or 'none'}", frame=kind.name)
    for name, check in cls.CHECKS.items():
        if not check(fields[name]):
            value = repr(fields[name])[:80]
            raise CorruptFrame("a field's value is not allowed", frame=kind.name, field=name, value=value)
    return cls(**fields)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field is named twice")
    return fields
