"""Values of the configuration: how each is read, its limits, and how it is written again.

Sizes are held in bytes and durations in nanoseconds; both are written as people write them, exactly. Knows no section.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, StringConstraints
from pydantic_core import PydanticCustomError

from ckptd.errors import ConfigError
from ckptd.units import PAGE_SIZE, format_duration, format_size, parse_duration, parse_size

__all__ = [
    "GIB", "KIB", "MIB", "MINUTE", "MS", "SECOND", "TIB",
    "Address", "Duration", "FilePath", "Memory", "Name", "Size",
    "durations", "limits", "parse_address", "power_of_two", "sizes", "write_duration", "write_size", "wrong",
]  # fmt: skip

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
MS, SECOND, MINUTE = 10**6, 10**9, 60 * 10**9


def wrong(message: str, hint: str | None = None) -> PydanticCustomError:
    # The text goes in as a parameter, since pydantic would fill in any braces that it has itself.
    return PydanticCustomError("ckptd", "{message}", {"message": message, "hint": hint})


def _reading(parse: Callable[[Any], Any]) -> BeforeValidator:
    """Let a parser's ConfigError become pydantic's, which knows the key."""

    def read(value: object) -> object:
        try:
            return parse(value)
        except ConfigError as error:
            raise wrong(error.message, error.hint) from None

    return BeforeValidator(read)


def limits(low: int, high: int, write: Callable[[int], str] = str) -> AfterValidator:
    def check(value: int) -> int:
        if not low <= value <= high:
            raise wrong(f"must be {write(low)} to {write(high)}, not {write(value)}")
        return value

    return AfterValidator(check)


def write_size(value: int) -> str:
    text = format_size(value)
    return text if parse_size(text) == value else f"{value} B"


def write_duration(value: int) -> str:
    text = format_duration(value)
    return text if parse_duration(text) == value else f"{value} ns"


def sizes(low: int, high: int) -> AfterValidator:
    return limits(low, high, write_size)


def durations(low: int, high: int) -> AfterValidator:
    return limits(low, high, write_duration)


def _read_path(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not value.startswith("/") or "\0" in value:
        raise wrong(f"{value!r} is not an absolute path")
    return Path(value)


def parse_address(text: str) -> tuple[str, int]:
    """("10.0.0.2", 7070) from "10.0.0.2:7070", "host.example:7070" or "[::1]:7070". Raises ConfigError."""
    hint = 'write host:port, such as "10.0.0.2:7070" or "[::1]:7070"'
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise ConfigError(f"{text!r} is not an address", hint=hint)
    if match[1] is not None:
        try:
            ipaddress.IPv6Address(match[1])
        except ValueError:
            raise ConfigError(f"{text!r} is not an address: {match[1]} is not IPv6", hint=hint) from None
    return match[1] or match[2], int(match[3])


def _check_address(text: str) -> str:
    try:
        parse_address(text)
    except ConfigError as error:
        raise wrong(error.message, error.hint) from None
    return text


def _whole_pages(value: int) -> int:
    if value == 0 or value % PAGE_SIZE:
        raise wrong(f"must be one or more whole pages of {PAGE_SIZE} bytes, not {value} bytes")
    return value


def power_of_two(value: int) -> int:
    if value & (value - 1):
        raise wrong(f"must be a power of two, not {value}")
    return value


Size = Annotated[int, _reading(parse_size), PlainSerializer(write_size, when_used="json")]
Duration = Annotated[int, _reading(parse_duration), PlainSerializer(write_duration, when_used="json")]
Memory = Annotated[Size, AfterValidator(_whole_pages), sizes(PAGE_SIZE, 16 * TIB)]
Name = Annotated[str, StringConstraints(pattern=r"\A[a-z0-9-]{1,64}\z")]
FilePath = Annotated[Path, BeforeValidator(_read_path)]
Address = Annotated[str, AfterValidator(_check_address)]
