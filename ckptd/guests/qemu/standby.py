"""QemuStandby: a warm QEMU over the replica's files, which takes the device state and goes on.

It is made from the primary's own command line (cmdline.py), as soon as the first epoch is committed. First a rehearsal:
the same QEMU over a private copy of the files takes the state, and is ended; so a machine that this host's QEMU does
not know, a device that is missing or a file that is not here is found on the first day. Then the warm one, which waits
with `-incoming defer` and never runs before it is promoted. One that dies is replaced.

The state goes in through a pipe that QEMU is given: it may be forbidden to open paths or to start programs. A standby
that was promoted belongs to nobody: it outlives this daemon, which finds it again by its pid file and monitor.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ckptd.errors import CkptdError, GuestError, StateError
from ckptd.guests.base import Still
from ckptd.guests.process.output import append
from ckptd.guests.qemu.cmdline import Overrides, parse, standby_command
from ckptd.guests.qemu.hmp import FlatRange, host_address
from ckptd.guests.qemu.qmp import Monitor, QmpError
from ckptd.guests.qemu.ram import backends_of, geometry_of
from ckptd.guests.qemu.said import decode_said
from ckptd.guests.qemu.saving import BY_MIGRATION
from ckptd.guests.qemu.state import State, decode
from ckptd.guests.qemu.survey import Survey
from ckptd.memory.regions import Geometry

__all__ = ["QemuStandby"]

_START = 20.0  # seconds until a QEMU that was started answers
_LOAD = 60.0  # seconds until it has taken a state
_AGAIN = 1.0  # seconds before one that died is replaced
_END = 5.0
_LOOK = 0.005

T = TypeVar("T")
Plan = tuple[Survey, dict[str, str], str]
"""What to start, over which files, and how the state was saved that it shall take."""


class _Qemu:
    """A QEMU of ours: its process, whoever started it, and its monitor."""

    def __init__(self, pid: int, monitor: Monitor, process: subprocess.Popen[bytes] | None = None) -> None:
        self.pid, self.monitor, self._process = pid, monitor, process
        self.pidfd = os.pidfd_open(pid)

    def alive(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def load(self, devices: bytes, *, announce: bool) -> None:
        """Give it a device state, and wait until it has taken it. `announce`: the network is told that the guest's
        addresses are here now. Raises GuestError."""
        monitor = self.monitor
        if not announce:
            monitor.execute("migrate-set-parameters", {"announce-rounds": 0})
        reader, writer = os.pipe()
        try:
            monitor.execute("getfd", {"fdname": "state"}, [reader])
        finally:
            os.close(reader)
        thread = threading.Thread(target=_write, args=(writer, devices), daemon=True)
        thread.start()
        monitor.execute("migrate-incoming", {"uri": "fd:state"})
        until = time.monotonic() + _LOAD
        while (left := until - time.monotonic()) > 0:
            event = monitor.wait_event("MIGRATION", left)
            status = event["data"]["status"] if event else "silent"
            if status == "completed":
                thread.join()
                return
            if status == "failed":
                raise GuestError("QEMU has not accepted the device state", pid=self.pid)
        raise GuestError(f"QEMU has not taken the device state within {_LOAD:g} s", pid=self.pid)

    def kill(self) -> None:
        self.monitor.close()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        select.select([self.pidfd], [], [], _END)
        self.leave()

    def leave(self) -> None:
        self.monitor.close()
        if self._process is not None:
            self._process.poll()
        os.close(self.pidfd)


class QemuStandby:
    """The side that takes a QEMU guest over. The guest, once active, outlives this object and its daemon."""

    kind = "qemu"

    def __init__(
        self, name: str, runtime: Path, overrides: Overrides, output: Path | None = None,
        chardevs: Mapping[str, Path] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self._runtime = runtime
        self._overrides = overrides
        self._output = output
        self._chardevs = chardevs or {}
        self._let_go: set[tuple[str, bytes]] = set()  # labels and held output that are in their files
        self._qemu: _Qemu | None = None
        self._active = False
        self._plan: Plan | None = None
        self._replacing: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()  # one at a time works on the process
        self._promoting = False
        self.replaced = 0
        self.note = ""

    @property
    def active(self) -> bool:
        return self._active

    async def prepare(self) -> None:
        """Find what an earlier daemon has left: a guest that runs goes on, a QEMU that only waits is ended."""
        if self._qemu is None:
            await asyncio.to_thread(self._find)

    async def fit(self, geometry: Geometry, images: Sequence[int], state: bytes, still: Still) -> str:
        async with self._lock:
            if self._active:
                return ""
            try:
                found = decode(state)
                plan = self._planned(geometry, images, found)
                if plan == self._plan and self.alive():
                    return ""
                self._drop()
                await self._rehearse(plan, still)
                self._plan = plan
                if not self._promoting:
                    await self._warm()
            except CkptdError as error:
                return str(error)
            return ""

    async def activate(
        self, geometry: Geometry, images: Sequence[int], state: bytes, held: bytes, released: int
    ) -> None:
        if self._active:
            raise StateError("the guest runs on this side already", guest=self.name)
        self._promoting = True
        try:
            async with self._lock:
                found = decode(state)
                plan = self._planned(geometry, images, found)
                if plan != self._plan or not self.alive():
                    self._drop()
                    self._plan = plan
                    await self._warm()
                self._release(held)
                try:
                    await self._work(lambda: self._go(found.devices))
                except GuestError as error:
                    self._drop()  # it can be tried again, in another one
                    raise GuestError(f"{error.message}: {_tail(self._runtime / 'qemu.log')}") from error
                self._active = True
        finally:
            self._promoting = False

    def _release(self, held: bytes) -> None:
        """What the guest has said and nobody has let go; once, though a promotion may be tried again."""
        for label, data in decode_said(held).items():
            path = self._chardevs.get(label, self._output)
            if path is None:
                raise GuestError(f"there is no file for what the guest has said on {label}", guest=self.name)
            if (label, held) not in self._let_go:
                append(path, data)
                self._let_go.add((label, held))

    async def detach(self) -> None:
        """Leave the guest running if it is active; a QEMU that only waits is ended."""
        if not self._active:
            await self.end()
        elif self._qemu is not None:
            self._unwatch()
            self._qemu.leave()
            self._qemu = None

    async def end(self) -> None:
        self._plan = None
        if self._replacing is not None:
            self._replacing.cancel()
            self._replacing = None
        async with self._lock:
            self._drop()
        self._active = False

    def alive(self) -> bool:
        return self._qemu is not None and self._qemu.alive()

    def facts(self) -> dict[str, object]:
        return {
            "prepared": self._qemu is not None, "active": self._active, "pid": self._qemu.pid if self._qemu else 0,
            "replaced": self.replaced, "note": self.note,
        }  # fmt: skip

    # --- the process

    def _planned(self, geometry: Geometry, images: Sequence[int], state: State) -> Plan:
        survey = state.survey
        if geometry_of(survey) != geometry:
            raise GuestError(f"the state is of a guest of {geometry_of(survey)}, the image of {geometry}")
        if len(images) != len(geometry):
            raise GuestError(f"{len(images)} descriptors for {len(geometry)} regions")
        paths = [os.readlink(f"/proc/self/fd/{fd}") for fd in images]
        return survey, {one.id: path for one, path in zip(backends_of(survey), paths, strict=True)}, state.way

    def _bring_firmware(self, qemu: _Qemu, plan: Plan) -> None:
        """What the guest will run at a reset: a QEMU that waits for a state has loaded none."""
        for one in plan[0].ram:
            if one.firmware and one.used:
                part = FlatRange(one.gpa, one.gpa + one.size - 1, one.block, 0)
                address = host_address(qemu.monitor.human(f"gpa2hva {one.gpa:#x}"), part)
                with open(f"/proc/{qemu.pid}/mem", "r+b", buffering=0) as memory:
                    os.pwrite(memory.fileno(), Path(plan[1][one.id]).read_bytes(), address)

    def _command(self, plan: Plan, monitor: Path) -> list[str]:
        return standby_command(
            plan[0], ram_files=plan[1], monitor=str(monitor), overrides=self._overrides,
            configuration=plan[2] == BY_MIGRATION,
        )  # fmt: skip

    async def _rehearse(self, plan: Plan, still: Still) -> None:
        """Would it take the state? Over a private mapping, silently, and touching no disk. Raises GuestError."""
        monitor, log = self._runtime / "rehearsal.qmp", self._runtime / "rehearsal.log"
        command = [_private(word, plan[1].values()) for word in self._command(plan, monitor)]
        _refuse_missing_taps(command)
        qemu = await self._started(command, plan, monitor, log)
        try:
            async with still() as state:  # a device state fits the memory of its own epoch only
                devices = decode(state).devices
                await self._work(lambda: qemu.load(devices, announce=False))
        except GuestError as error:
            raise GuestError(
                f"{error.message}: {_tail(log)}",
                hint="[guest.standby] in the secondary's file says what is otherwise on this host",
            ) from error
        finally:
            qemu.kill()
            monitor.unlink(missing_ok=True)

    async def _warm(self) -> None:
        assert self._plan is not None
        plan, monitor = self._plan, self._runtime / "guest.qmp"
        qemu = await self._started(self._command(plan, monitor), plan, monitor, self._runtime / "qemu.log")
        (self._runtime / "guest.pid").write_text(f"{qemu.pid}\n")
        self._qemu = qemu
        asyncio.get_running_loop().add_reader(qemu.pidfd, self._died)

    async def _started(self, command: list[str], plan: Plan, monitor: Path, log: Path) -> _Qemu:
        """`_start`, in a thread; whoever is cancelled meanwhile leaves no process behind."""
        starting = asyncio.ensure_future(asyncio.to_thread(self._start, command, plan, monitor, log))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            with suppress(CkptdError):
                (await starting).kill()
            raise

    def _start(self, command: list[str], plan: Plan, monitor: Path, log: Path) -> _Qemu:
        """Start a QEMU that waits for a state. Raises GuestError with what it has said."""
        monitor.unlink(missing_ok=True)
        cwd = plan[0].cwd if Path(plan[0].cwd).is_dir() else self._runtime
        try:
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
        except OSError as error:
            raise GuestError(f"the standby's QEMU cannot be started: {error}") from error
        until = time.monotonic() + _START
        while True:
            if process.poll() is not None:
                raise GuestError(f"the standby's QEMU ended as it began: {_tail(log)}")
            if monitor.exists():
                with suppress(GuestError):
                    made = Monitor(monitor)
                    break
            if time.monotonic() > until:
                process.kill()
                process.wait()
                raise GuestError(f"the standby's QEMU does not answer within {_START:g} s: {_tail(log)}")
            time.sleep(_LOOK)
        qemu = _Qemu(process.pid, made, process)
        try:
            # Without events nobody says when it is done; disks are not touched before the guest goes on.
            names = ["events", "late-block-activate", *(["x-ignore-shared"] if plan[2] == BY_MIGRATION else [])]
            capabilities = [{"capability": name, "state": True} for name in names]
            made.execute("migrate-set-capabilities", {"capabilities": capabilities})
        except BaseException:
            qemu.kill()
            raise
        return qemu

    def _go(self, devices: bytes) -> None:
        """The guest goes on here."""
        assert self._qemu is not None
        self._qemu.load(devices, announce=True)
        assert self._plan is not None
        if self._plan[2] != BY_MIGRATION:  # there it came along
            try:
                self._bring_firmware(self._qemu, self._plan)
            except (OSError, GuestError) as error:  # the guest lives without, until it is reset
                self.note = f"the firmware is not there, so the guest cannot be reset: {error}"
        self._qemu.monitor.execute("cont")
        with suppress(QmpError):  # the network hears where the guest is now; without it, with its first packet
            rounds = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
            self._qemu.monitor.execute("announce-self", rounds)

    def _find(self) -> None:
        """What the pid file names, if it is ours."""
        monitor = self._runtime / "guest.qmp"
        try:
            pid = int((self._runtime / "guest.pid").read_text())
            if not _has_word(pid, str(monitor)):
                return
            qemu = _Qemu(pid, Monitor(monitor))
        except (OSError, ValueError):
            return
        except GuestError:
            if _has_word(pid, str(monitor)):
                raise  # it runs: a second one over the same files must not be started
            return
        status = qemu.monitor.execute("query-status")["status"]
        if status in ("inmigrate", "prelaunch", "postmigrate"):
            qemu.kill()
        else:
            self._qemu, self._active = qemu, True

    def _died(self) -> None:
        """Called when the process has ended."""
        self._drop()
        if not self._active and self._plan is not None and not self._promoting:
            self.replaced += 1
            self._replacing = asyncio.create_task(self._replace())

    async def _replace(self) -> None:
        while self._qemu is None and self._plan is not None:
            await asyncio.sleep(_AGAIN)
            async with self._lock:
                if self._qemu is None and self._plan is not None and not self._active:
                    with suppress(CkptdError):
                        await self._warm()

    def _unwatch(self) -> None:
        if self._qemu is not None:
            with suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._qemu.pidfd)

    def _drop(self) -> None:
        if self._qemu is not None:
            self._unwatch()
            self._qemu.kill()
            self._qemu = None
            (self._runtime / "guest.pid").unlink(missing_ok=True)

    async def _work(self, work: Callable[[], T]) -> T:
        """In a thread, and to its end, whoever stops waiting for it."""
        return await asyncio.shield(asyncio.to_thread(work))


def _private(word: str, files: Iterable[str]) -> str:
    """The argument for a QEMU that must not write to these files. Raises GuestError if it is not understood."""
    if word.startswith("memory-backend-file,"):
        return re.sub(r",share=(on|true|yes|y)\b", ",share=off", word)
    if any(file in word or file.replace(",", ",,") in word for file in files):
        raise GuestError(
            f"a rehearsal would write to the replica: {word}",
            hint="in the standby's command, name the files as -object memory-backend-file,...,mem-path={ram:ID}",
        )
    return word


def _refuse_missing_taps(command: Sequence[str]) -> None:
    """As root QEMU makes a tap that it does not find, and it leads nowhere. Raises GuestError."""
    for option in parse(command[1:]):
        pairs = option.pairs if option.name in ("netdev", "nic", "net") else {}
        name = str(pairs.get("ifname", ""))
        if pairs.get("type") == "tap" and name and pairs.get("script") == "no":
            try:
                socket.if_nametoindex(name)
            except OSError:
                raise GuestError(f"there is no tap device {name} here, and no script is to make it") from None


def _has_word(pid: int, word: str) -> bool:
    """A process of that pid runs, with that in its command line."""
    try:
        return os.fsencode(word) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _write(fd: int, data: bytes) -> None:
    with suppress(BrokenPipeError), open(fd, "wb", buffering=0) as pipe:
        view = memoryview(data)
        while view:
            view = view[pipe.write(view) :]


def _tail(log: Path) -> str:
    """The last that it has said."""
    with suppress(OSError):
        return " ".join(log.read_text(errors="replace").split()[-60:]) or "it said nothing"
    return "it said nothing"
