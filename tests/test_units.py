"""Sizes and durations, as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import ConfigError
from ckptd.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MiB", 256 << 20), ("1.5GiB", 3 << 29), ("4kB", 4000), ("0B", 0), (" 2 TiB ", 2 << 40), (4096, 4096)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "ns"),
    [("25ms", 25_000_000), ("1.5s", 1_500_000_000), ("2min", 120 * 10**9), ("250us", 250_000), ("1h", 3600 * 10**9)],
)
def test_durations(text: str, ns: int) -> None:
    assert parse_duration(text) == ns


@pytest.mark.parametrize("text", ["", "5", "MiB", "-1MiB", "1 Mib", "1e3B", "∞B", "25ms", True, 1.5, None])
def test_what_is_no_size_is_refused_with_the_units(text: object) -> None:
    with pytest.raises(ConfigError, match="is not a size") as caught:
        parse_size(text)  # type: ignore[arg-type]
    assert "KiB" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "25", "ms", "-1ms", "25 Ms", "25m", "1GiB", 25, None])
def test_what_is_no_duration_is_refused_with_the_units(text: object) -> None:
    with pytest.raises(ConfigError, match="is not a duration") as caught:
        parse_duration(text)  # type: ignore[arg-type]
    assert "min" in (caught.value.hint or "")


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (256 << 20, "256 MiB")])
def test_sizes_are_written_short(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(("ns", "text"), [(0, "0 ns"), (999, "999 ns"), (25_000_000, "25 ms"), (90 * 10**9, "1.5 min")])
def test_durations_are_written_short(ns: int, text: str) -> None:
    assert format_duration(ns) == text


@given(st.integers(0, 1 << 50))
def test_a_written_size_reads_back_to_within_what_its_digits_say(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size * 0.051


@given(st.integers(0, 10**15))
def test_a_written_duration_reads_back_to_within_what_its_digits_say(ns: int) -> None:
    assert abs(parse_duration(format_duration(ns)) - ns) <= ns * 0.051
