"""The primary daemon: one guest, one secondary, one link at a time.

    connect -> handshake -> (table) -> resync -> epochs -> link lost -> back off -> connect ...

The epochs themselves are the shipper's; what the operator asks for between them is in requests.py. This module decides
when: pacing, window, reconnecting, and the condition that the operator sees. Invariant: the gate releases what an
acknowledged epoch has marked, nothing else (P1).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import structlog

from ckptd.config import Adaptive, Checkpoint, PrimaryConfig
from ckptd.daemon.condition import Condition
from ckptd.daemon.link import Link, connect
from ckptd.daemon.pacing import Pacer
from ckptd.daemon.requests import Request, cause_of, serve
from ckptd.daemon.shipper import Flight, Shipper
from ckptd.errors import CkptdError, DigestMismatch, Fenced, GuestError, Refused, StateError, TransportError
from ckptd.guests.base import Guest
from ckptd.memory.digest import HashTable
from ckptd.protocol.messages import Welcome
from ckptd.protocol.peer import Event, PeerClosed, Timing
from ckptd.protocol.primary import (
    Acknowledged,
    PrimaryMachine,
    PromotedThere,
    TablePart,
    VerifiedThere,
    Welcomed,
)  # fmt: skip

__all__ = ["PrimaryDaemon"]

_CALM = 0.005  # seconds before a guest that waits for its gate is looked at again
_FAREWELL = 1.0  # seconds for the last words on the link
_FENCING = ("stale_term", "promoted")


class PrimaryDaemon:
    """Protects one guest. `run` returns when the guest was handed over or `stop` was called."""

    def __init__(self, config: PrimaryConfig, guest: Guest, *, term: int = 1, replace: bool = False) -> None:
        self.config = config
        self.guest = guest
        self.term = term
        self._replace = replace
        self._log = structlog.get_logger().bind(guest=guest.name)
        self.shipper = Shipper(
            guest, stage_bytes=config.checkpoint.stage, batch_bytes=config.checkpoint.batch,
            encoding=config.checkpoint.encoding, cache_bytes=config.checkpoint.delta_cache,
        )  # fmt: skip
        self.condition = Condition("unprotected", "not connected yet", self._report)
        self.pacer = Pacer(*_limits(config.checkpoint), time.monotonic_ns())
        self._link: Link | None = None
        self._connecting: asyncio.Task[socket.socket] | None = None
        self._machine: PrimaryMachine | None = None
        self._welcome: asyncio.Future[Welcome] | None = None
        self._table: tuple[HashTable, asyncio.Future[None]] | None = None
        self._wake = asyncio.Event()
        self._attention = False
        self._requests: deque[Request] = deque()
        self._verified: deque[asyncio.Future[bytes]] = deque()
        self._promoted: asyncio.Future[PromotedThere] | None = None
        self._stopping = False
        self._left = asyncio.Event()
        self.handed_over = False
        self.acknowledged_epoch = 0
        self.acknowledged_at = 0.0
        self._earlier_bytes = [0, 0]  # sent and received over links that are gone
        self._connections = 0
        self._attached = False
        self._welcomed_at = 0  # monotonic ns; 0 once the first epoch after it is acknowledged
        self.resync_ms = 0.0  # from the last WELCOME to the first acknowledgement after it
        self._seed = int.from_bytes(os.urandom(8), "little")

    # --- life

    async def run(self) -> None:
        """Attach and protect until stopped. Raises GuestError when the guest is gone."""
        await self.guest.attach()
        self.shipper.begin()
        await self.guest.pause()
        self.guest.tracker.start()
        await self.guest.resume()
        if (fd := self.guest.attention()) is not None:
            asyncio.get_running_loop().add_reader(fd, self._guest_waits)
        self._attached = True
        self._log.info("attached", memory=str(self.guest.geometry), run=self.guest.run.hex())
        try:
            await self._protect_forever()
        finally:
            if fd is not None:
                asyncio.get_running_loop().remove_reader(fd)
            await self._leave()

    async def detach(self) -> dict[str, Any]:
        """Stop, and tell what has become of the guest."""
        if not self._attached:
            raise StateError("no guest is attached", guest=self.guest.name)
        opens = self.guest.opens_at_detach
        self.stop()
        await self._left.wait()
        return {"guest": self.guest.name, "epoch": self.acknowledged_epoch, "output_flows": opens}

    def stop(self) -> None:
        """End cleanly: the guest is left running. What it says stays held, unless its kind lets go of it."""
        self._stopping = True
        self._wake.set()
        asyncio.get_running_loop().call_later(_FAREWELL, self._give_up)

    def _give_up(self) -> None:
        """The secondary is silent, or not there: whoever waits for it waits no more."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._link is not None:
            self._link.end(TransportError("this daemon ends"))

    def reload(self, config: PrimaryConfig) -> None:
        """Take over the keys that can change while running."""
        self.config = config
        self.pacer.set_limits(*_limits(config.checkpoint), time.monotonic_ns())
        self.shipper.retune(batch_bytes=config.checkpoint.batch, encoding=config.checkpoint.encoding)
        if self._machine is not None:
            self._machine.retime(Timing(config.link.heartbeat, config.link.timeout))
        self._wake.set()

    async def _protect_forever(self) -> None:
        backoff = self.config.link.backoff_min
        while not self._stopping:
            try:
                await self._session()
            except CkptdError as error:
                error = cause_of(error, self._link)
                if not self.guest.alive():
                    raise (
                        error if isinstance(error, GuestError) else GuestError(f"the guest has ended: {error}")
                    ) from None
                if isinstance(error, Fenced):
                    await self._fence(error)
                elif not self._stopping:
                    protected = self.condition.word == "protected"
                    self.condition.become("unprotected", str(error))
                    backoff = self.config.link.backoff_min if protected else backoff
            finally:
                self._close(TransportError("this daemon ends" if self._stopping else "the session is over"))
            if self.handed_over or self._stopping:
                return
            await self._back_off(backoff)
            backoff = min(2 * backoff, self.config.link.backoff_max)

    async def _back_off(self, ns: int) -> None:
        until = time.monotonic_ns() + ns
        while not self._stopping and time.monotonic_ns() < until:
            await self._wait_until(until)
            if self._attention:
                await self.shipper.absorb()
                self._calm()
                await asyncio.sleep(_CALM)
            for request in self._drain_requests():
                request.fail(StateError(f"the guest is {self.condition.word}: {self.condition.reason}"))

    async def _leave(self) -> None:
        for request in self._drain_requests():
            request.fail(StateError("this daemon ends"))
        self._attached = False
        if self.handed_over:
            await self.guest.end()
        elif self.guest.alive():
            await self.guest.detach()
        self._left.set()

    async def _fence(self, error: Fenced) -> None:
        """A higher term exists: nothing leaves from here any more, and the guest stands still (P3)."""
        with suppress(StateError):  # a switchover has paused it already
            await self.guest.pause()
        self.condition.become("fenced", str(error))
        while not self._stopping:
            for request in self._drain_requests():
                request.fail(error)
            self._wake.clear()
            await self._wake.wait()

    # --- one session

    async def _session(self) -> None:
        link_config, loop = self.config.link, asyncio.get_running_loop()
        host, port = self.config.secondary.host_port
        self._connecting = asyncio.create_task(
            connect(host, port, buffer_bytes=link_config.buffer, timeout_ns=link_config.connect_timeout)
        )
        try:
            sock = await self._connecting
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            raise TransportError("this daemon ends") from None
        finally:
            self._connecting = None
        timing = Timing(link_config.heartbeat, link_config.timeout)
        self._machine = machine = PrimaryMachine(self.guest.geometry, timing, time.monotonic_ns())
        self._link = link = Link(sock, machine, self._on_event, self._on_end)
        self._connections += 1
        self._welcome = loop.create_future()
        link.send(machine.hello(
            self.guest.name, self.guest.kind, self.guest.run, self._seed, self.term, self.config.checkpoint.level,
            self._replace,
        ))  # fmt: skip
        welcome = await self._welcome
        self._welcomed_at = time.monotonic_ns()
        self._log.info("connected", secondary=f"{host}:{port}", holds=welcome.holding, epoch=welcome.epoch)
        # A replica that was lost says "partial" and keeps its number: nothing is safe there, whatever was on its way.
        for flight in self.shipper.settle(welcome.epoch if welcome.holding == "committed" else 0):
            self._safe(flight)
        self.acknowledged_epoch = welcome.epoch
        await self._agree(link, machine, welcome)
        resync = not self.shipper.continuous or self.shipper.pending.overflowed
        if resync:
            self.condition.become("resyncing", "comparing the guest's memory with what the secondary holds")
        self.pacer.deadline = time.monotonic_ns()
        await self._epochs(link, machine)

    async def _agree(self, link: Link, machine: PrimaryMachine, welcome: Welcome) -> None:
        """Find out what the secondary holds: by our own table where its digest is the same, else from its table."""
        shipper, loop = self.shipper, asyncio.get_running_loop()
        own = shipper.table
        if own is None or own.hasher.seed != welcome.seed:
            own = shipper.fresh_table(welcome.seed)
            shipper.adopt(own, continuous=False)
        if own.digest != welcome.digest:
            theirs = shipper.fresh_table(welcome.seed)
            self._table = (theirs, loop.create_future())
            _check(link)
            link.send(machine.request_table())
            await self._table[1]
            self._table = None
            if theirs.digest != welcome.digest:
                raise DigestMismatch("the secondary's table is not that of its digest", epoch=welcome.epoch)
            shipper.adopt(theirs, continuous=False)
        assert shipper.table is not None
        machine.begin(shipper.table.hasher.zero)

    async def _epochs(self, link: Link, machine: PrimaryMachine) -> None:
        while True:
            await self._until_due(link, machine)
            if self._stopping:
                await self._last_acknowledgement(link, machine)
                link.send(machine.bye("the primary ends; the guest goes on unprotected"))
                await link.room(0)
                return
            if self._requests:
                await serve(self, self._requests.popleft(), link, machine)
                if self.handed_over:
                    return
            else:
                self.pacer.started(time.monotonic_ns())
                await self.ship(link, machine)
            self._calm()

    async def _last_acknowledgement(self, link: Link, machine: PrimaryMachine) -> None:
        """Wait for what is on its way; and what the guest has said until now becomes safe, if a detach lets go of it in
        any case."""
        if self.guest.opens_at_detach:
            await self.ship(link, machine)
        if self.shipper.flights:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FAREWELL):
                    await self.wait_acknowledged(self.shipper.flights[-1].epoch, link)

    async def ship(self, link: Link, machine: PrimaryMachine, *, final: bool = False, stay: bool = False) -> Flight:
        """One epoch up to its COMMIT; see Shipper.epoch."""
        checkpoint = self.config.checkpoint
        return await self.shipper.epoch(
            link, machine, checkpoint.level, most=checkpoint.max_iterations, final=final, stay=stay
        )

    async def _until_due(self, link: Link, machine: PrimaryMachine) -> None:
        """Wait for the deadline, or for a reason to end the epoch now; never while the window or the socket is full."""
        while not self._stopping:
            if link.error is not None:
                raise link.error
            free = machine.unacknowledged < self.config.checkpoint.window and link.queued == 0
            now = time.monotonic_ns()
            if free and (now >= self.pacer.deadline or self._requests or self._attention):
                return
            if self._attention and not free:
                await self.shipper.absorb()
                self._calm()
                await asyncio.sleep(_CALM)
                continue
            if machine.unacknowledged < self.config.checkpoint.window and link.queued:
                await link.room(0)
                continue
            await self._wait_until(self.pacer.deadline if free else now + 1_000_000_000)

    async def _wait_until(self, deadline: int) -> None:
        self._wake.clear()
        if self._attention:
            self._wake.set()
        delay = (deadline - time.monotonic_ns()) / 1e9
        if delay > 0:
            handle = asyncio.get_running_loop().call_later(delay, self._wake.set)
            await self._wake.wait()
            handle.cancel()

    # --- what arrives

    def _on_event(self, event: Event) -> None:
        match event:
            case Acknowledged():
                self._on_acknowledged(event)
            case Welcomed():
                _resolve(self._welcome, event.welcome)
            case TablePart() if self._table is not None:
                self._on_table(event)
            case VerifiedThere() if self._verified:
                _resolve(self._verified.popleft(), event.digest)
            case PromotedThere():
                _resolve(self._promoted, event)
            case PeerClosed():
                raise self._refusal(event)
            case _:
                pass

    def _on_acknowledged(self, event: Acknowledged) -> None:
        flight = self.shipper.acknowledged(event.epoch)
        self._safe(flight)
        self.acknowledged_epoch, self.acknowledged_at = event.epoch, time.time()
        if self._welcomed_at:
            self.resync_ms, self._welcomed_at = (time.monotonic_ns() - self._welcomed_at) / 1e6, 0
        self.pacer.acknowledged(time.monotonic_ns() - flight.began)
        self.condition.become("protected", f"epochs are acknowledged as {event.level}")
        self._wake.set()

    def _on_table(self, part: TablePart) -> None:
        assert self._table is not None
        table, done = self._table
        table.update(part.region, np.arange(part.first, part.first + len(part.hashes), dtype=np.int64), part.hashes)
        if part.last:
            _resolve(done, None)

    def _safe(self, flight: Flight) -> None:
        self.shipper.counters.outputs_released += self.guest.gate.release(flight.mark)

    def _refusal(self, event: PeerClosed) -> CkptdError:
        if event.code in _FENCING:
            return Fenced(event.text, term=event.term or None, epoch=event.epoch or None)
        if event.code == "bye":
            return TransportError(event.text)
        return Refused(event.text, code=event.code)

    def _on_end(self, error: CkptdError) -> None:
        for future in (self._welcome, self._table[1] if self._table else None, self._promoted, *self._verified):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # somebody may wait for it, or nobody
        self._verified.clear()
        self._wake.set()

    def _close(self, error: CkptdError) -> None:
        link, self._link, self._machine = self._link, None, None
        if link is not None:
            self._earlier_bytes[0] += link.sent_bytes
            self._earlier_bytes[1] += link.received_bytes
            link.end(error)

    # --- the guest's wishes, the operator's

    def _guest_waits(self) -> None:
        self.guest.clear_attention()
        self._attention = True
        self._wake.set()

    def _calm(self) -> None:
        self._attention = False

    def request(self, request: Request) -> None:
        """Hear it at the next epoch."""
        self._requests.append(request)
        self._wake.set()

    def _drain_requests(self) -> list[Request]:
        drained, self._requests = list(self._requests), deque()
        return drained

    async def wait_acknowledged(self, epoch: int, link: Link) -> None:
        """Returns when this epoch is acknowledged. Raises what ended the link."""
        while self.acknowledged_epoch < epoch:
            if link.error is not None:
                raise link.error
            self._wake.clear()
            await self._wake.wait()

    def expect_verified(self, link: Link) -> asyncio.Future[bytes]:
        """The digest that the secondary will state. Raises what has ended the link."""
        _check(link)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._verified.append(future)
        return future

    def expect_promoted(self, link: Link) -> asyncio.Future[PromotedThere]:
        """The secondary's word that the guest runs there. Raises what has ended the link."""
        _check(link)
        self._promoted = asyncio.get_running_loop().create_future()
        return self._promoted

    # --- what others may know

    def status(self) -> dict[str, Any]:
        """All that an operator can ask for, as JSON."""
        shipper, link = self.shipper, self._link
        counters = shipper.counters
        # Before it is attached, and after it was let go, nothing is known of the guest but its description.
        gate = self.guest.gate if self._attached else None
        written, released = (gate.written, gate.released) if gate else (0, 0)
        return {
            "role": "primary", "guest": self.guest.name, "kind": self.guest.kind, **self.condition.as_dict(),
            "term": self.term, "epoch": self.acknowledged_epoch, "acknowledged_at": self.acknowledged_at,
            "in_flight": len(shipper.flights), "sending": bool(link and link.queued),
            "interval_ms": self.pacer.interval / 1e6,
            "memory_bytes": self.guest.geometry.size_bytes if self._attached else 0, "vcpus": self.guest.vcpus,
            "tracker": self.guest.tracker.name if self._attached else None,
            "secondary": self.config.secondary.address, "connections": self._connections,
            "wire_bytes": self._earlier_bytes[0] + (link.sent_bytes if link else 0),
            "epochs_committed": counters.epochs_committed, "epochs_rolled_back": counters.epochs_rolled_back,
            "dirty_pages": counters.dirty_pages, "unchanged_pages": counters.unchanged_pages,
            "zero_pages": counters.zero_pages, "delta_pages": counters.delta_pages, "raw_bytes": counters.raw_bytes,
            "rescans": counters.rescans, "resync_ms": round(self.resync_ms, 3),
            "pause_ms": shipper.pause_ms.summary(), "commit_ms": shipper.commit_ms.summary(),
            "outputs_written": written, "outputs_released": released, "outputs_held": written - released,
            "gate_full": gate.full if gate else False, "digest": shipper.table.digest.hex() if shipper.table else None,
            "progress": dict(shipper.progress) if self.condition.word == "resyncing" else None,
            "guest_facts": self.guest.facts(), "pid": os.getpid(),
        }  # fmt: skip

    def _report(self, word: str, reason: str) -> None:
        report: Callable[..., Any] = self._log.info if word in ("protected", "promoted") else self._log.warning
        report(word, reason=reason, epoch=self.acknowledged_epoch)


def _limits(checkpoint: Checkpoint) -> tuple[int, int, int]:
    interval = checkpoint.interval
    if isinstance(interval, Adaptive):
        return interval.min, interval.max, interval.target_lag
    return interval, interval, interval


def _check(link: Link) -> None:
    """A link that has ended answers nothing: waiting for its answer would never end."""
    if link.error is not None:
        raise link.error


def _resolve(future: asyncio.Future[Any] | None, value: object) -> None:
    if future is not None and not future.done():
        future.set_result(value)
