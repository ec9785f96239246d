"""What an operator asks of a primary, done between two epochs: a checkpoint now, a verification, a switchover."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ckptd.daemon.link import Link
from ckptd.daemon.shipper import Flight
from ckptd.errors import CkptdError, Fenced, LocalProtocolError, StateError, VerifyFailed
from ckptd.protocol.primary import PrimaryMachine

if TYPE_CHECKING:
    from ckptd.daemon.primary import PrimaryDaemon

__all__ = ["Request", "cause_of", "serve"]


@dataclass(slots=True)
class Request:
    """One wish and where its answer goes."""

    kind: Literal["checkpoint", "verify", "switchover"]
    answer: asyncio.Future[dict[str, Any]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: CkptdError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


async def serve(daemon: PrimaryDaemon, request: Request, link: Link, machine: PrimaryMachine) -> None:
    """Do it and answer it. An error that ends the link goes to both, the asker and the session."""
    work = {"checkpoint": _checkpoint, "verify": _verify, "switchover": _switchover}[request.kind]
    try:
        answer = await work(daemon, link, machine)
    except VerifyFailed as error:
        request.fail(error)
    except CkptdError as error:
        request.fail(cause_of(error, link))
        raise
    else:
        if not request.answer.done():
            request.answer.set_result(answer)


def cause_of(error: CkptdError, link: Link | None) -> CkptdError:
    """Whoever sends after the peer's last word is stopped by the machine; what ended the link is the cause."""
    if isinstance(error, LocalProtocolError) and link is not None and link.error is not None:
        return link.error
    return error


async def _checkpoint(daemon: PrimaryDaemon, link: Link, machine: PrimaryMachine) -> dict[str, Any]:
    flight = await daemon.ship(link, machine)
    await daemon.wait_acknowledged(flight.epoch, link)
    return {"epoch": flight.epoch, "pages": flight.pages, "digest": _digest(daemon)}


async def _verify(daemon: PrimaryDaemon, link: Link, machine: PrimaryMachine) -> dict[str, Any]:
    """Both ends hash all of their memory at one epoch; the guest is paused for our half of it."""
    began = time.monotonic_ns()
    flight = await _ship_and_stay(daemon, link, machine)
    try:
        theirs = daemon.expect_verified(link)
        link.send(machine.verify())
        try:
            await asyncio.to_thread(daemon.shipper.check_memory)  # heartbeats go on meanwhile
        except CkptdError as error:
            daemon.shipper.continuous = False  # the next epoch compares all of memory and sends what was missed
            raise VerifyFailed(f"the guest's memory is not what was shipped: {error}", epoch=flight.epoch) from error
    finally:
        await daemon.guest.resume()
    digest = (await theirs).hex()
    if digest != _digest(daemon):
        raise VerifyFailed(
            f"the secondary's image has digest {digest}, ours is {_digest(daemon)}", epoch=flight.epoch,
            hint="its storage lost or changed pages; it is resynchronised now, but look at that machine",
        )  # fmt: skip
    return {
        "epoch": flight.epoch, "digest": digest, "equal": True, "took_ms": round((time.monotonic_ns() - began) / 1e6, 1)
    }  # fmt: skip


async def _switchover(daemon: PrimaryDaemon, link: Link, machine: PrimaryMachine) -> dict[str, Any]:
    """Planned promotion: the last epoch with the guest paused for good, both digests equal, then the other side goes
    on.
    """
    flight = await _ship_and_stay(daemon, link, machine, final=True)
    try:
        await daemon.wait_acknowledged(flight.epoch, link)
        promoted = daemon.expect_promoted(link)
        link.send(machine.handover())
    except Fenced:
        raise
    except CkptdError:
        await daemon.guest.resume()  # HANDOVER was not sent: nobody else can run the guest
        raise
    # From here on only the secondary's word tells who runs the guest, so this side stays silent until it comes.
    try:
        there = await promoted
    except Fenced:
        raise
    except CkptdError as error:
        raise Fenced(
            f"the link broke during the handover ({error}): the secondary may run the guest",
            hint="look at `ckptd status` there; promote it there, or end it there and restart this daemon",
            epoch=flight.epoch,
        ) from error  # fmt: skip
    daemon.handed_over = True
    daemon.condition.become("promoted", f"the guest runs on the secondary in term {there.term}")
    return {
        "epoch": flight.epoch, "term": there.term, "digest": there.digest.hex(),
        "digest_equal": there.digest.hex() == _digest(daemon),
        "downtime_ms": round((time.monotonic_ns() - flight.began) / 1e6, 3), "iterations": flight.iterations,
        "pages": flight.pages,
    }  # fmt: skip


async def _ship_and_stay(
    daemon: PrimaryDaemon, link: Link, machine: PrimaryMachine, *, final: bool = False
) -> Flight:  # fmt: skip
    """One epoch, after which the guest stays paused; it goes on if the epoch cannot be shipped."""
    try:
        return await daemon.ship(link, machine, final=final, stay=True)
    except CkptdError:
        with suppress(StateError):  # not paused yet
            await daemon.guest.resume()
        raise


def _digest(daemon: PrimaryDaemon) -> str:
    table = daemon.shipper.table
    assert table is not None
    return table.digest.hex()
