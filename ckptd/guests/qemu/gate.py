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
    offset 512  u64 filed[]    for each chardev: outputs up to here that were its own are in its file
                                                                           moved by the holder

A gate that is full cannot make QEMU wait: its main loop, which also answers the monitor, would stand still, and nobody
could be released any more. So it takes what comes, and has the guest stopped (process.py): it never drops.

While the guest stands QEMU keeps what it is given until the guest goes on, but no more than its queue holds, and drops
what is beyond that: so the others wait here.

Chardevs that are configured are held beside them (streams.py): numbered with the packets, and let go by appending to a
file, from a thread of its own, because a disk may be slow. What was said on them goes into every checkpoint (said.py).
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
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError
from ckptd.guests.process.output import append
from ckptd.guests.qemu.said import Record, encode_said, records
from ckptd.guests.qemu.streams import Stream

__all__ = ["GATE_BYTES", "MOST_CHARDEVS", "Holder", "QemuGate"]

GATE_BYTES = 4096
MOST_CHARDEVS = 64

_WRITTEN, _WANTED, _RELEASED, _HELD, _FULL, _HOLDING = range(0, 48, 8)
_FILED = 64
_READ = 1 << 16
_LENGTH = struct.Struct(">I")
_MOST = 1 << 20  # bytes of a packet; QEMU sends at most 69,632
_AGAIN = 0.5  # seconds before a file that could not be written is tried again
_MOST_SAID = 16 << 20  # bytes of chardevs: an OUTPUT frame has 64 MiB, and some more comes until the guest stands
_QUEUE = 5000  # packets; a QEMU whose guest stands keeps 10,000 for each netdev, and drops the others


class QemuGate:
    """The daemon's side. `wake`: an eventfd that wakes the holder. `labels`: of the chardevs that are held."""

    def __init__(self, head: npt.NDArray[np.uint8], wake: int, labels: Sequence[str] = ()) -> None:
        self._head = head.view(np.uint64)
        self._wake = wake
        self._labels = tuple(labels)
        self._said: deque[Record] = deque()
        self.heard = 0  # the last output of a chardev that is known here
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
        """What was said on chardevs and is not in their files. Of packets nothing: one that was not released is one
        that the network has lost, and its sender repeats it."""
        if not self._said:
            return b""
        filed = [int(word) for word in self._head[_FILED : _FILED + len(self._labels)]]
        self._said = deque(one for one in self._said if one[0] > filed[one[1]])
        said: dict[str, bytes] = {}
        for number, index, data in self._said:
            if number <= mark:
                said[self._labels[index]] = said.get(self._labels[index], b"") + data
        return encode_said(said)

    def hear(self, told: bytes) -> None:
        """Records of what was said up to the mark, after `heard`."""
        for one in records(told):
            self._said.append(one)
            self.heard = one[0]

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
        self._streams: list[Stream] = []
        self._lock = threading.Lock()
        self._due = threading.Condition(self._lock)
        self._writer: threading.Thread | None = None
        self._writing = False
        self._marked = 0
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

    def add_stream(self, label: str, sock: socket.socket, path: Path) -> None:
        """A chardev: its socket is the holder's from here on. The first one is number 0 in the head."""
        with self._lock:
            self._streams.append(Stream(label, len(self._streams), sock, path))
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_out, name="files", daemon=True)
            self._writer.start()
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
            self._marked = int(self._head[_WRITTEN])
            return self._marked

    def said(self, since: int, mark: int) -> list[Record]:
        """What was said on chardevs in (since, mark] and is not in their files, by number."""
        with self._lock:
            return sorted(one for stream in self._streams for one in stream.said(since, mark))

    @property
    def streams(self) -> Sequence[Stream]:
        return tuple(self._streams)

    def unsure(self) -> bool:
        """QEMU may have more to say on a chardev, though the guest stands: its socket may have been full."""
        with self._lock:
            self._take()
            return any([stream.unsure() for stream in self._streams])

    def rest(self, stream: Stream) -> bytes:
        """At the end: take away what of it is not in its file."""
        with self._lock:
            while self._writing:
                self._due.wait()
            self._take()
            data = b"".join(bytes(data) for _, data in stream.waiting)
            stream.left(len(stream.waiting))
            return data

    def open(self) -> None:
        """Let go of everything, and hold nothing any more."""
        with self._lock:
            self._head[_HOLDING] = 0
            self._take()

    def drained(self) -> bool:
        """QEMU has taken everything that was let go, or all that it has room for."""
        with self._lock:
            self._take()
            if any(stream.waiting and not stream.trouble for stream in self._streams):
                return False
            return all(not lane.can_push(self._standing) and not _unread(lane.back) for lane in self._lanes)

    @property
    def leaving_bytes(self) -> int:
        """What was let go, and QEMU has not taken yet."""
        return sum(lane.leaving_bytes for lane in self._lanes)

    def lost(self) -> Sequence[str]:
        """Devices whose filter QEMU has taken away."""
        return [lane.name for lane in self._lanes if not lane.open]

    def lost_streams(self) -> Sequence[str]:
        """Chardevs that QEMU has taken away."""
        return [stream.label for stream in self._streams if not stream.open]

    def unwritten(self) -> str:
        """Why output that may leave is not in its file; empty if it is."""
        return next((stream.trouble for stream in self._streams if stream.trouble), "")

    def close(self) -> None:
        with self._lock:
            self._ended = True
            self._due.notify_all()
        os.eventfd_write(self.wake, 1)
        self._thread.join()
        if self._writer is not None:
            self._writer.join()
        for stream in self._streams:
            stream.sock.close()
        for lane in self._lanes:
            lane.out.close()
            lane.back.close()
        os.close(self.wake)

    # --- the thread

    def _run(self) -> None:
        while not self._ended:
            with self._lock:
                lanes, standing, streams = list(self._lanes), self._standing, list(self._streams)
            poll = select.poll()
            poll.register(self.wake, select.POLLIN)
            for lane in lanes:
                if lane.open:
                    poll.register(lane.out, select.POLLIN)
                if lane.can_push(standing):
                    poll.register(lane.back, select.POLLOUT)
            for stream in streams:
                if stream.open:
                    poll.register(stream.sock, select.POLLIN)
            poll.poll()
            with suppress(BlockingIOError):
                os.eventfd_read(self.wake)
            try:
                with self._lock:
                    self._take()
            except GuestError:
                return

    def _write_out(self) -> None:
        """The thread that appends to files. It has no lock while it does."""
        with self._lock:
            while not self._ended:
                wanted = int(self._head[_WANTED])
                due = [stream for stream in self._streams if stream.due(wanted)]
                failed = False
                for stream in due:
                    if not stream.due(wanted):  # `rest` has taken it, while another one was written
                        continue
                    number, count, data = stream.leaving(wanted)
                    self._writing = True
                    self._lock.release()
                    try:
                        append(stream.path, data)
                        trouble = ""
                    except GuestError as error:
                        trouble = str(error)
                    finally:
                        self._lock.acquire()
                        self._writing = False
                        self._due.notify_all()
                    stream.trouble = trouble
                    if trouble:
                        failed = True
                        continue
                    stream.left(count)
                    self._head[_FILED + stream.index] = number
                if due:
                    self._measure()
                if failed or not due:
                    self._due.wait(_AGAIN if failed else None)

    def _take(self) -> None:
        """Everything that can be done now. The lock is held."""
        head = self._head
        written = int(head[_WRITTEN])
        if self.trouble:  # nothing leaves any more, and no mark is right
            raise GuestError(self.trouble)
        try:
            for lane in self._lanes:
                head[_WRITTEN] = written = lane.take(written)
            closed = max(self._marked, int(head[_WANTED]))
            for stream in self._streams:
                head[_WRITTEN] = written = stream.take(written, closed)
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
        if any(stream.due(wanted) for stream in self._streams):
            self._due.notify_all()
        head[_RELEASED] = wanted
        self._measure()

    def _measure(self) -> None:
        """How much is held, and whether that is too much. The lock is held."""
        head = self._head
        waiting, leaving = sum(lane.waiting_bytes for lane in self._lanes), self.leaving_bytes
        said = sum(stream.bytes for stream in self._streams)
        waiting += said
        head[_HELD] = waiting + leaving
        # Half of it must be free again before the guest goes on: or it would stop after every packet. What QEMU takes
        # only while the guest runs is no reason to have it stand.
        if head[_FULL]:
            stuck = self._standing and not any(lane.can_push(True) for lane in self._lanes)
            full = waiting > self._capacity // 2 or (leaving > self._capacity and not stuck) or said > _MOST_SAID // 2
        else:
            full = waiting > self._capacity or leaving > 2 * self._capacity or said > _MOST_SAID
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
