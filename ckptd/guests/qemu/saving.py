"""The two ways in which a stopped QEMU saves its devices without RAM, into a file of ours, while we do something else.

`ByCommand` is xen-save-devices-state, which needs no Xen. `ByMigration` is for a QEMU without it: a migration into a
pipe, where x-ignore-shared leaves out RAM that both sides have as a file. It leaves QEMU in the state postmigrate and
its disks inactive, until `cont`; and from there it does not save again, so what it has saved then is used again.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError
from ckptd.guests.qemu.qmp import Event, Monitor, QmpError
from ckptd.guests.qemu.survey import Survey
from ckptd.units import format_size

__all__ = ["BY_COMMAND", "BY_MIGRATION", "OPAQUE", "WAYS", "ByCommand", "ByMigration", "Saver", "saver", "way_of"]

BY_COMMAND, BY_MIGRATION = "xen-save-devices-state", "migrate with x-ignore-shared"
WAYS = (BY_COMMAND, BY_MIGRATION)
"""As a state names them."""

OPAQUE = "ckptd"
"""By which our descriptors are known in QEMU."""

_PIPE = "ckptd-state"
_PIPE_BYTES = 1 << 20  # so much QEMU can write while nobody reads; more, if everybody may have it
_MOST = 64 << 20  # bytes of devices
_TIMEOUT = 30.0
_NO_LIMIT = 1 << 50  # bytes a second
_ENDS = frozenset({"completed", "failed", "cancelled"})


class Saver(Protocol):
    """One way of saving. Raises GuestError when QEMU is gone or does not do it."""

    way: str
    parks: bool
    """QEMU is not quite as it was before, until it goes on: its run state and its disks."""
    parked: bool
    """It is like that now, and what was saved is what it would save."""

    def begin(self) -> None:
        """QEMU stands, or was told to stop, and saves from now on."""

    def finish(self) -> int:
        """Wait until all is in the file; its bytes."""

    def heard(self, event: Event) -> None:
        """QEMU tells of a migration, or that it runs or was reset."""

    def leave(self) -> None:
        """QEMU is as it was before we came."""

    def close(self) -> None: ...


def way_of(survey: Survey) -> str:
    """By what this QEMU has, whatever its version. Raises GuestError if it has neither."""
    if "xen-save-devices-state" in survey.commands:
        return BY_COMMAND
    if "migrate" in survey.commands and {"events", "x-ignore-shared"} <= set(survey.capabilities):
        return BY_MIGRATION
    raise GuestError(
        f"this QEMU ({survey.version}) can save no device state without RAM",
        hint="use one with xen-save-devices-state or the migration capability x-ignore-shared",
    )


def saver(survey: Survey, monitor: Monitor, file: int, memory: npt.NDArray[np.uint8]) -> Saver:
    """The one for this QEMU. It saves into `file`; `memory` outlives the process, for the same run of QEMU."""
    if way_of(survey) == BY_COMMAND:
        return ByCommand(monitor, file)
    return ByMigration(survey, monitor, file, memory)


class ByCommand:
    """xen-save-devices-state, into a file that QEMU is given by descriptor."""

    way, parks, parked = BY_COMMAND, False, False

    def __init__(self, monitor: Monitor, file: int) -> None:
        self._monitor, self._file, self._number = monitor, file, 0
        # QEMU opens it for writing only, and so must we.
        self._position = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._fdset = int(monitor.execute("add-fd", {"opaque": OPAQUE}, [self._position])["fdset-id"])
        except BaseException:
            os.close(self._position)
            raise

    def begin(self) -> None:
        os.ftruncate(self._file, 0)
        os.lseek(self._position, 0, os.SEEK_SET)  # QEMU's descriptor is a copy of this one, and shares its place
        self._number = self._monitor.begin(BY_COMMAND, {"filename": f"/dev/fdset/{self._fdset}", "live": False})

    def finish(self) -> int:
        self._monitor.finish(BY_COMMAND, self._number)
        size = os.fstat(self._file).st_size
        if not size:
            raise GuestError("QEMU has saved no device state")
        return size

    def heard(self, event: Event) -> None:
        pass

    def leave(self) -> None:
        self._monitor.execute("remove-fd", {"fdset-id": self._fdset})

    def close(self) -> None:
        if self._position >= 0:
            os.close(self._position)
        self._position = -1


class ByMigration:
    """`migrate` into a pipe, with x-ignore-shared.

    That capability is on while we save only: with it, a migration of somebody else's would lose the guest's RAM. What
    else was changed is remembered in `memory`, so that a keeper that comes after one that was killed puts it back.
    """

    way, parks = BY_MIGRATION, True

    def __init__(self, survey: Survey, monitor: Monitor, file: int, memory: npt.NDArray[np.uint8]) -> None:
        self._survey, self._monitor, self._file, self._memory = survey, monitor, file, memory
        self.parked = False
        self._ran = self._outdated = False  # it ran, or was reset where it stood, since we began to save it
        self._travels = sum(block.size for block in survey.blocks)  # whatever RAM is not a backend's
        self._buffer = bytearray(_PIPE_BYTES)
        self._reader = -1
        self._asked: dict[str, int] = {}
        self._size = 0
        self._status = ""  # of the migration that is going on
        self._begun = False  # and it is ours
        self._proven = False
        self._before: dict[str, Any] = self._remembered() or self._look()
        self._capable(False, also=[name for name in self._before["capabilities"] if name != "x-ignore-shared"])
        if self._before["parameters"]:
            changes = {"max-bandwidth": _NO_LIMIT, "tls-creds": "", "mode": "normal"}
            self._set({name: changes[name] for name in self._before["parameters"]})

    def _remembered(self) -> dict[str, Any] | None:
        kept = self._memory.tobytes().rstrip(b"\0")
        try:
            return dict(json.loads(kept)) if kept else None
        except ValueError:  # its writer was killed
            return None

    def _look(self) -> dict[str, Any]:
        """What of QEMU's settings we change, as it is."""
        given = self._monitor.execute("query-migrate-parameters")
        usual = {"max-bandwidth": _NO_LIMIT, "tls-creds": "", "mode": "normal"}
        found = {
            "capabilities": {
                one["capability"]: one["state"]
                for one in self._monitor.execute("query-migrate-capabilities")
                if one["capability"] == "x-ignore-shared" or one["state"] != (one["capability"] == "events")
            },
            "parameters": {name: given[name] for name in usual if given.get(name, usual[name]) != usual[name]},
        }
        text = json.dumps(found).encode()
        assert len(text) <= len(self._memory)
        self._memory[: len(text)] = np.frombuffer(text, dtype=np.uint8)
        return found

    def _set(self, parameters: dict[str, Any]) -> None:
        self._monitor.execute("migrate-set-parameters", parameters)

    def _capable(self, state: bool, also: Iterable[str] = ()) -> None:
        """x-ignore-shared is on, or as it was; and of all others only `events` are on."""
        wanted = {name: name == "events" for name in also}
        wanted["x-ignore-shared"] = state or self._before["capabilities"]["x-ignore-shared"]
        self._monitor.execute("migrate-set-capabilities", _capabilities(wanted))

    def begin(self) -> None:
        if self.parked:
            return  # nothing has changed since, and QEMU refuses to save again
        if self._outdated and any(disk.inserted for disk in self._survey.disks):
            # Its disks are inactive, and a QEMU that shall make them so once more ends.
            raise GuestError("the guest was reset while it stood: it can be saved when it has gone on")
        self._collect()
        self._size, self._status, self._begun = 0, "asked", False
        self._ran = self._outdated = False
        os.ftruncate(self._file, 0)
        self._reader, writer = os.pipe()
        try:
            with suppress(OSError):
                fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            os.set_blocking(self._reader, False)
            on = _capabilities({"x-ignore-shared": True})
            self._ask("getfd", {"fdname": _PIPE}, [writer])
            self._ask("migrate-set-capabilities", on)
            self._ask("migrate", {"uri": f"fd:{_PIPE}"})
        finally:
            os.close(writer)

    def finish(self) -> int:
        if self.parked:
            return self._size
        try:
            self._watch()
        except BaseException:
            self._stop()
            raise
        self.close()
        # Nobody waits for the answer: what is asked next is to let the guest go on.
        off = _capabilities({"x-ignore-shared": self._before["capabilities"]["x-ignore-shared"]})
        self._ask("migrate-set-capabilities", off)
        self._proven, self.parked = True, not self._ran and not self._outdated
        return self._size

    def _watch(self) -> None:
        """Until it is done. QEMU closes the pipe after it has come to postmigrate, and only then `cont` has its usual
        meaning: one before that is answered, and the guest stands all the same."""
        until, open_ = time.monotonic() + _TIMEOUT, True
        while open_ or self._status not in _ENDS or self._asked:
            left = until - time.monotonic()
            if left <= 0:
                raise GuestError(f"QEMU has not saved its devices within {_TIMEOUT:g} s")
            # Both at once: QEMU's main loop, and so its answers, can wait for us to read.
            waited = [self._monitor.fileno(), *([self._reader] if open_ else [])]
            ready, _, _ = select.select(waited, [], [], left)
            if self._reader in ready:
                open_ = self._read()
            while event := self._monitor.wait_event("MIGRATION", 0):
                self.heard(event)
            for command in [name for name, number in self._asked.items() if self._monitor.answered(number)]:
                answer = self._monitor.finish(command, self._asked.pop(command))
                self._begun |= command == "migrate"
                if command == "query-migrate":
                    self._check(int(answer.get("ram", {}).get("total", 0)))
                    self._proven = True
            if not self._proven and "query-migrate" not in self._asked and self._status in ("active", *_ENDS):
                self._ask("query-migrate")
        if self._status != "completed":
            why = self._monitor.execute("query-migrate").get("error-desc", "it does not say why")
            raise GuestError(f"QEMU has not saved its devices: its migration has {self._status}: {why}")
        if not self._size:
            raise GuestError("QEMU has saved no device state")

    def _read(self) -> bool:
        """Some of what has come; False at the end."""
        try:
            got = os.readv(self._reader, [self._buffer])
        except BlockingIOError:
            return True
        os.pwrite(self._file, memoryview(self._buffer)[:got], self._size)
        self._size += got
        if self._size > self._travels + _MOST:
            raise self._private(self._size)
        return got > 0

    def _check(self, total: int) -> None:
        """`total`: bytes of RAM that QEMU counts as part of the migration."""
        sizes = [backend.size for backend in self._survey.ram if backend.used and not backend.firmware]
        if sizes and total - self._travels >= min(sizes):
            raise self._private(total - self._travels)

    def _private(self, size: int) -> GuestError:
        names = ", ".join(f"{one.id} ({one.kind})" for one in self._survey.ram if one.used and one.size <= size)
        return GuestError(
            f"this QEMU would send RAM whole with each device state, {format_size(size)} of {names or 'it'}: it has no "
            "xen-save-devices-state, and x-ignore-shared leaves out shared RAM only, in newer versions only that of a "
            "named file",
            hint="start the guest with -object memory-backend-file,id=ram,size=SIZE,mem-path=PATH,share=on and "
            "-machine memory-backend=ram",
        )

    def _stop(self) -> None:
        """End what is going on, so that the guest can go on."""
        self.close()  # whatever QEMU has to write yet fails
        self._status = ""
        with suppress(GuestError):
            while self._asked:
                command, number = self._asked.popitem()
                with suppress(QmpError):
                    self._monitor.finish(command, number)
                    self._begun |= command == "migrate"
            with suppress(QmpError):  # refused if a migration has taken it
                self._monitor.execute("closefd", {"fdname": _PIPE})
            until = time.monotonic() + _TIMEOUT
            while self._begun and time.monotonic() < until:
                state = self._monitor.execute("query-migrate").get("status", "none")
                status = self._monitor.execute("query-status")["status"]
                if status != "finish-migrate" and state in (*_ENDS, "none"):
                    break
                time.sleep(0.001)
            self._capable(False)

    def heard(self, event: Event) -> None:
        match event["event"]:
            case "MIGRATION" if self._status and self._status not in _ENDS:
                self._status = str(event["data"]["status"])
            case "RESUME":
                self._ran, self._outdated, self.parked = True, False, False
            case "RESET":
                self._outdated, self.parked = not self._ran, False

    def leave(self) -> None:
        if self.parked:
            # Somebody else has stopped it, so it is left paused, and with its disks: for that it runs for a moment.
            numbers = [(command, self._monitor.begin(command)) for command in ("cont", "stop")]
            for command, number in numbers:
                self._monitor.finish(command, number)
            self.parked = False
        self._collect()
        if self._before["parameters"]:
            self._set(self._before["parameters"])
        self._monitor.execute("migrate-set-capabilities", _capabilities(self._before["capabilities"]))
        self._memory[:] = 0

    def close(self) -> None:
        if self._reader >= 0:
            os.close(self._reader)
        self._reader = -1

    def _ask(self, command: str, arguments: dict[str, Any] | None = None, fds: Iterable[int] = ()) -> None:
        self._asked[command] = self._monitor.begin(command, arguments, list(fds))

    def _collect(self) -> None:
        """The answers that nobody has waited for."""
        while self._asked:
            command, number = self._asked.popitem()
            self._monitor.finish(command, number)


def _capabilities(states: dict[str, bool]) -> dict[str, Any]:
    return {"capabilities": [{"capability": name, "state": state} for name, state in states.items()]}
