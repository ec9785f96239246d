"""A connected socket and a real machine: every byte in order, one end, and nobody left waiting."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ckptd.daemon.link import Link, connect
from ckptd.errors import CkptdError, CorruptFrame, Refused, TransportError
from ckptd.memory.regions import Geometry
from ckptd.protocol.messages import Nack
from ckptd.protocol.peer import Event, Peer, PeerClosed, Timing
from ckptd.protocol.primary import PrimaryMachine
from ckptd.protocol.secondary import HelloReceived, SecondaryMachine
from ckptd.protocol.wire import Type
from tests.protocol.world import RUN, frames, message_frame

GEOMETRY = Geometry.of(ram=16)
CALM = Timing(10**12, 2 * 10**12)


class End:
    """One end: a link, and what it said."""

    def __init__(self, sock: socket.socket, machine: Peer) -> None:
        sock.setblocking(False)
        self.events: list[Event] = []
        self.ends: list[CkptdError] = []
        self.ended = asyncio.Event()
        self.on: Callable[[Event], None] = lambda event: None
        self.link = Link(sock, machine, self._event, self._end)

    def _event(self, event: Event) -> None:
        self.events.append(event)
        self.on(event)

    def _end(self, error: CkptdError) -> None:
        self.ends.append(error)
        self.ended.set()


def primary(timing: Timing = CALM) -> PrimaryMachine:
    return PrimaryMachine(GEOMETRY, timing, time.monotonic_ns())


def hello(machine: PrimaryMachine) -> list[Any]:
    return machine.hello("vm", "sim", RUN, 1, 1, "memory", False)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


async def receive(sock: socket.socket, size: int) -> bytes:
    loop, data = asyncio.get_running_loop(), bytearray()
    while len(data) < size:
        part = await loop.sock_recv(sock, 1 << 16)
        assert part
        data += part
    return bytes(data)


def test_many_buffers_through_a_narrow_socket_arrive_in_order() -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        far.setblocking(False)
        end, chance = End(near, primary()), random.Random(1)
        sent = b""
        for count in (1, 600, 1500):  # more buffers than one sendmsg takes
            sizes = (70_000,) if count == 1 else (0, 1, 7, 90, 4096)
            parts = [chance.randbytes(chance.choice(sizes)) for _ in range(count)]
            end.link.send([bytearray(part) if index % 2 else part for index, part in enumerate(parts)])
            sent += b"".join(parts)
        wide = memoryview(bytearray(chance.randbytes(4096 * 3))).cast("B", (3, 4096))
        end.link.send([wide])
        sent += bytes(wide)
        waiting = [asyncio.create_task(end.link.room(limit)) for limit in (0, len(sent) // 2)]
        await asyncio.sleep(0)
        assert end.link.queued > 0 and not waiting[0].done()
        assert await receive(far, len(sent)) == sent
        await asyncio.gather(*waiting)
        assert end.link.queued == 0 and end.link.sent_bytes == len(sent)
        await end.link.room(0)
        far.close()
        await end.ended.wait()

    run(main())


def test_nothing_is_read_while_it_is_held() -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        end = End(near, SecondaryMachine(CALM, time.monotonic_ns()))
        end.on = lambda event: end.link.hold()
        machine = primary()
        far.sendall(b"".join(hello(machine)))
        far.close()
        while not end.events:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert isinstance(end.events[0], HelloReceived) and not end.ends
        end.link.hold()  # twice is once
        end.link.go_on()
        end.link.go_on()
        await end.ended.wait()
        assert len(end.ends) == 1 and end.link.closed

    run(main())


def test_the_end_is_told_once_and_to_all_who_wait() -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        end = End(near, primary())
        end.link.send([bytes(64 << 20)])
        waiting = [asyncio.create_task(end.link.room(0)) for _ in range(3)]
        await asyncio.sleep(0)
        far.close()
        await end.ended.wait()
        for task in waiting:
            with pytest.raises(TransportError):
                await task
        with pytest.raises(TransportError):
            await end.link.room(1 << 30)
        end.link.send([b"nobody gets this"])
        end.link.hold()
        end.link.go_on()
        end.link.end(TransportError("again"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(end.ends) == 1 and near.fileno() == -1 and end.link.queued == 0

    run(main())


def test_the_peers_reason_is_heard_even_when_sending_fails_first() -> None:
    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        near = await connect(*listener.getsockname(), buffer_bytes=1 << 16, timeout_ns=10**10)
        far, _ = listener.accept()
        listener.close()
        machine = primary()
        end = End(near, machine)

        def refuse(event: Event) -> None:
            assert isinstance(event, PeerClosed)
            raise Refused(event.text, code=event.code)

        end.on = refuse
        end.link.send(hello(machine))
        # with the HELLO unread, closing resets the connection
        far.sendall(message_frame(Nack("no_space", "the disk is full", 0, 0)))
        far.close()
        time.sleep(0.1)  # the loop stands still, so the reset is there before anything is read
        for _ in range(3):
            end.link.send([bytes(1 << 20)])
        await end.ended.wait()
        assert isinstance(end.ends[0], Refused) and "the disk is full" in str(end.ends[0])
        assert len(end.ends) == 1

    run(main())


def test_a_broken_rule_is_answered_with_a_word() -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        far.setblocking(False)
        end = End(near, SecondaryMachine(CALM, time.monotonic_ns()))
        far.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
        await end.ended.wait()
        assert isinstance(end.ends[0], CorruptFrame)
        word = next(frames(await asyncio.get_running_loop().sock_recv(far, 4096)))
        assert word.header.type is Type.NACK
        far.close()

    run(main())


def test_a_defect_ends_the_connection() -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        end = End(near, SecondaryMachine(CALM, time.monotonic_ns()))

        def defect(event: Event) -> None:
            raise ZeroDivisionError("ours")

        end.on = defect
        far.sendall(b"".join(hello(primary())))
        await end.ended.wait()
        assert "a defect of ckptd" in str(end.ends[0])
        far.close()

    run(main())


def test_silence_ends_the_connection() -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        machine = primary(Timing(10**7, 10**8))
        end = End(near, machine)
        end.link.send(hello(machine))
        await end.ended.wait()
        assert isinstance(end.ends[0], TransportError) and "nothing heard" in str(end.ends[0])
        far.close()

    run(main())


def test_nobody_listens() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        with pytest.raises(TransportError, match=f"127.0.0.1:{port}"):
            await connect("127.0.0.1", port, buffer_bytes=1 << 16, timeout_ns=10**9)
        with pytest.raises(TransportError, match="has no address"):
            await connect("no.such.name.invalid", 1, buffer_bytes=1 << 16, timeout_ns=10**9)

    run(main())
