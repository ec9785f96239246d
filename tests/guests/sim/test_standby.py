"""The other side: over the image files, from the state, the guest goes on as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import GuestError, StateError
from ckptd.guests.sim import SimGuest, SimStandby
from ckptd.guests.sim.gate import SimGate, gate_bytes
from ckptd.guests.sim.machine import Params, header_of
from ckptd.guests.sim.oracle import Run, run_to
from ckptd.memory.regions import Geometry

from .test_process import until

PARAMS = Params(Geometry.of(low=20, ram=600), seed=3, vcpus=2, workload="kv", output_every=10)


def held_by(run: Run, released: int) -> bytes:
    gate = SimGate(np.zeros(gate_bytes(1 << 16), dtype=np.uint8))
    for output in run.outputs:
        gate.emit(output)
    gate.release(released)
    return gate.held(gate.mark())


@contextmanager
def images_of(run: Run, place: Path) -> Iterator[list[int]]:
    fds = []
    try:
        for region, rows in zip(PARAMS.geometry, run.memory, strict=True):
            (place / region.name).write_bytes(rows.tobytes())
            fds.append(os.open(place / region.name, os.O_RDWR))
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def numbers(output: Path) -> list[int]:
    return [int(line.split()[0]) for line in output.read_text().splitlines()] if output.exists() else []


def test_goes_on_over_the_image_to_what_an_uninterrupted_guest_is(runtime: Path, tmp_path: Path) -> None:
    run = run_to(PARAMS, 505)
    output = tmp_path / "output"

    async def promote() -> None:
        standby = SimStandby("one", runtime, output)
        with images_of(run, tmp_path) as images:
            await standby.prepare()
            assert standby.alive() and not standby.active
            await standby.activate(PARAMS.geometry, images, run.state, held_by(run, 30), 30)
        assert standby.active
        # what nobody may have seen is said first, and then what comes
        await until(lambda: len(numbers(output)) > 100)
        with pytest.raises(StateError, match="already"):
            await standby.activate(PARAMS.geometry, [], run.state, b"", 50)
        await standby.detach()

    asyncio.run(promote())

    async def again() -> None:
        """A later daemon finds it active; and it can be protected in its turn."""
        standby = SimStandby("one", runtime, output)
        await standby.prepare()
        assert standby.active and standby.alive()
        await standby.detach()
        guest = SimGuest("one", PARAMS, runtime, output=output)
        await guest.attach()
        try:
            assert guest.resumed
            before = numbers(output)
            await until(lambda: guest.gate.written > before[-1] + 20)
            assert numbers(output) == before  # from now on the daemon has the gate
            await guest.pause()
            state = await guest.save_state()
            end = run_to(PARAMS, header_of(state).step)
            assert state == end.state
            files = [np.fromfile(tmp_path / region.name, dtype=np.uint8) for region in PARAMS.geometry]
            for rows, live, file in zip(end.memory, guest.memory, files, strict=True):
                assert np.array_equal(rows, live)
                assert np.array_equal(rows.reshape(-1), file)
            guest.gate.release(guest.gate.mark())
            lines = output.read_text().splitlines()
            wanted = [f"{one.number} {one.step} {one.content.hex()}" for one in end.outputs]
            assert lines == wanted[30:]
        finally:
            await guest.end()

    asyncio.run(again())


def test_held_output_leaves_at_once_even_if_the_guest_says_no_more(runtime: Path, tmp_path: Path) -> None:
    run = run_to(replace(PARAMS, rate=1), 505)

    async def promote() -> None:
        standby = SimStandby("one", runtime, tmp_path / "output")
        try:
            with images_of(run, tmp_path) as images:
                await standby.activate(PARAMS.geometry, images, run.state, held_by(run, 30), 30)
            assert numbers(tmp_path / "output") == list(range(31, 51))
        finally:
            await standby.end()

    asyncio.run(promote())


def test_a_standby_that_only_waits_ends_with_its_daemon(runtime: Path) -> None:
    async def run() -> None:
        standby = SimStandby("one", runtime)
        await standby.prepare()
        await standby.prepare()
        pid = standby.facts()["pid"]
        assert isinstance(pid, int)
        await standby.detach()
        assert not standby.alive()
        await until(lambda: not (runtime / "guest.pid").exists())

    asyncio.run(run())


def test_what_does_not_fit_together_is_refused_before_anything_is_said(runtime: Path, tmp_path: Path) -> None:
    run = run_to(PARAMS, 505)
    output = tmp_path / "output"
    held = held_by(run, 30)

    async def attempt() -> None:
        standby = SimStandby("one", runtime, output)
        geometry = PARAMS.geometry
        try:
            with images_of(run, tmp_path) as images:
                for match, arguments in [
                    ("image of", (Geometry.of(ram=620), images, run.state, held, 30)),
                    ("not a saved state|damaged", (geometry, images, b"nonsense", held, 30)),
                    ("begins with number 31", (geometry, images, run.state, held, 29)),
                    ("emitted 50 outputs, the gate 49", (geometry, images, run.state, held[:-32], 30)),
                ]:
                    with pytest.raises(GuestError, match=match):
                        await standby.activate(*arguments)  # type: ignore[arg-type]
                    assert not output.exists()
                    assert not standby.active
                # and the process is as good as before
                await standby.activate(geometry, images, run.state, held, 30)
                assert standby.active
        finally:
            await standby.end()
        assert not standby.alive()

    asyncio.run(attempt())
