"""One connection of a primary to the secondary daemon: the handshake's decision, then epochs made permanent one after
another.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog

from ckptd.daemon.link import Link
from ckptd.errors import CkptdError, NoSpace, Refused, ReplicaError, StateError, TransportError
from ckptd.memory.digest import HashTable
from ckptd.memory.regions import Geometry, Region
from ckptd.protocol.peer import Event, PeerClosed, Timing
from ckptd.protocol.secondary import (
    EpochReady,
    HandoverReady,
    HelloReceived,
    SecondaryMachine,
    SecondaryState,
    TableWanted,
    VerifyWanted,
)  # fmt: skip
from ckptd.replica.replica import Replica

if TYPE_CHECKING:
    from ckptd.daemon.secondary import Protected, SecondaryDaemon

__all__ = ["Session"]

_TABLE_QUEUE = 8 << 20
_INLINE_PAGES = 4096  # applied in a few ms; a thread would cost more in hand-overs than it saves


class Session:
    """Lives from accept to close. Whatever takes long is a task, and the link is held (not read) until it is done."""

    def __init__(self, daemon: SecondaryDaemon, sock: socket.socket, address: str) -> None:
        self._daemon = daemon
        self.address = address
        self._log = structlog.get_logger().bind(primary=address)
        link = daemon.config.link
        self._machine = SecondaryMachine(Timing(link.heartbeat, link.timeout), time.monotonic_ns())
        self._guest: Protected | None = None
        self._work: asyncio.Task[None] | None = None
        self._fitting: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._heard_at = time.monotonic_ns()
        self._link = Link(sock, self._machine, self._on_event, self._on_end)
        self._greeting = asyncio.get_running_loop().call_later(link.handshake_timeout / 1e9, self._not_greeted)

    @property
    def silent(self) -> bool:
        """The connection is gone."""
        return self._link.closed

    @property
    def receiving(self) -> int:
        return self._machine.receiving

    @property
    def pages_received(self) -> int:
        return self._machine.pages_received

    @property
    def bytes_received(self) -> int:
        return self._link.received_bytes

    def retime(self, heartbeat: int, timeout: int) -> None:
        self._machine.retime(Timing(heartbeat, timeout))

    async def leave(self, text: str) -> None:
        """Close on purpose, once what is being made permanent is permanent."""
        if self._work is not None and self._work is not asyncio.current_task():
            await asyncio.wait({self._work})
        if not self._link.closed:
            if self._machine.state is not SecondaryState.CLOSED:
                self._link.send(self._machine.bye(text))
            await self._link.flush_and_end(TransportError(text))
        await self._ended.wait()

    def _not_greeted(self) -> None:
        if self._machine.state is SecondaryState.GREETING:
            self._link.end(TransportError("no HELLO within link.handshake_timeout"))

    # --- events

    def _on_event(self, event: Event) -> None:
        match event:
            case EpochReady():
                self._commit(event)
            case HelloReceived():
                self._later(self._greet(event))
            case TableWanted():
                self._later(self._send_table())
            case VerifyWanted():
                self._later(self._verify())
            case HandoverReady():
                self._later(self._hand_over())
            case PeerClosed():
                raise TransportError(event.text) if event.code == "bye" else Refused(event.text, code=event.code)
            case _:
                pass

    def _later(self, work: Awaitable[None]) -> None:
        """Do it as a task, reading nothing until it is done."""
        self._link.hold()

        async def guarded() -> None:
            try:
                await work
            except CkptdError as error:
                self._link.end(error, tell=True)
            except OSError as error:
                self._link.end(ReplicaError(f"the replica failed: {error.strerror or error}"), tell=True)
            except Exception as error:  # a defect of ours: the connection must not hang on it
                self._log.exception("a defect of ckptd")
                self._link.end(CkptdError(f"a defect of ckptd: {error!r}"), tell=True)
            finally:
                self._work = None
                self._link.go_on()

        self._work = asyncio.create_task(guarded())

    def _on_end(self, error: CkptdError) -> None:
        self._greeting.cancel()
        guest = self._guest
        log = self._log if guest is None else guest.log.bind(primary=self.address)
        expected = isinstance(error, TransportError)
        (log.info if expected else log.warning)("connection closed", reason=str(error))
        if self._work is None:
            self._finish(error)
        else:
            self._work.add_done_callback(lambda _: self._finish(error))

    def _finish(self, error: CkptdError) -> None:
        self._machine.abandon()
        guest = self._guest
        if guest is not None and guest.session is self:
            guest.session = None
            if guest.condition.word != "promoted":
                guest.condition.become("waiting", f"the primary is not connected: {error.message}")
        self._daemon.ended(self)
        self._ended.set()

    # --- handshake

    async def _greet(self, event: HelloReceived) -> None:
        self._greeting.cancel()
        refusal = await self._decide(event)
        if refusal is not None:
            code, text, guest = refusal
            replica = guest.replica if guest else None
            self._link.send(self._machine.refuse(
                code, text, epoch=replica.epoch if replica else 0, term=replica.term if replica else 0
            ))  # fmt: skip
            await self._link.flush_and_end(Refused(text, code=code))
            return
        guest = self._guest
        assert guest is not None
        await guest.have_standby()
        self._link.send(self._machine.welcome(guest.replica))
        guest.condition.become("receiving", f"from the primary at {self.address}")

    async def _decide(self, event: HelloReceived) -> tuple[str, str, Protected | None] | None:
        """None to welcome, or code, text and guest of the refusal."""
        hello = event.hello
        guest = self._daemon.guests.get(hello.guest)
        if guest is None:
            names = ", ".join(self._daemon.guests)
            return "unknown_guest", f"this secondary has no guest {hello.guest!r}; it has: {names}", None
        geometry = Geometry(tuple(Region(name, pages) for name, pages in hello.regions))
        replica = guest.replica
        if hello.kind != guest.entry.kind:
            text = f"guest {hello.guest} is of kind {hello.kind!r} there and {guest.entry.kind!r} here"
            return "other_guest", text, guest
        while True:
            if (refusal := _unfit(guest, event, geometry)) is not None:
                return *refusal, guest
            if guest.session is not None:  # of the same run: the primary has noticed a cut before we did
                old = guest.session.address
                self._log.info("a new connection of the primary replaces the old one", guest=hello.guest, old=old)
                await guest.session.leave("replaced by a new connection")
            async with guest.busy:
                # All of that may have changed while the lock was waited for.
                if guest.session is None and _unfit(guest, event, geometry) is None:
                    return await self._fit(guest, replica, event, geometry)

    async def _fit(
        self, guest: Protected, replica: Replica, event: HelloReceived, geometry: Geometry
    ) -> tuple[str, str, Protected | None] | None:
        hello = event.hello
        if replica.holding != "empty" and _is_another(replica, event, geometry):
            await asyncio.to_thread(replica.discard)
        try:
            if replica.holding == "empty":
                await asyncio.to_thread(
                    lambda: replica.create(
                        kind=hello.kind, geometry=geometry, seed=hello.seed, run=hello.run, term=event.term
                    )
                )
            elif replica.holding == "partial":
                await asyncio.to_thread(replica.rehash)  # a cut may have left half a page
            replica.make_room()
        except NoSpace as error:
            return "no_space", str(error), guest
        except ReplicaError as error:
            return "failed", str(error), guest
        self._guest = guest
        guest.session = self
        return None

    # --- epochs

    def _commit(self, event: EpochReady) -> None:
        """The acknowledgement leaves before the image is touched: the primary need not wait for that."""
        if event.level == "durable" or event.pages > _INLINE_PAGES:
            self._later(self._commit_aside(event))
            return
        self._permanent(event)
        self._acknowledge(event)
        self._replica.apply()

    async def _commit_aside(self, event: EpochReady) -> None:
        """The same, with what takes long in a thread, so that heartbeats go out meanwhile."""
        await asyncio.to_thread(self._permanent, event)
        self._acknowledge(event)
        await asyncio.to_thread(self._replica.apply)

    def _permanent(self, event: EpochReady) -> None:
        self._replica.commit(event.epoch, event.term, event.chain, event.digest, event.level)

    def _acknowledge(self, event: EpochReady) -> None:
        assert self._guest is not None
        self._link.send(self._machine.acknowledge(event.level))
        self._guest.committed_at = time.time()
        if self._fitting is None:
            self._fitting = asyncio.create_task(self._fit_standby(self._guest))

    async def _fit_standby(self, guest: Protected) -> None:
        """A host that could not run the guest is better known now than when it is needed."""
        replica = guest.replica
        assert replica.geometry is not None
        try:
            why = await guest.standby.fit(replica.geometry, replica.descriptors(), replica.state, self._still)
        except CkptdError as error:
            why = str(error)
        if why and guest.session is self:
            guest.log.error("this guest could NOT be resumed here", reason=why)
            reason = f"from the primary at {self.address}; the guest could NOT be resumed here: {why}"
            guest.condition.become("receiving", reason)

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[bytes]:
        """No epoch is committed while the block runs: image and state are of one."""
        while self._work is not None:
            await asyncio.wait({self._work})
        self._link.hold()
        try:
            yield self._replica.state
        finally:
            self._link.go_on()

    async def _send_table(self) -> None:
        for frame in self._machine.table_frames():
            self._link.send(frame)
            await self._link.room(_TABLE_QUEUE)

    async def _verify(self) -> None:
        """Hash the image's bytes; the table that the commits kept is not asked."""
        replica = self._replica

        def digest() -> bytes:
            assert replica.table is not None
            fresh = HashTable(replica.table.geometry, replica.table.hasher)
            fresh.rehash(replica.images)
            return fresh.digest

        found = await asyncio.to_thread(digest)
        self._link.send(self._machine.verified(found))
        if found != replica.digest:
            text = f"its digest is {found.hex()}, the committed one {replica.digest.hex()}: storage changed it"
            await asyncio.to_thread(replica.distrust, text)
            await self._link.room(0)
            error = ReplicaError(f"the secondary's image is INCONSISTENT: {text}", epoch=replica.epoch)
            self._link.end(error, tell=True)

    async def _hand_over(self) -> None:
        guest = self._guest
        assert guest is not None
        async with guest.busy:
            promoted: dict[str, Any] = await self._daemon.promote_now(guest)
        self._link.send(self._machine.promoted(promoted["term"]))
        await self._link.flush_and_end(TransportError("the guest was handed over and runs here"))

    @property
    def _replica(self) -> Replica:
        if self._guest is None:
            raise StateError("no guest was agreed on")
        return self._guest.replica


def _is_another(replica: Replica, event: HelloReceived, geometry: Geometry) -> bool:
    return replica.run != event.hello.run or replica.geometry != geometry


def _unfit(guest: Protected, event: HelloReceived, geometry: Geometry) -> tuple[str, str] | None:
    """Why this primary cannot go on with this replica, code and text. Whoever is refused disturbs no session."""
    hello, replica, name = event.hello, guest.replica, event.hello.guest
    if replica.holding == "promoted":
        return "promoted", f"guest {name} was promoted here at epoch {replica.epoch}, term {replica.term}"
    if event.term < replica.term:
        return "stale_term", f"term {event.term} is over: the replica has seen term {replica.term}"
    if replica.holding == "empty" or not _is_another(replica, event, geometry):
        return None
    if guest.session is not None and not guest.session.silent:
        return "other_run", f"the primary at {guest.session.address}, of another run of guest {name}, is connected"
    if replica.holding != "committed" or hello.replace:
        return None
    if replica.geometry != geometry:
        text = f"guest {name} has memory {_sizes(geometry)} there; the replica has {_sizes(replica.geometry)}"
        return "other_guest", text
    return (
        "other_run",
        f"the replica holds epoch {replica.epoch} of another run of guest {name}"
        f" ({replica.run.hex()[:8]}, not {hello.run.hex()[:8]}): promote it here, or give it up with"
        " `ckptd primary --replace` or `ckptd discard`",
    )


def _sizes(geometry: Geometry | None) -> str:
    return f"{geometry} ({geometry.pages} pages)" if geometry is not None else "none"
