"""Sizes, durations and the integer types that name things, as people write them: "4GiB", "25ms"."""

from __future__ import annotations

import re
from typing import NewType

from ckptd.errors import ConfigError

__all__ = [
    "PAGE_SIZE", "Epoch", "Gfn", "Term",
    "format_duration", "format_size", "parse_duration", "parse_size",
]  # fmt: skip

PAGE_SIZE = 4096

Gfn = NewType("Gfn", int)
"""A page's number within its region."""
Epoch = NewType("Epoch", int)
"""Numbered from 1; 0 means no epoch has been committed."""
Term = NewType("Term", int)
"""The fencing number; rises with every promotion; the first is 1."""

_SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
          "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip
_DURATIONS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def parse_size(text: str | int) -> int:
    """Bytes from "256MiB", "1.5GiB", "4kB" or a bare number of bytes. Raises ConfigError naming the units."""
    return text if isinstance(text, int) and not isinstance(text, bool) else _parse(text, _SIZES, "size", "256MiB")


def parse_duration(text: str) -> int:
    """Nanoseconds from "25ms", "1.5s", "2min". A unit is required. Raises ConfigError naming the units."""
    return _parse(text, _DURATIONS, "duration", "25ms")


def format_size(size_bytes: int | float) -> str:
    """The shortest binary form that people read: 1536 is "1.5 KiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(size_bytes) >= _SIZES[unit]:
            return f"{size_bytes / _SIZES[unit]:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size_bytes:.0f} B"


def format_duration(ns: int | float) -> str:
    """The shortest form that people read: 25_000_000 is "25 ms"."""
    for unit in ("h", "min", "s", "ms", "us"):
        if abs(ns) >= _DURATIONS[unit]:
            return f"{ns / _DURATIONS[unit]:.1f}".removesuffix(".0") + f" {unit}"
    return f"{ns:.0f} ns"


def _parse(text: object, units: dict[str, int], what: str, example: str) -> int:
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2] not in units:
        raise ConfigError(
            f"{text!r} is not a {what}", hint=f'write a number and one of {", ".join(units)}, such as "{example}"'
        )
    return round(float(match[1]) * units[match[2]])
