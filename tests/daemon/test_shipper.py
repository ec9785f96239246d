"""Wherever the link is cut: table and dirty set say what the secondary holds, and the next epochs make it equal."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.daemon.link import Link
from ckptd.daemon.shipper import Encoding, Shipper
from ckptd.errors import CkptdError, DigestMismatch, TransportError
from ckptd.memory.digest import HashTable
from ckptd.memory.regions import Geometry
from ckptd.protocol.messages import Welcome
from ckptd.protocol.peer import Event
from ckptd.protocol.primary import Acknowledged, PrimaryMachine, TablePart, Welcomed
from ckptd.units import PAGE_SIZE
from tests.daemon.bench import CALM, SteppedGuest, serve
from tests.protocol.world import RUN, SEED, MemoryHolding

GEOMETRY = Geometry.of(low=5, ram=120)
PATIENCE = 30


class Bench:
    """A shipper, its guest, and what the other side holds."""

    def __init__(self, encoding: Encoding = "raw", stage_pages: int = 64, *, early: bool = False) -> None:
        self.guest = SteppedGuest(GEOMETRY, early=early)
        self.shipper = Shipper(
            self.guest, stage_bytes=stage_pages * PAGE_SIZE, batch_bytes=16 * PAGE_SIZE, encoding=encoding,
            cache_bytes=1 << 20,
        )  # fmt: skip
        self.holding = MemoryHolding(GEOMETRY)
        self.acknowledged: list[int] = []
        self.safe = 0  # the mark of the last epoch that is safe

    async def session(self, epochs: int, steps: int, cut_after: int | None = None, *, final: bool = False) -> bool:
        """Connect and ship; False if the link was cut. The guest's outputs leave with acknowledgements only."""
        loop, shipper = asyncio.get_running_loop(), self.shipper
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        other = asyncio.create_task(serve(far, self.holding, cut_after))
        machine = PrimaryMachine(GEOMETRY, CALM, time.monotonic_ns())
        welcomed: asyncio.Future[Welcome] = loop.create_future()
        parts: list[TablePart] = []
        changed = asyncio.Event()

        def on_event(event: Event) -> None:
            match event:
                case Welcomed():
                    welcomed.set_result(event.welcome)
                case TablePart():
                    parts.append(event)
                case Acknowledged():
                    self.release(shipper.acknowledged(event.epoch).mark)
                    self.acknowledged.append(event.epoch)
            changed.set()

        def on_end(error: CkptdError) -> None:
            if not welcomed.done():
                welcomed.set_exception(error)
            changed.set()

        link = Link(near, machine, on_event, on_end)
        try:
            link.send(machine.hello("vm", "sim", RUN, SEED, 1, "memory", False))
            welcome = await welcomed
            if shipper.table is None:
                shipper.adopt(shipper.fresh_table(welcome.seed), continuous=False)
            for flight in shipper.settle(welcome.epoch):
                self.release(flight.mark)
                self.acknowledged.append(flight.epoch)
            assert shipper.table is not None
            if welcome.holding == "partial" and shipper.table.digest != welcome.digest:
                theirs = shipper.fresh_table(welcome.seed)
                link.send(machine.request_table())
                while not parts or not parts[-1].last:
                    if link.error is not None:
                        raise link.error
                    changed.clear()
                    await changed.wait()
                for part in parts:
                    gfns = np.arange(part.first, part.first + len(part.hashes), dtype=np.int64)
                    theirs.update(part.region, gfns, part.hashes)
                shipper.adopt(theirs, continuous=False)
            self.check_table(welcome.digest)
            self.check_nothing_is_forgotten()
            machine.begin(HashTable(GEOMETRY, shipper.fresh_table(welcome.seed).hasher).hasher.zero)
            for _ in range(epochs):
                self.guest.step(steps)
                await link.room(0)
                flight = await shipper.epoch(link, machine, "memory", most=3, final=final)
                self.guest.step(0 if final else 1)
                assert self.guest.gate.released == self.safe  # P1: shipping lets go of nothing
            while shipper.flights:
                if link.error is not None:
                    raise link.error
                changed.clear()
                await changed.wait()
            return True
        except TransportError:
            return False
        finally:
            link.end(TransportError("the session is over"))
            await other

    def release(self, mark: int) -> None:
        assert self.guest.gate.released == self.safe
        self.guest.gate.release(mark)
        self.safe = mark

    def check_table(self, digest: bytes) -> None:
        """With the flights undone, the table is that of the last committed epoch."""
        assert self.shipper.table is not None
        assert self.shipper.table.digest == digest == self.holding.true_digest()

    def check_nothing_is_forgotten(self) -> None:
        """Every page that differs from the table is in the tracker or pending; or all of memory will be compared."""
        shipper = self.shipper
        assert shipper.table is not None
        if not shipper.continuous or shipper.pending.overflowed:
            return
        logged = self.guest.tracker.harvest()
        self.guest.tracker.restore(logged)
        known = logged.merge(shipper.pending)
        differing = shipper.table.copy().rehash(self.guest.memory)
        for region in range(len(GEOMETRY)):
            assert np.isin(differing.gfns[region], known.gfns[region]).all()

    def check_equal(self) -> None:
        """P2: the image is the guest's memory as of the last epoch."""
        assert self.shipper.table is not None
        assert self.holding.true_digest() == self.shipper.table.digest
        assert self.acknowledged == sorted(set(self.acknowledged))


@dataclass(frozen=True)
class Plan:
    epochs: int
    steps: int
    cut_after: int


PLANS = st.lists(
    st.builds(Plan, st.integers(1, 4), st.integers(0, 60), st.integers(1, 400_000) | st.integers(1, 3_000)), max_size=6
)


@settings(max_examples=100)
@given(PLANS, st.sampled_from(["raw", "raw", "auto"]), st.sampled_from([8, 64, 256]), st.booleans())
def test_no_cut_loses_a_page(plans: list[Plan], encoding: Encoding, stage_pages: int, early: bool) -> None:
    async def main() -> None:
        bench = Bench(encoding, stage_pages, early=early)
        for plan in plans:
            await bench.session(plan.epochs, plan.steps, plan.cut_after)
            bench.guest.step(3)  # nobody is connected
            assert not bench.guest.paused
        assert await bench.session(2, 5)
        bench.check_equal()
        # nothing moved since the last epoch but one step: one more makes the image exactly the guest
        assert await bench.session(1, 0)
        bench.check_equal()
        written = bench.guest.gate.written
        assert written - bench.guest.gate.released <= (3 if early else 1)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_what_was_rolled_back_is_counted_and_sent_again() -> None:
    async def main() -> None:
        bench = Bench()
        assert await bench.session(2, 20)
        released, epoch = bench.guest.gate.released, bench.holding.epoch
        assert not await bench.session(3, 30, cut_after=6_000)
        assert bench.guest.gate.released == released  # P1
        assert bench.shipper.flights
        bench.shipper.settle(bench.holding.epoch)
        assert bench.holding.epoch == epoch and bench.shipper.counters.epochs_rolled_back > 0
        bench.check_table(bench.holding.true_digest())
        bench.check_nothing_is_forgotten()
        assert bench.shipper.pending.pages > 0
        assert await bench.session(1, 0)
        bench.check_equal()
        assert bench.shipper.counters.rescans == 1

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_an_epoch_that_was_committed_before_the_cut_is_safe() -> None:
    """The acknowledgement was lost, not the epoch: it is not undone, and its outputs leave."""

    async def main() -> None:
        bench = Bench()
        assert await bench.session(1, 20)
        await bench.session(2, 20, cut_after=80_000)
        flights = list(bench.shipper.flights)
        bench.holding.epoch = max(bench.holding.epoch, flights[0].epoch if flights else 0)
        safe = bench.shipper.settle(bench.holding.epoch)
        assert [one.epoch for one in safe] == [one.epoch for one in flights if one.epoch <= bench.holding.epoch]
        assert not bench.shipper.flights

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@pytest.mark.parametrize("stage_pages", [8, 64])
@pytest.mark.parametrize("devices", [[], [3], [3, 90, 119]])
def test_a_final_epoch_leaves_the_guest_paused_and_has_what_devices_wrote_late(
    devices: list[int], stage_pages: int
) -> None:
    async def main() -> None:
        bench = Bench(stage_pages=stage_pages)
        bench.guest.devices = devices
        assert await bench.session(2, 20)
        bench.guest.step(10)
        assert await _final(bench)
        assert bench.guest.paused
        bench.check_equal()
        bench.shipper.check_memory()
        bench.guest.memory[1][3] ^= 1
        with pytest.raises(DigestMismatch, match="1 pages changed") as found:
            bench.shipper.check_memory()
        assert (found.value.where["region"], found.value.where["gfn"]) == ("ram", 3)

    async def _final(bench: Bench) -> bool:
        bench.guest.step(0)
        step, bench.guest.step = bench.guest.step, lambda steps: None  # type: ignore[method-assign]
        try:
            return await bench.session(1, 0, final=True)
        finally:
            bench.guest.step = step  # type: ignore[method-assign]

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
