"""What a check answers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Check", "Finding", "State", "Value", "no", "unknown", "yes"]

State = Literal["yes", "no", "unknown"]
Value = str | int | bool | list[str]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that this machine offers, or does not, or that could not be found out.

    `name` and the keys of `data` are stable: scripts read them. `detail` is for people; `cure` is what an operator can
    do about a "no".
    """

    name: str
    state: State
    detail: str
    cure: str | None = None
    data: Mapping[str, Value] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The same for `--json`."""
        return asdict(self)


Check = Callable[[], Finding]
"""Tries one thing. Its function has the name of its finding; what it raises makes the finding unknown."""


def yes(name: str, detail: str, *, cure: str | None = None, **data: Value) -> Finding:
    """It works. A `cure` here is about what works, but not well."""
    return Finding(name, "yes", detail, cure, data)


def no(name: str, detail: str, cure: str | None = None, **data: Value) -> Finding:
    """It does not work, and the reason is known."""
    return Finding(name, "no", detail, cure, data)


def unknown(name: str, detail: str) -> Finding:
    """It could not be found out."""
    return Finding(name, "unknown", detail)
