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
_READ = 1 << 18
_LENGTH = struct.Struct(">I")
_MOST = 1 << 20  # bytes of a packet; QEMU sends at most 69,632


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
        self.waiting: deque[tuple[int, bytes]] = deque()  # the number of the last packet in it, and packets
        self.leaving: deque[memoryview] = deque()
        self.held_bytes = 0
        self.open = True

    def take(self) -> tuple[int, bytes]:
        """Read what is there: how many whole packets, and these."""
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
        whole = bytes(packets[:at])
        del packets[:at]
        self.held_bytes += at
        return count, whole

    def push(self) -> None:
        """As much to QEMU as it takes now."""
        while self.leaving:
            piece = self.leaving[0]
            try:
                sent = self.back.send(piece)
            except BlockingIOError:
                return
            except OSError:  # QEMU is gone, and with it whoever could take it
                self.leaving.clear()
                self.held_bytes = sum(len(data) for _, data in self.waiting)
                return
            self.held_bytes -= sent
            if sent == len(piece):
                self.leaving.popleft()
            else:
                self.leaving[0] = piece[sent:]


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
        self._ended = False
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
        """QEMU has taken everything that was let go."""
        with self._lock:
            self._take()
            return all(not lane.leaving and not _unread(lane.back) for lane in self._lanes)

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

    # --- the thread

    def _run(self) -> None:
        while not self._ended:
            with self._lock:
                lanes = list(self._lanes)
            poll = select.poll()
            poll.register(self.wake, select.POLLIN)
            for lane in lanes:
                if lane.open:
                    poll.register(lane.out, select.POLLIN)
                if lane.leaving:
                    poll.register(lane.back, select.POLLOUT)
            poll.poll()
            with suppress(BlockingIOError):
                os.eventfd_read(self.wake)
            try:
                with self._lock:
                    self._take()
            except GuestError as error:
                self.trouble = str(error)
                self._notice()
                return

    def _take(self) -> None:
        """Everything that can be done now. The lock is held."""
        head = self._head
        written = int(head[_WRITTEN])
        for lane in self._lanes:
            count, packets = lane.take()
            if count:
                written += count
                lane.waiting.append((written, packets))
        head[_WRITTEN] = written
        if not head[_HOLDING]:
            head[_WANTED] = written
        wanted = int(head[_WANTED])
        held = 0
        for lane in self._lanes:
            while lane.waiting and lane.waiting[0][0] <= wanted:
                lane.leaving.append(memoryview(lane.waiting.popleft()[1]))
            lane.push()
            held += lane.held_bytes
        head[_RELEASED] = wanted
        head[_HELD] = held
        # Half of it must be free again before the guest goes on: or it would stop after every packet.
        full = held > (self._capacity // 2 if head[_FULL] else self._capacity)
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
