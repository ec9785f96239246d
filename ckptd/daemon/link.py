"""One TCP connection between the daemons, driving one protocol machine.

Sends lists of buffers with sendmsg and receives into the buffers that the machine names, so page bytes cross this
module without a copy of ours. Knows frames only as bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable

import structlog

from ckptd.errors import CkptdError, TransportError
from ckptd.protocol.peer import Buffers, Event, Peer

__all__ = ["Link", "connect", "tune"]

_IOV_MAX = 512
_READ_QUANTUM = 8 << 20  # bytes received before other tasks get a turn


class Link:
    """A connected socket, its machine, and the two callbacks that the owner gives.

    `on_event(event)` hears what the machine says; it may call `send`, and `hold()` to stop reading until `go_on()`.
    `on_end(error)` hears the end of the connection, once; the socket is closed by then.
    """

    def __init__(
        self,
        sock: socket.socket,
        machine: Peer,
        on_event: Callable[[Event], None],
        on_end: Callable[[CkptdError], None],
    ) -> None:
        self._sock = sock
        self._fd = sock.fileno()
        self.machine = machine
        self._on_event, self._on_end = on_event, on_end
        self._loop = asyncio.get_running_loop()
        self._queue: deque[memoryview] = deque()
        self.queued = 0
        self.sent_bytes = self.received_bytes = 0
        self._writing = self._held = self._broken = False
        self._room: list[tuple[int, asyncio.Future[None]]] = []
        self.error: CkptdError | None = None
        self._loop.add_reader(self._fd, self._readable)
        self._pulse = self._loop.call_later(0.05, self._tick)

    @property
    def closed(self) -> bool:
        return self.error is not None

    # --- out

    def send(self, buffers: Buffers) -> None:
        """Queue buffers and send what the socket takes now.

        They must stay unchanged until `queued` is below what it is now.
        """
        if self.error is not None or self._broken:
            return
        for buffer in buffers:
            view = memoryview(buffer).cast("B") if not isinstance(buffer, bytes) else memoryview(buffer)
            if len(view):
                self._queue.append(view)
                self.queued += len(view)
        if not self._writing:
            self._writable()

    async def room(self, limit: int) -> None:
        """Return when at most `limit` bytes wait to be sent. Raises what ended the link."""
        if self.error is not None:
            raise self.error
        if self.queued > limit:
            future = self._loop.create_future()
            self._room.append((limit, future))
            await future

    def _writable(self) -> None:
        queue = self._queue
        try:
            while queue:
                parts = [queue[index] for index in range(min(len(queue), _IOV_MAX))]
                sent = self._sock.sendmsg(parts)
                self.queued -= sent
                self.sent_bytes += sent
                while sent:
                    first = queue[0]
                    if sent < len(first):
                        queue[0] = first[sent:]
                        break
                    sent -= len(first)
                    queue.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            broken = TransportError(f"the link broke while sending: {error.strerror or error}")
            self._broken = True
            if self._writing:
                self._writing = False
                self._loop.remove_writer(self._fd)
            self._loop.call_soon(self._hear_out, broken)
            return
        if bool(queue) != self._writing:
            self._writing = bool(queue)
            if self._writing:
                self._loop.add_writer(self._fd, self._writable)
            else:
                self._loop.remove_writer(self._fd)
        if self._room:
            self._wake()

    def _wake(self) -> None:
        waiting, self._room = self._room, []
        for limit, future in waiting:
            if future.done():
                continue
            if self.queued <= limit:
                future.set_result(None)
            else:
                self._room.append((limit, future))

    def _hear_out(self, broken: TransportError) -> None:
        """Before it closed, the peer may have said why: that is what the operator must read."""
        if self.error is None and not self._held:
            self._readable()
        self.end(broken)

    # --- in

    def hold(self) -> None:
        """Stop reading: the peer's next frames wait in the socket."""
        if not self._held and self.error is None:
            self._held = True
            self._loop.remove_reader(self._fd)

    def go_on(self) -> None:
        """Read again, starting with what the machine has already."""
        if self._held and self.error is None:
            self._held = False
            self._loop.add_reader(self._fd, self._readable)
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        if self.error is None and not self._held:
            self._guarded(self._events)

    def _readable(self) -> None:
        self._guarded(self._receive)

    def _receive(self) -> None:
        quantum = _READ_QUANTUM
        machine, sock = self.machine, self._sock
        while quantum > 0 and self.error is None and not self._held:
            area = machine.buffer()
            try:
                count = sock.recv_into(area)
            except (BlockingIOError, InterruptedError):
                return
            if not count:
                machine.end_of_stream()
                raise TransportError("the peer closed the connection")
            machine.received(count, time.monotonic_ns())
            self.received_bytes += count
            quantum -= count
            self._events()
            if count < len(area):
                return

    def _events(self) -> None:
        while self.error is None and not self._held:
            event = self.machine.next_event()
            if event is None:
                return
            self._on_event(event)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self.end(TransportError(f"the link broke while receiving: {error.strerror or error}"))
        except TransportError as error:
            self.end(error)
        except CkptdError as error:
            self.end(error, tell=True)
        except Exception as error:  # a defect of ours: the connection must not hang on it
            structlog.get_logger().exception("a defect of ckptd")
            self.end(CkptdError(f"a defect of ckptd: {error!r}"), tell=True)

    # --- both

    def _tick(self) -> None:
        if self.error is not None:
            return
        if not self._held:
            self._guarded(self._receive)  # what waits in the socket counts, however late this loop is
            if self.error is not None:
                return
        try:
            self.send(self.machine.tick(time.monotonic_ns(), listening=not self._held))
        except TransportError as error:
            self.end(error)
        else:
            self._pulse = self._loop.call_later(0.05, self._tick)

    def end(self, error: CkptdError, *, tell: bool = False) -> None:
        """Close, once. `tell` sends the reason to the peer as a NACK if the socket takes it."""
        if self.error is not None:
            return
        if tell and not isinstance(error, TransportError):
            with contextlib.suppress(OSError, CkptdError):
                # Only a NACK that starts at a frame boundary can be read.
                if not self._queue:
                    self._sock.sendmsg([bytes(part) for part in self.machine.nack(error)])
        self.error = error
        self._pulse.cancel()
        if not self._held:
            self._loop.remove_reader(self._fd)
        if self._writing:
            self._loop.remove_writer(self._fd)
        self._queue.clear()
        self.queued = 0
        self._sock.close()
        for _, future in self._room:
            if not future.done():
                future.set_exception(error)
        self._room.clear()
        self._on_end(error)

    async def flush_and_end(self, error: CkptdError) -> None:
        """Send what is queued (a BYE, a NACK), then close."""
        with contextlib.suppress(CkptdError, asyncio.TimeoutError):
            await asyncio.wait_for(self.room(0), 1.0)
        self.end(error)


def tune(sock: socket.socket, buffer_bytes: int) -> None:
    """The socket options of both ends: no delay, and room for a batch in the kernel."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)


async def connect(host: str, port: int, *, buffer_bytes: int, timeout_ns: int) -> socket.socket:
    """A connected socket. Raises TransportError naming the address."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TransportError(
            f"{host} has no address: {error.strerror or error}", hint="check secondary.address"
        ) from error
    last: OSError | None = None
    for family, kind, proto, _, address in found:
        sock = socket.socket(family, kind, proto)
        try:
            tune(sock, buffer_bytes)
            await asyncio.wait_for(loop.sock_connect(sock, address), timeout_ns / 1e9)
        except (TimeoutError, OSError) as error:
            sock.close()
            last = error if isinstance(error, OSError) else TimeoutError("timed out")
        else:
            return sock
    raise TransportError(
        f"cannot connect to the secondary at {host}:{port}: {getattr(last, 'strerror', None) or last}",
        hint="is `ckptd secondary` running there?",
    )
