"""Monitor: QEMU's own control channel (QMP), spoken plainly: one command, its answer, and the events in between.

An epoch waits for three commands, so they are made in place, without an event loop between question and answer; and
descriptors go along, so that QEMU never opens a path of ours.

Source: docs/interop/qmp-spec.rst of QEMU. JSON objects, one in each line; the server greets with {"QMP": ...}, and
wants `qmp_capabilities` first. A monitor has one client: a second one connects, and is never greeted.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptd.errors import GuestError
from ckptd.guests.process.wire import socket_address

__all__ = ["Event", "Monitor", "QmpError"]

Event = dict[str, Any]

_GREETING = 5.0  # seconds; QEMU's main loop answers at once, on a machine that is not too busy
_TIMEOUT = 30.0  # `stop` flushes disks
_MOST_EVENTS = 4096
_MOST_BYTES = 64 << 20  # of one message; the longest, query-qmp-schema, takes 300 KB
_NO_QMP = "this is no QMP monitor"
_CHUNK = 1 << 16


class QmpError(GuestError):
    """QEMU has refused a command; `reason` is what it said."""

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"QEMU refuses {command}: {reason}")
        self.reason = reason


class Monitor:
    """A connection to one QEMU. Not thread-safe. Raises GuestError when QEMU is gone or does not answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self._buffer = bytearray()
        self._answers: dict[object, Event] = {}  # by the number of the question
        self._number = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
        except BaseException:
            self._sock.close()
            raise

    def _connect(self) -> None:
        self._sock.settimeout(_GREETING)
        try:
            with socket_address(self.path) as address:
                self._sock.connect(address)
        except (OSError, TimeoutError) as error:
            raise GuestError(
                f"QEMU's monitor cannot be reached: {error}", socket=str(self.path),
                hint="start QEMU with -qmp unix:PATH,server=on,wait=off, and set guest.qmp to that PATH",
            ) from error  # fmt: skip
        try:
            greeting = self._message()
        except TimeoutError:
            raise GuestError(
                "QEMU's monitor does not greet: another client holds it", socket=str(self.path),
                hint="give ckptd a monitor of its own (a second -qmp option), or end the other client",
            ) from None  # fmt: skip
        except OSError as error:
            raise GuestError(f"QEMU is gone: {error}", socket=str(self.path)) from error
        if "QMP" not in greeting:
            raise GuestError(f"{_NO_QMP}: it does not greet with QMP", socket=str(self.path))
        self._sock.settimeout(_TIMEOUT)
        self.execute("qmp_capabilities")

    @property
    def peer_pid(self) -> int:
        """The process that listens there: QEMU, unless somebody else made the socket for it."""
        packed = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # struct ucred: pid, uid, gid
        return int.from_bytes(packed[:4], "little")

    def fileno(self) -> int:
        return self._sock.fileno()

    def execute(self, command: str, arguments: dict[str, Any] | None = None, fds: Sequence[int] = ()) -> Any:
        """What the command returns. Raises QmpError if QEMU refuses it."""
        return self.finish(command, self.begin(command, arguments, fds))

    def begin(self, command: str, arguments: dict[str, Any] | None = None, fds: Sequence[int] = ()) -> int:
        """Ask, and do something else until `finish`, which wants this number."""
        self._number += 1
        wanted: dict[str, Any] = {"execute": command, "id": self._number}
        if arguments:
            wanted["arguments"] = arguments
        data = json.dumps(wanted).encode()
        try:
            if fds:
                sent = socket.send_fds(self._sock, [data], list(fds))
                self._sock.sendall(data[sent:])
            else:
                self._sock.sendall(data)
        except OSError as error:
            raise GuestError(f"QEMU is gone ({command}: {error})", socket=str(self.path)) from error
        return self._number

    def finish(self, command: str, number: int) -> Any:
        """What the command of that number returns. Raises QmpError if QEMU refuses it."""
        try:
            while number not in self._answers:
                self._note(self._message())
        except TimeoutError as error:
            self._sock.close()  # a late answer must not pass for that to a later question
            raise GuestError(f"QEMU does not answer {command} within {_TIMEOUT:g} s", socket=str(self.path)) from error
        except OSError as error:
            raise GuestError(f"QEMU is gone ({command}: {error})", socket=str(self.path)) from error
        message = self._answers.pop(number)
        if "error" in message:
            raise QmpError(command, str(message["error"].get("desc", message["error"])))
        return message["return"]

    def answered(self, number: int) -> bool:
        """Is the answer here already, so that `finish` does not wait?"""
        return number in self._answers

    def wait_event(self, name: str, timeout: float) -> Event | None:
        """The next event of that name, others stay; None after so many seconds. Raises GuestError."""
        until = time.monotonic() + timeout
        while True:
            self.poll()
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            if (left := until - time.monotonic()) <= 0:
                return None
            select.select([self._sock], [], [], left)

    def human(self, line: str) -> str:
        """What the human monitor prints for this line."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def poll(self) -> None:
        """Take the events that have arrived into `events`. Raises GuestError if QEMU is gone."""
        gone = ""
        while not gone:
            try:
                if not select.select([self._sock], [], [], 0)[0]:
                    break
                data = self._sock.recv(_CHUNK)
                gone = "" if data else "it has closed its monitor"
                self._buffer += data
            except (OSError, ValueError) as error:  # ValueError: it was closed here, as QEMU did not answer
                gone = str(error)
        while (line := self._line()) is not None:
            self._note(self._parsed(line))
        if gone:
            raise GuestError(f"QEMU is gone: {gone}", socket=str(self.path))

    def close(self) -> None:
        with suppress(OSError):
            self._sock.close()

    def _note(self, message: Event) -> None:
        if "event" in message:
            self.events.append(message)
        elif "return" in message or "error" in message:
            self._answers[message.get("id")] = message

    def _message(self) -> Event:
        """The next object. Raises TimeoutError, OSError."""
        while (line := self._line()) is None:
            data = self._sock.recv(_CHUNK)
            if not data:
                raise ConnectionResetError("its monitor was closed")
            self._buffer += data
            if len(self._buffer) > _MOST_BYTES:
                raise GuestError(f"{_NO_QMP}: it sends no end of a line", socket=str(self.path))
        return self._parsed(line)

    def _parsed(self, line: bytes) -> Event:
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise GuestError(f"{_NO_QMP}: it says {line[:80]!r}", socket=str(self.path))
        return message

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line
