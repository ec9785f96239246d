"""The gate of a QEMU guest: what its network devices send, held outside QEMU, by a thread of its own.

A filter-redirector on each network device hands every packet that the guest sends to a socket of ours, as {u32
big-endian length, bytes}, and delivers what comes back on a second one (QEMU net/filter-mirror.c). QEMU writes a packet
before it goes on, so once the guest is stopped, all that it has said is in the sockets: `mark` reads them empty, and
the number of the last packet is the mark. If this process dies QEMU drops the packets: it fails closed (P5).

The head is in memory that the daemon maps, so that a release is two stores and a wake, whatever the epoch loop does:

    offset 0    u64 written    packets that the guest has sent             moved by the holder
    offset 64   u64 wanted     packets that may leave                      moved by the daemon
    offset 128  u64 released   packets that were handed back to QEMU       moved by the holder
    offset 192  u64 held       bytes that wait, for leave or for QEMU      set by the holder
    offset 256  u64 full       1: more than the capacity is held           set by the holder
    offset 320  u64 holding    0: nothing is held, packets pass through    set by the guest's process

A gate that is full cannot make QEMU wait: its main loop, which also answers the monitor, would stand still, and nobody
could be released any more. So it takes what comes, and has the guest stopped (process.py): it never drops.

While the guest stands QEMU keeps what it is given until the guest goes on, but no more than its queue holds, and drops
what is beyond that: so the others wait here.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError

__all__ = ["GATE_BYTES", "Holder", "QemuGate"]

GATE_BYTES = 4096

_WRITTEN, _WANTED, _RELEASED, _HELD, _FULL, _HOLDING = range(0, 48, 8)
_READ = 1 << 16
_LENGTH = struct.Struct(">I")
_MOST = 1 << 20  # bytes of a packet; QEMU sends at most 69,632
_QUEUE = 5000  # packets; a QEMU whose guest stands keeps 10,000 for each netdev, and drops the others


class QemuGate:
    """The daemon's side. `wake`: an eventfd that wakes the holder."""

    def __init__(self, head: npt.NDArray[np.uint8], wake: int) -> None:
        self._head = head.view(np.uint64)
        self._wake = wake
        self.marked = 0  # at the last pause; the guest's process says it with its answer

    @property
    def written(self) -> int:
        return int(self._head[_WRITTEN])

    @property
    def released(self) -> int:
        """What may leave; the holder is about to let go of it, if it has not already."""
        return int(self._head[_WANTED])

    @property
    def full(self) -> bool:
        return bool(self._head[_FULL])

    @property
    def held_bytes(self) -> int:
        return int(self._head[_HELD])

    def mark(self) -> int:
        return self.marked

    def held(self, mark: int) -> bytes:
        """Nothing: a packet that was not released is one that the network has lost, and its sender repeats it."""
        return b""

    def release(self, mark: int) -> int:
        before = self.released
        if mark > self.written:
            raise GuestError(f"there is no packet {mark} yet: the guest has sent {self.written}")
        if mark > before:
            self._head[_WANTED] = mark
            os.eventfd_write(self._wake, 1)
        return max(0, mark - before)


class _Lane:
    """One network device: what came, what waits for its number, what waits for QEMU to take it."""

    def __init__(self, name: str, out: socket.socket, back: socket.socket) -> None:
        self.name, self.out, self.back = name, out, back
        for sock in (out, back):
            sock.setblocking(False)
        self.partial = bytearray()
        self.waiting: deque[tuple[int, int, bytes]] = deque()  # number of the last packet, how many, and packets
        self.leaving: deque[tuple[int, memoryview]] = deque()  # how many packets, and what is left of them
        self.waiting_bytes = self.leaving_bytes = 0
        self.allowed = _QUEUE
        self.open = True

    def take(self, written: int) -> int:
        """Read what is there, numbered from `written` + 1 on; the number of the last whole packet."""
        while self.open:
            try:
                data = self.out.recv(_READ)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.open = False
            self.partial += data
            written = self._cut(written)
        return written

    def _cut(self, written: int) -> int:
        count = at = 0
        size, packets = len(self.partial), self.partial
        while at + _LENGTH.size <= size:
            length = _LENGTH.unpack_from(packets, at)[0]
            if length > _MOST:
                raise GuestError(f"QEMU says that a packet has {length} bytes", netdev=self.name)
            if at + _LENGTH.size + length > size:
                break
            at += _LENGTH.size + length
            count += 1
        if count:
            self.waiting.append((written + count, count, bytes(packets[:at])))
            self.waiting_bytes += at
            del packets[:at]
        return written + count

    def let_go(self, wanted: int) -> None:
        """Whatever is numbered up to `wanted` may leave."""
        while self.waiting and self.waiting[0][0] <= wanted:
            _, count, packets = self.waiting.popleft()
            self.leaving.append((count, memoryview(packets)))
            self.waiting_bytes -= len(packets)
            self.leaving_bytes += len(packets)

    def can_push(self, standing: bool) -> bool:
        return bool(self.leaving) and (not standing or self.leaving[0][0] <= self.allowed)

    def push(self, standing: bool) -> None:
        """As much to QEMU as it takes now, and keeps."""
        while self.can_push(standing):
            count, piece = self.leaving[0]
            try:
                sent = self.back.send(piece)
            except BlockingIOError:
                return
            except OSError:  # QEMU is gone, and with it whoever could take it
                self.leaving.clear()
                self.leaving_bytes = 0
                return
            self.leaving_bytes -= sent
            if standing:
                self.allowed -= count
            if sent == len(piece):
                self.leaving.popleft()
            else:  # of a packet that is on its way, the rest must follow
                self.leaving[0] = (0 if standing else count), piece[sent:]


class Holder:
    """The holding side, with its thread. `notice` is called, from any thread, when `full` has changed."""

    def __init__(self, head: npt.NDArray[np.uint8], capacity: int, notice: Callable[[], None]) -> None:
        self._head = head.view(np.uint64)
        self._capacity = capacity
        self._notice = notice
        self._lanes: list[_Lane] = []
        self._lock = threading.Lock()
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.trouble = ""
        self._ended = self._standing = False
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)
        self._thread.start()

    def add(self, name: str, out: socket.socket, back: socket.socket) -> None:
        """A network device: its two sockets are the holder's from here on."""
        with self._lock:
            self._lanes.append(_Lane(name, out, back))
        os.eventfd_write(self.wake, 1)

    @property
    def full(self) -> bool:
        return bool(self._head[_FULL])

    @property
    def holding(self) -> bool:
        return bool(self._head[_HOLDING])

    def hold(self) -> None:
        """From here on nothing leaves that the daemon has not released."""
        with self._lock:
            self._take()
            self._head[_HOLDING] = 1

    def stand(self) -> None:
        """The guest stands: from here on QEMU has a queue to fill."""
        with self._lock:
            self._standing = True
            for lane in self._lanes:
                lane.allowed = _QUEUE

    def go(self) -> None:
        """The guest runs: QEMU passes on what it is given."""
        with self._lock:
            self._standing = False
        os.eventfd_write(self.wake, 1)

    def mark(self) -> int:
        """With the guest stopped: the number of the last packet that it has sent."""
        with self._lock:
            self._take()
            return int(self._head[_WRITTEN])

    def open(self) -> None:
        """Let go of everything, and hold nothing any more."""
        with self._lock:
            self._head[_HOLDING] = 0
            self._take()

    def drained(self) -> bool:
        """QEMU has taken everything that was let go, or all that it has room for."""
        with self._lock:
            self._take()
            return all(not lane.can_push(self._standing) and not _unread(lane.back) for lane in self._lanes)

    @property
    def leaving_bytes(self) -> int:
        """What was let go, and QEMU has not taken yet."""
        return sum(lane.leaving_bytes for lane in self._lanes)

    def lost(self) -> Sequence[str]:
        """Devices whose filter QEMU has taken away."""
        return [lane.name for lane in self._lanes if not lane.open]

    def close(self) -> None:
        self._ended = True
        os.eventfd_write(self.wake, 1)
        self._thread.join()
        for lane in self._lanes:
            lane.out.close()
            lane.back.close()
        os.close(self.wake)

    # --- the thread

    def _run(self) -> None:
        while not self._ended:
            with self._lock:
                lanes, standing = list(self._lanes), self._standing
            poll = select.poll()
            poll.register(self.wake, select.POLLIN)
            for lane in lanes:
                if lane.open:
                    poll.register(lane.out, select.POLLIN)
                if lane.can_push(standing):
                    poll.register(lane.back, select.POLLOUT)
            poll.poll()
            with suppress(BlockingIOError):
                os.eventfd_read(self.wake)
            try:
                with self._lock:
                    self._take()
            except GuestError:
                return

    def _take(self) -> None:
        """Everything that can be done now. The lock is held."""
        head = self._head
        written = int(head[_WRITTEN])
        if self.trouble:  # nothing leaves any more, and no mark is right
            raise GuestError(self.trouble)
        try:
            for lane in self._lanes:
                head[_WRITTEN] = written = lane.take(written)
        except GuestError as error:
            self.trouble = str(error)
            self._notice()
            raise
        if not head[_HOLDING]:
            head[_WANTED] = written
        wanted = int(head[_WANTED])
        for lane in self._lanes:
            lane.let_go(wanted)
            lane.push(self._standing)
        head[_RELEASED] = wanted
        waiting, leaving = sum(lane.waiting_bytes for lane in self._lanes), self.leaving_bytes
        head[_HELD] = waiting + leaving
        # Half of it must be free again before the guest goes on: or it would stop after every packet. What QEMU takes
        # only while the guest runs is no reason to have it stand.
        if head[_FULL]:
            stuck = self._standing and not any(lane.can_push(True) for lane in self._lanes)
            full = waiting > self._capacity // 2 or (leaving > self._capacity and not stuck)
        else:
            full = waiting > self._capacity or leaving > 2 * self._capacity
        if full != bool(head[_FULL]):
            head[_FULL] = full
            self._notice()


def _unread(sock: socket.socket) -> int:
    """Bytes that the other side has not read yet (SIOCOUTQ of a unix socket)."""
    import fcntl
    import termios

    buffer = bytearray(4)
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, buffer)
    return int.from_bytes(buffer, "little")
