"""The gate of bytes: nothing is dropped, repeated or reordered, wherever its ring wraps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import GuestError
from ckptd.guests.kvm.gate import KvmGate, gate_bytes


def made(capacity: int = 16, output: Path | None = None) -> KvmGate:
    return KvmGate(np.zeros(gate_bytes(capacity), dtype=np.uint8), output)


@given(st.integers(1, 20), st.lists(st.one_of(st.binary(max_size=12), st.integers(0, 12), st.none()), max_size=40))
def test_what_goes_in_comes_out(capacity: int, steps: list[bytes | int | None]) -> None:
    """Bytes are emitted, a number of them is released, None passes everything on; beside a plain string."""
    gate, said, left = made(capacity), b"", b""
    for step in steps:
        if isinstance(step, bytes):
            room = gate.room
            taken = gate.emit(step)
            assert taken == min(len(step), room)
            said += step[:taken]
        elif isinstance(step, int):
            mark = min(gate.released + step, gate.written)
            assert gate.held(mark) == said[gate.released : mark]
            wanted = mark - gate.released
            assert gate.release(mark) == wanted
        else:
            left += gate.unsent()
            gate.passed_on(len(gate.unsent()))
        assert gate.written == len(said)
        assert gate.full == (gate.written - gate.sent >= capacity)
    gate.release(gate.written)
    assert left + gate.unsent() == said


def test_released_bytes_keep_their_place_until_they_are_passed_on() -> None:
    gate = made(4)
    assert gate.emit(b"abcdef") == 4 and gate.full
    gate.release(4)
    assert gate.full and gate.emit(b"x") == 0
    assert gate.unsent() == b"abcd"
    gate.passed_on(3)
    assert gate.emit(b"efgh") == 3
    assert gate.unsent() == b"d" and gate.held(7) == b"efg"


def test_a_standby_goes_on_with_the_next_byte(tmp_path: Path) -> None:
    gate = made(8, tmp_path / "output")
    gate.fill(b"held", 1000)
    assert (gate.released, gate.written, gate.sent) == (1000, 1004, 1000)
    assert gate.release(1004) == 4 and (tmp_path / "output").read_bytes() == b"held"
    with pytest.raises(GuestError, match="cannot hold 9"):
        gate.fill(b"123456789", 0)


def test_output_that_cannot_be_written_stays_and_is_not_forgotten(tmp_path: Path) -> None:
    gate = made(8, tmp_path / "no" / "output")
    gate.emit(b"abc")
    with pytest.raises(GuestError, match="cannot be written"):
        gate.release(3)
    assert gate.released == 0
    (tmp_path / "no").mkdir()
    assert gate.release(3) == 3 and (tmp_path / "no" / "output").read_bytes() == b"abc"


def test_what_was_not_emitted_cannot_leave() -> None:
    gate = made()
    gate.emit(b"ab")
    with pytest.raises(GuestError, match="no output 3 yet"):
        gate.release(3)
