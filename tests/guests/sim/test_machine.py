"""The state after step n is a pure function of parameters and n, and a wrong byte is not forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import ConfigError, GuestError
from ckptd.guests.sim.machine import Machine, Params, header_of
from ckptd.guests.sim.oracle import continue_from, run_to
from ckptd.guests.sim.workloads import WORKLOADS
from ckptd.memory.dirtyset import Gfns
from ckptd.memory.regions import Geometry

GEOMETRY = Geometry.of(low=3, ram=70)


def make(**other: Any) -> Params:
    return Params(**{"geometry": GEOMETRY, "seed": 5, "vcpus": 2, "output_every": 3, "batch": 16, **other})


@settings(deadline=None, max_examples=40)
@given(
    workload=st.sampled_from(sorted(WORKLOADS)),
    vcpus=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
    parts=st.lists(st.integers(0, 40), max_size=5),
)
def test_any_split_by_save_and_restore_is_the_same_run(workload: str, vcpus: int, seed: int, parts: list[int]) -> None:
    params = make(workload=workload, vcpus=vcpus, seed=seed)
    whole = run_to(params, sum(parts))
    memory, state, outputs = run_to(params, 0)
    done = 0
    for part in parts:
        done += part
        run = continue_from(memory, state, done)
        memory, state = run.memory, run.state
        outputs += run.outputs
    assert all(np.array_equal(one, other) for one, other in zip(memory, whole.memory, strict=True))
    assert state == whole.state
    assert outputs == whole.outputs


def test_the_function_itself_does_not_change() -> None:
    """A saved state of an earlier version must go on as it would have there."""
    run = run_to(make(workload="zipf"), 100)
    digest = int(np.bitwise_xor.reduce(np.concatenate([rows.reshape(-1).view(np.uint64) for rows in run.memory])))
    assert (digest, run.outputs[-1].content.hex()) == (
        7688319899451272475,
        "6075062e28d98a8fae168ab2f54156f5",
    )


@pytest.mark.parametrize("workload", sorted(WORKLOADS))
def test_the_log_names_just_the_pages_that_changed(workload: str) -> None:
    class Log:
        full = False

        def __init__(self) -> None:
            self.marked: set[tuple[int, int]] = set()

        def mark(self, vcpu: int, region: int, gfns: Gfns) -> int:
            self.marked |= {(region, int(gfn)) for gfn in gfns}
            return 0

        def disarm(self) -> None: ...

    params = make(workload=workload)
    memory = [np.zeros(region.size_bytes // 8, dtype=np.uint64) for region in GEOMETRY]
    log = Log()
    machine = Machine(params, memory, log)
    for _ in range(300):
        before = [words.copy() for words in memory]
        log.marked.clear()
        machine.run_step()
        changed = {
            (region, int(gfn))
            for region, words in enumerate(memory)
            for gfn in np.flatnonzero((words != before[region]).reshape(-1, 512).any(axis=1))
        }
        assert changed == log.marked


def test_outputs_are_numbered_and_come_every_so_many_steps() -> None:
    outputs = run_to(make(), 30).outputs
    assert [(one.number, one.step) for one in outputs] == [(n, 3 * n) for n in range(1, 11)]
    assert len({one.content for one in outputs}) == 10
    assert all(len(one.content) == 16 for one in outputs)


@pytest.mark.parametrize("workload", sorted(WORKLOADS))
def test_one_wrong_byte_changes_what_follows(workload: str) -> None:
    """In a page that is read again. So a promoted guest over a wrong image cannot pass for the right one."""
    params = make(workload=workload, geometry=Geometry.of(ram=2), batch=512)
    memory, state, _ = run_to(params, 10)
    right = continue_from(memory, state, 400)
    touched = np.flatnonzero(memory[0].reshape(-1))
    memory[0].reshape(-1)[touched[0] // 8 * 8] ^= 1
    wrong = continue_from(memory, state, 400)
    assert wrong.outputs[-1] != right.outputs[-1]
    assert header_of(wrong.state)[1:] == header_of(right.state)[1:]


def test_seeds_vcpus_and_workloads_make_different_guests() -> None:
    states = {run_to(make(**other), 60).outputs[-1].content
              for other in ({}, {"seed": 6}, {"vcpus": 3}, {"workload": "kv"}, {"workload": "idle"})}  # fmt: skip
    assert len(states) == 5


def test_the_rate_makes_no_difference_to_the_states() -> None:
    assert run_to(make(rate=5), 60).outputs == run_to(make(), 60).outputs
    assert make(rate=64, batch=16).step_seconds == 0.25
    assert make(rate=64, batch=16, workload="kv").step_seconds == 0.125


def test_a_header_tells_whose_state_it_is() -> None:
    params = make(workload="kv")
    assert header_of(run_to(params, 50).state) == (params, 50, 16)


@pytest.mark.parametrize("state", [b"", b"\xc0", b"\x81\xa1v\x02", b"x" * 100])
def test_what_is_no_state_is_refused(state: bytes) -> None:
    with pytest.raises(GuestError, match="state"):
        header_of(state)


def test_memory_of_another_size_is_refused() -> None:
    with pytest.raises(GuestError, match="memory"):
        Machine(make(), [np.zeros(512, dtype=np.uint64)])


def test_a_state_past_the_wanted_step_is_refused() -> None:
    memory, state, _ = run_to(make(), 10)
    with pytest.raises(GuestError, match="past step 9"):
        continue_from(memory, state, 9)


@pytest.mark.parametrize("wrong", [{"workload": "none"}, {"vcpus": 0}, {"rate": -1}, {"output_every": 0}])
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make(**wrong)
