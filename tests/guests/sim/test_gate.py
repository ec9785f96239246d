"""The gate holds, releases in order, and neither loses nor forgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import GuestError
from ckptd.guests.sim.gate import RECORD_SIZE, SimGate, gate_bytes, outputs_of
from ckptd.guests.sim.machine import Output


def said(number: int) -> Output:
    return Output(number, number * 10, number.to_bytes(16, "little"))


def make(capacity: int = 4, output: Path | None = None) -> SimGate:
    return SimGate(np.zeros(gate_bytes(capacity * RECORD_SIZE), dtype=np.uint8), output)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@given(st.lists(st.one_of(st.just(0), st.integers(1, 5)), max_size=40))
def test_agrees_with_a_list(moves: list[int]) -> None:
    """0: emit unless full. n: release n more, or all."""
    gate, held, number = make(), [], 0
    for move in moves:
        if move == 0 and not gate.full:
            number += 1
            gate.emit(said(number))
            held.append(said(number))
        elif move:
            count = min(move, len(held))
            assert gate.release(gate.released + count) == count
            del held[:count]
        assert gate.full == (len(held) == 4)
        assert gate.mark() == gate.written == number
        assert gate.released == number - len(held)
        assert outputs_of(gate.held(gate.mark())) == held
        if held:
            assert outputs_of(gate.held(gate.released + 1)) == held[:1]


def test_lines_are_appended_in_order_and_only_once(tmp_path: Path) -> None:
    file = tmp_path / "output"
    gate = make(output=file)
    for number in (1, 2, 3):
        gate.emit(said(number))
    assert gate.release(2) == 2
    assert gate.release(2) == gate.release(1) == 0
    assert gate.release(3) == 1
    assert lines(file) == [f"{n} {n * 10} {said(n).content.hex()}" for n in (1, 2, 3)]


def test_what_was_never_said_cannot_be_released() -> None:
    gate = make()
    gate.emit(said(1))
    with pytest.raises(GuestError, match="emitted 1"):
        gate.release(2)
    with pytest.raises(GuestError, match="emitted 1"):
        gate.held(2)
    assert gate.released == 0


def test_a_crash_between_line_and_marker_repeats_and_skips_nothing(tmp_path: Path) -> None:
    file = tmp_path / "output"
    buffer = np.zeros(gate_bytes(4 * RECORD_SIZE), dtype=np.uint8)
    gate = SimGate(buffer, file)
    gate.emit(said(1))
    gate.emit(said(2))
    before = buffer.copy()
    gate.release(2)
    buffer[:] = before
    SimGate(buffer, file).release(2)
    assert [line.split()[0] for line in lines(file)] == ["1", "2", "1", "2"]


@pytest.mark.parametrize("output", [Path("/dev/full"), Path("/nowhere/at/all")])
def test_output_that_cannot_be_written_stays_in_the_gate(output: Path) -> None:
    gate = make(output=output)
    gate.emit(said(1))
    with pytest.raises(GuestError, match="cannot be written"):
        gate.release(1)
    assert gate.released == 0
    assert outputs_of(gate.held(1)) == [said(1)]


def test_a_new_gate_takes_over_what_another_held(tmp_path: Path) -> None:
    one, other = make(), make(8, tmp_path / "output")
    for number in range(1, 5):
        one.emit(said(number))
    one.release(2)
    other.fill(one.held(4), 2)
    assert (other.released, other.written) == (2, 4)
    other.release(4)
    assert [line.split()[0] for line in lines(tmp_path / "output")] == ["3", "4"]


def test_held_output_with_a_gap_is_refused() -> None:
    gate = make()
    for number in (1, 2, 3):
        gate.emit(said(number))
    held = gate.held(3)
    with pytest.raises(GuestError, match="one by one"):
        outputs_of(held[:RECORD_SIZE] + held[2 * RECORD_SIZE :])
    with pytest.raises(GuestError, match="whole records"):
        outputs_of(held[:-1])
    with pytest.raises(GuestError, match="begins with number 1, not 2"):
        make().fill(held, 1)
    with pytest.raises(GuestError, match="cannot hold"):
        make(2).fill(held, 0)
