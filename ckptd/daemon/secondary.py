"""The secondary daemon: one listener, one replica for each configured guest, at most one primary for each.

    connection -> HELLO -> refuse, or welcome -> epochs: commit, acknowledge, apply -> connection lost -> the image
    stays at its epoch

Sessions are in session.py; this module has what outlives them: the replicas, promotion, and what an operator asks.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from ckptd.config import GuestEntry, SecondaryConfig
from ckptd.daemon.condition import Condition
from ckptd.daemon.link import tune
from ckptd.daemon.session import Session
from ckptd.errors import GuestError, Inconsistent, StateError, TransportError
from ckptd.guests.base import Standby, guest_kind
from ckptd.replica.history import restore
from ckptd.replica.recording import export
from ckptd.replica.replica import Replica

__all__ = ["Protected", "SecondaryDaemon"]


_ACCEPT_AGAIN = 1.0  # seconds


class Protected:
    """One configured guest: its replica, its standby, and the session of its primary, if there is one."""

    def __init__(self, entry: GuestEntry, replica: Replica, standby: Standby) -> None:
        self.entry, self.replica, self.standby = entry, replica, standby
        self.session: Session | None = None
        self.log = structlog.get_logger().bind(guest=entry.name)
        self.condition = Condition("waiting", "no primary has connected yet", self._report)
        if replica.reason:
            self.condition.become("unprotected", f"INCONSISTENT: {replica.reason}")
        self.busy = asyncio.Lock()  # held while files of the replica are read or moved outside of a session
        self.committed_at = 0.0
        self.activation_failed = False  # promoted, but the guest did not start: the image is still the epoch

    async def have_standby(self) -> None:
        """A warm process waits; one that has died is replaced."""
        if not self.standby.alive():
            await self.standby.end()
        await self.standby.prepare()

    async def find_promoted(self) -> str:
        """What has become of the guest that was promoted here, as a reason for the operator."""
        text = f"promoted at epoch {self.replica.epoch}"
        try:
            await self.standby.prepare()
        except GuestError as error:
            return f"{text}; its guest does not answer this daemon: {error.message}"
        return text if self.standby.facts().get("active") else f"{text}, but its guest has ended"

    def _report(self, word: str, reason: str) -> None:
        self.log.info(word, reason=reason, epoch=self.replica.epoch)

    def status(self) -> dict[str, Any]:
        replica, session = self.replica, self.session
        return {
            "guest": self.entry.name, "kind": replica.kind or self.entry.kind, **self.condition.as_dict(),
            "holding": replica.holding, "inconsistent": replica.reason or None, "epoch": replica.epoch,
            "term": replica.term, "digest": replica.digest.hex(), "committed_at": self.committed_at,
            "memory_bytes": replica.geometry.size_bytes if replica.geometry else 0,
            "primary": session.address if session else None,
            "receiving_epoch": session.receiving if session else 0,
            "pages_received": session.pages_received if session else 0,
            "bytes_received": session.bytes_received if session else 0, "outputs_mark": replica.mark,
            "standby": self.standby.facts(),
        }  # fmt: skip


class SecondaryDaemon:
    """Holds replicas until they are needed."""

    def __init__(self, config: SecondaryConfig) -> None:
        self.config = config
        self.guests: dict[str, Protected] = {}
        self._log = structlog.get_logger()
        self._listener: socket.socket | None = None
        self._sessions: set[Session] = set()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until stopped. Raises ReplicaError or TransportError when it cannot begin."""
        self._listener = self._listen()
        for entry in self.config.guest:
            self.guests[entry.name] = guest = self._open(entry)
            if guest.replica.holding == "promoted":  # the guest outlived the daemon that promoted it
                guest.condition.become("promoted", await guest.find_promoted())
        loop = asyncio.get_running_loop()
        loop.add_reader(self._listener.fileno(), self._accept)
        self._log.info("listening", address=self.config.listen.address)
        try:
            await self._stop.wait()
        finally:
            loop.remove_reader(self._listener.fileno())
            self._listener.close()
            for session in list(self._sessions):
                await session.leave("the secondary ends; its replica stays")
            for guest in self.guests.values():
                if guest.replica.holding == "promoted":
                    await guest.standby.detach()
                else:
                    await guest.standby.end()
                guest.replica.close()

    def stop(self) -> None:
        self._stop.set()

    def reload(self, config: SecondaryConfig) -> None:
        """Take over the keys that can change while running."""
        self.config = config
        for guest in self.guests.values():
            guest.replica.keep(config.replica.history, config.replica.history_bytes)
        for session in self._sessions:
            session.retime(config.link.heartbeat, config.link.timeout)

    def _open(self, entry: GuestEntry) -> Protected:
        settings = self.config.replica
        began = time.monotonic()
        replica = Replica.open(
            settings.dir / entry.name, guest=entry.name, history=settings.history, history_bytes=settings.history_bytes,
            reserve=settings.reserve, max_memory=settings.max_memory,
        )  # fmt: skip
        self._log.info(
            "replica opened", guest=entry.name, holding=replica.holding, epoch=replica.epoch,
            seconds=round(time.monotonic() - began, 3),
        )  # fmt: skip
        runtime = self.config.runtime.dir / entry.name
        runtime.mkdir(parents=True, exist_ok=True)
        return Protected(entry, replica, guest_kind(entry.kind).make_standby(entry, runtime))

    def _listen(self) -> socket.socket:
        host, port = self.config.listen.host_port
        try:
            family, kind, proto, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, proto)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(16)
        except OSError as error:
            raise TransportError(
                f"cannot listen on {self.config.listen.address}: {error.strerror or error}",
                hint="is another secondary running, or is listen.address not one of this host?",
            ) from error
        listener.setblocking(False)
        return listener

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._log.warning("cannot accept a connection", reason=error.strerror)
                loop = asyncio.get_running_loop()  # out of descriptors, most likely: again at once changes nothing
                loop.remove_reader(self._listener.fileno())
                loop.call_later(_ACCEPT_AGAIN, self._accept_again)
                return
            peer = f"{address[0]}:{address[1]}"
            if len(self._sessions) >= self.config.link.max_connections:
                self._log.warning("connection refused: link.max_connections are open", peer=peer)
                sock.close()
                continue
            tune(sock, self.config.link.buffer)
            self._sessions.add(Session(self, sock, peer))

    def _accept_again(self) -> None:
        if self._listener is not None and not self._stop.is_set():
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def ended(self, session: Session) -> None:
        """A session is over."""
        self._sessions.discard(session)

    # --- what an operator asks

    def find(self, name: str | None) -> Protected:
        """The guest of that name, or the only one. Raises StateError naming those there are."""
        names = ", ".join(self.guests)
        if name is None and len(self.guests) == 1:
            return next(iter(self.guests.values()))
        if name is None:
            raise StateError("this secondary holds several guests", hint=f"say --guest and one of: {names}")
        if name not in self.guests:
            raise StateError(f"this secondary has no guest {name!r}", hint=f"guests: {names}")
        return self.guests[name]

    async def promote(self, name: str | None, *, force: bool = False) -> dict[str, Any]:
        """The primary is gone: run the guest here, in a new term. Raises StateError, Inconsistent or GuestError."""
        guest = self.find(name)
        session = guest.session
        if session is not None and not session.silent and not force:
            raise StateError(
                f"the primary at {session.address} is connected and alive",
                hint="use `ckptd switchover` on the primary's host, or --force if that machine must be given up",
            )
        if session is not None:
            await session.leave("promoted here")
        async with guest.busy:
            return await self.promote_now(guest)

    async def promote_now(self, guest: Protected) -> dict[str, Any]:
        """Promote what is committed; the session, if any, must not touch the replica meanwhile."""
        replica, began = guest.replica, time.monotonic_ns()
        if replica.holding == "promoted" and not guest.activation_failed:
            raise StateError("the guest runs here already", epoch=replica.epoch, term=replica.term)
        if not (replica.holding == "committed" or guest.activation_failed) or replica.geometry is None:
            raise Inconsistent(
                "there is no committed epoch to promote" + (f": {replica.reason}" if replica.reason else ""),
                hint="only the primary can complete it; see `ckptd status` for how far it is",
            )
        if not guest.activation_failed:
            replica.promote(replica.term + 1)
        term, guest.activation_failed = replica.term, True
        await guest.have_standby()
        await guest.standby.activate(
            replica.geometry, replica.descriptors(), replica.state, replica.held, replica.released
        )
        guest.activation_failed = False
        took = (time.monotonic_ns() - began) / 1e6
        guest.condition.become("promoted", f"promoted at epoch {replica.epoch} in term {term}")
        return {
            "guest": guest.entry.name, "epoch": replica.epoch, "term": term, "digest": replica.digest.hex(),
            "promote_ms": round(took, 3), "standby": guest.standby.facts(),
        }  # fmt: skip

    async def discard(self, name: str | None) -> dict[str, Any]:
        """Give up what is held of a guest. Raises StateError while its primary is connected or the guest runs here."""
        guest = self.find(name)
        if guest.session is not None:
            raise StateError("the primary is connected", hint="stop it first")
        if guest.replica.holding == "promoted" and guest.standby.alive():
            raise StateError("the guest runs here, over this replica", hint="end it first")
        epoch = guest.replica.epoch
        async with guest.busy:
            guest.replica.discard()
        guest.condition.become("waiting", "what was held was discarded")
        return {"guest": guest.entry.name, "discarded_epoch": epoch}

    async def history(self, name: str | None) -> dict[str, Any]:
        guest = self.find(name)
        return {"guest": guest.entry.name, "epochs": [entry.as_dict() for entry in guest.replica.history()]}

    async def restore(self, name: str | None, epoch: int, out: Path) -> dict[str, Any]:
        """Write the image as of a retained epoch; commits go on meanwhile."""
        guest = self.find(name)
        return await self._beside_commits(guest, lambda: restore(guest.replica, epoch, out).as_dict())

    async def record(self, name: str | None, out: Path) -> dict[str, Any]:
        """Write the retained history as one recording."""
        guest = self.find(name)
        return await self._beside_commits(guest, lambda: export(guest.replica, out).as_dict())

    async def _beside_commits(self, guest: Protected, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if guest.replica.holding != "committed":
            raise StateError(f"the replica is {guest.replica.holding}, not at a committed epoch")
        return await asyncio.to_thread(work)  # not under `busy`: a promotion must not wait for it

    def status(self) -> dict[str, Any]:
        """All that an operator can ask for, as JSON."""
        return {
            "role": "secondary", "listen": self.config.listen.address, "connections": len(self._sessions),
            "pid": os.getpid(), "guests": [guest.status() for guest in self.guests.values()],
        }  # fmt: skip


