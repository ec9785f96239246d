"""The error tree of ckptd: what happened, where, what to do, and the exit code that goes with it.

    CkptdError
      ConfigError            a configuration file, key, value or unit
      GuestError             the guest, or the process that runs it
      TrackerError           the dirty log
        TrackerUnavailable   a kernel feature or permission is missing
      ProtocolError          what came over the link, or what we were about to send
        LocalProtocolError   we broke the rules: a defect of ours, nothing was sent
        RemoteProtocolError  the peer broke the rules: the connection is closed
          CorruptFrame       bytes that cannot be a frame, or whose checksum differs
          VersionMismatch    no protocol version in common
        Refused              the peer said no, with a reason of the protocol
      ReplicaError           what the secondary holds
        EpochGap             an epoch that does not follow the committed one
        DigestMismatch       the image is not what the commit says it must be
        Inconsistent         the replica is no committed epoch and must not be promoted
        NoSpace              the file system of the replica is full
        JournalError         a segment, undo or meta file is torn or damaged
      StateError             a request that this state does not allow
      LeaseError             leases and terms
        Fenced               a higher term exists: this side must not let output go
      TransportError         the link itself
      Unreachable            a daemon's control socket does not answer
      VerifyFailed           two images, or an image and its digest, differ
"""

from __future__ import annotations

__all__ = [
    "CkptdError", "ConfigError", "CorruptFrame", "DigestMismatch", "EpochGap", "Fenced", "GuestError",
    "Inconsistent", "JournalError", "LeaseError", "LocalProtocolError", "NoSpace", "ProtocolError", "Refused",
    "RemoteProtocolError", "ReplicaError", "StateError", "TrackerError", "TrackerUnavailable", "TransportError",
    "Unreachable", "VerifyFailed", "VersionMismatch",
]  # fmt: skip


class CkptdError(Exception):
    """Any failure that ckptd reports.

    `message` says what happened; `hint` says what to do; the keyword fields say where (epoch, term, region, gfn,
    field).
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, **where: object) -> None:
        self.message = message
        self.hint = hint
        self.where = {key: value for key, value in where.items() if value is not None}
        super().__init__(message)

    def __str__(self) -> str:
        text = self.message
        if self.where:
            text += " (" + ", ".join(f"{key} {value}" for key, value in self.where.items()) + ")"
        if self.hint:
            text += f"; {self.hint}"
        return text

    def as_dict(self) -> dict[str, object]:
        """The same for `--json`: {"error", "message", "hint", "where"}."""
        where = {key: value if isinstance(value, int | str) else str(value) for key, value in self.where.items()}
        return {"error": type(self).__name__, "message": self.message, "hint": self.hint, "where": where}


class ConfigError(CkptdError):
    """A configuration file, key, value or unit is wrong; `where` names file and key."""

    exit_code = 3


class GuestError(CkptdError):
    """The guest, or the process that runs it, failed or answered nonsense."""


class TrackerError(CkptdError):
    """The dirty log failed."""


class TrackerUnavailable(TrackerError):
    """A kernel feature or permission that the tracker needs is missing; `hint` is the cure."""


class ProtocolError(CkptdError):
    """The rules of proto/PROTOCOL.md were broken."""


class LocalProtocolError(ProtocolError):
    """This side was about to break the rules: a defect of ours; nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the rules; the connection is closed. `code` is what a NACK to the peer would carry."""

    def __init__(self, message: str, *, code: str = "protocol", hint: str | None = None, **where: object) -> None:
        super().__init__(message, hint=hint, **where)
        self.code = code


class CorruptFrame(RemoteProtocolError):
    """Bytes that cannot be a frame: wrong magic, length or checksum."""

    def __init__(self, message: str, *, hint: str | None = None, **where: object) -> None:
        super().__init__(message, code="corrupt", hint=hint, **where)


class VersionMismatch(RemoteProtocolError):
    """The two sides have no protocol version in common."""

    def __init__(self, message: str, *, hint: str | None = None, **where: object) -> None:
        super().__init__(message, code="version", hint=hint, **where)


class Refused(ProtocolError):
    """The peer refused, with one of the protocol's reason codes in `code`."""

    def __init__(self, message: str, *, code: str, hint: str | None = None, **where: object) -> None:
        super().__init__(message, hint=hint, **where)
        self.code = code


class ReplicaError(CkptdError):
    """What the secondary holds cannot do what was asked."""


class EpochGap(ReplicaError):
    """An epoch that does not follow the committed one."""


class DigestMismatch(ReplicaError):
    """The image is not what the commit says it must be."""


class Inconsistent(ReplicaError):
    """The replica is no committed epoch; promoting it is refused (P2)."""

    exit_code = 5


class NoSpace(ReplicaError):
    """The file system that holds the replica is full."""


class JournalError(ReplicaError):
    """A segment, undo or meta file is torn or damaged."""


class StateError(CkptdError):
    """The request is not allowed in this state."""

    exit_code = 5


class LeaseError(CkptdError):
    """Leases and terms."""


class Fenced(LeaseError):
    """A higher term exists: this side must not let output go (P3)."""

    exit_code = 6


class TransportError(CkptdError):
    """The link failed; the cause is chained."""

    exit_code = 4


class Unreachable(CkptdError):
    """A daemon's control socket does not answer."""

    exit_code = 4


class VerifyFailed(CkptdError):
    """Two images, or an image and its digest, differ."""

    exit_code = 7
