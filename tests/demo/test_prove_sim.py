"""The proof itself: what is wrong with outputs, memory or state does not pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.demo.proof import read_image
from ckptd.demo.prove_sim import compare_outputs, prove, read_outputs
from ckptd.guests.sim.machine import Output, Params
from ckptd.guests.sim.oracle import run_to
from ckptd.memory.regions import Geometry

PARAMS = Params(Geometry.of(ram=24, video=8), seed=7, vcpus=2, workload="kv", output_every=4)


def outputs(*numbers: int, content: bytes = b"c") -> list[Output]:
    return [Output(number, 4 * number, content * 16) for number in numbers]


def test_overlapping_sides_that_agree_are_right() -> None:
    found = compare_outputs([outputs(1, 2, 3), outputs(2, 3, 4, 5)], outputs(1, 2, 3, 4, 5))
    assert (found.released, found.repeated) == (5, 2)
    assert found.lost == found.contradicted == found.wrong == []


@given(st.sets(st.integers(1, 30), min_size=1), st.integers(0, 30))
def test_every_hole_is_lost(missing: set[int], cut: int) -> None:
    said = outputs(*(number for number in range(1, 31) if number not in missing))
    found = compare_outputs([said[:cut], said[cut:]], outputs(*range(1, 31)))
    assert found.lost == sorted(missing)


def test_two_contents_of_one_number_contradict_each_other_and_one_is_wrong() -> None:
    found = compare_outputs([outputs(1, 2), outputs(2, content=b"x")], outputs(1, 2))
    assert (found.contradicted, found.lost) == ([2], [])
    found = compare_outputs([outputs(1, 2, content=b"x")], outputs(1, 2))
    assert (found.wrong, found.contradicted) == ([1, 2], [])


def test_an_output_that_no_run_says_is_wrong() -> None:
    assert compare_outputs([outputs(1, 2, 3)], outputs(1, 2)).wrong == [3]


def test_lines_are_read_as_the_gate_writes_them_and_a_torn_last_one_was_never_said(tmp_path: Path) -> None:
    path = tmp_path / "output"
    assert read_outputs(path) == []
    lines = "".join(f"{one.number} {one.step} {one.content.hex()}\n" for one in outputs(1, 2))
    path.write_text(lines + "3 12 0000")
    assert read_outputs(path) == outputs(1, 2)
    path.write_text("1 4\n")
    with pytest.raises(ValueError):
        read_outputs(path)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The image after 400 steps."""
    paths = [tmp_path / "image-ram", tmp_path / "image-video"]
    for path, rows in zip(paths, run_to(PARAMS, 400).memory, strict=True):
        path.write_bytes(rows.tobytes())
    return paths


def test_the_right_guest_is_proved(files: list[Path]) -> None:
    run = run_to(PARAMS, 400)
    proof = prove(PARAMS, 400, run.state, read_image(files), [run.outputs])
    assert proof.digest_equal and proof.state_equal and proof.memory.differing_pages == 0
    assert proof.outputs.released == 100 and not proof.outputs.wrong


def test_one_wrong_byte_or_step_is_found(files: list[Path]) -> None:
    run, other = run_to(PARAMS, 400), run_to(PARAMS, 401)
    image = [rows.copy() for rows in read_image(files)]
    image[1][3, 77] ^= 1
    proof = prove(PARAMS, 400, run.state, image, [run.outputs])
    assert not proof.digest_equal and proof.memory.differing_pages == 1
    assert not prove(PARAMS, 401, other.state, read_image(files), [run.outputs]).digest_equal
    assert not prove(PARAMS, 400, other.state, read_image(files), [run.outputs]).state_equal
