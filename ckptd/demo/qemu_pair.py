"""A Linux in a stock QEMU, two daemons attached to it afterwards, and a client that counts with it.

    boot -> attach -> protect -> kill_host -> promote -> check -> close

The client asks the guest's counter for one number after the other, over one connection where the network allows it.
What it was told is the proof: the numbers must be consecutive, whatever dies meanwhile.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ckptd.control.client import Answered, wish
from ckptd.demo.children import Child, ChildFailed, kill_guest
from ckptd.demo.linux import COUNTER_PORT, READY, LinuxGuest
from ckptd.demo.network import Network
from ckptd.demo.pair import free_port, write_toml
from ckptd.errors import Unreachable

__all__ = ["CountingClient", "QemuPair", "QemuSetting"]

_GUEST = "demo"
_LOOK = 0.02
_BOOT = 120.0
_PATIENCE = 60.0  # seconds that a client waits for one number: a promotion takes one, a busy machine many


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuSetting:
    """What runs. RAM is shared or `private`; `patterns` and `dirty` are as LinuxGuest.command_line has them; with
    `gate_kib` held the guest is stopped."""

    memory_mib: int = 512
    private: bool = False
    binary: str = "qemu-system-x86_64"
    interval_ms: int = 25
    patterns: tuple[int, int] | None = None
    dirty: tuple[int, int] | None = None
    spin: bool = False
    gate_kib: int = 64 << 10


class CountingClient:
    """Asks for one number after the other; `numbers` has what it was told and when (monotonic seconds)."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.numbers: list[tuple[int, float]] = []
        self.error = ""
        self.address = address
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join(_PATIENCE + 5)

    def _run(self) -> None:
        try:
            with socket.create_connection(self.address, timeout=_PATIENCE) as sock:
                stream = sock.makefile("rwb", 0)
                while not self._end.is_set():
                    stream.write(b"next\n")
                    line = stream.readline()
                    if not line:
                        raise ConnectionResetError("the connection has ended")
                    self.numbers.append((int(line), time.monotonic()))
        except (OSError, ValueError) as error:
            self.error = str(error)


class QemuPair:
    """See the module. `directory` takes files and logs, `replicas` the replica; both must exist."""

    def __init__(
        self, setting: QemuSetting, linux: LinuxGuest, network: Network, directory: Path, replicas: Path
    ) -> None:
        self.setting, self.linux, self.network = setting, linux, network
        self.directory, self.replicas = directory, replicas
        self._here, self._there = directory / "p", directory / "s"
        self._files = directory / "primary.toml", directory / "secondary.toml"
        self._qmp, self.console = directory / "qmp", directory / "console"
        self.primary = Child("primary", self._files[0], self._here / "primary.sock", directory / "primary.log")
        self.secondary = Child("secondary", self._files[1], self._there / "secondary.sock", directory / "secondary.log")
        self._port = free_port()
        self._qemu: subprocess.Popen[bytes] | None = None
        self.promoted: dict[str, Any] = {}
        self.killed_at = self.boot_seconds = 0.0
        self.last: dict[str, Any] = {}

    # --- life

    def boot(self) -> None:
        """The guest, first of all, as anybody would start it. Raises ChildFailed."""
        one, began = self.setting, time.monotonic()
        share = ["-object", f"memory-backend-memfd,id=ram,size={one.memory_mib}M,share=on"]
        machine = "q35" if one.private else "q35,memory-backend=ram"
        ips = [f"10.0.{2 + card}.15/24" for card in range(self.network.cards)]
        said = self.linux.command_line(ips=ips, patterns=one.patterns, dirty=one.dirty, spin=one.spin)
        command = [
            one.binary, "-machine", machine, "-accel", "tcg", "-cpu", "max", "-m", str(one.memory_mib),
            *([] if one.private else share), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            *self.linux.arguments(said), "-serial", f"file:{self.console}",
            "-qmp", f"unix:{self._qmp},server=on,wait=off", *self.network.netdevs(),
        ]  # fmt: skip
        with (self.directory / "qemu.log").open("wb") as log:
            self._qemu = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        while READY not in self._console():
            if self._qemu.poll() is not None:
                raise ChildFailed("QEMU ended as the guest booted", hint=(self.directory / "qemu.log").read_text())
            if time.monotonic() - began > _BOOT:
                raise ChildFailed(f"the guest has not booted within {_BOOT:g} s", hint=self._console()[-500:])
            time.sleep(_LOOK)
        self.boot_seconds = time.monotonic() - began

    def attach(self) -> None:
        """Both daemons, to the guest that runs already. Raises ChildFailed."""
        self._write_files()
        self.secondary.start()
        self.primary.start()
        self.secondary.wait_ready()
        self.primary.wait_ready()

    def wait_protected(self, seconds: float = 120.0, watch: Callable[..., None] | None = None) -> None:
        """Until epochs are committed and the standby is warm. Raises ChildFailed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check()
            status, replica = self.look(watch)
            warm = replica is not None and replica["standby"].get("prepared")
            if status is not None and status["condition"] == "protected" and warm:
                return
            time.sleep(_LOOK)
        hint = f"{self.primary.tail()}\n{self.secondary.tail()}"
        raise ChildFailed(f"the guest is not protected after {seconds:g} s", hint=hint)

    def protect(self, seconds: float, watch: Callable[..., None] | None = None) -> None:
        """Let it run. Raises ChildFailed when a daemon ends."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(0.2, left))
            self.check()
            self.look(watch)
        self.last = self.primary.status()

    def look(self, watch: Callable[..., None] | None = None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Both statuses; None where nobody answers."""
        primary = replica = None
        with suppress(Unreachable, Answered):
            primary = self.primary.status()
        with suppress(Unreachable, Answered):
            replica = self.secondary.status()["guests"][0]
        if watch is not None:
            watch(primary, replica)
        return primary, replica

    def kill_host(self) -> None:
        """SIGKILL to QEMU, to the primary daemon and to its keeper: nothing of that host is left."""
        assert self._qemu is not None
        self._qemu.kill()
        self.primary.kill()
        kill_guest(self._here)
        self._qemu.wait()
        self.killed_at = time.monotonic()

    def kill_daemon(self, *, keeper: bool = False) -> None:
        """SIGKILL to the primary daemon alone, or to its keeper too; the guest lives."""
        self.primary.kill()
        if keeper:
            kill_guest(self._here)

    def set_interval(self, milliseconds: int) -> None:
        """Epochs of another length from now on."""
        self.setting = replace(self.setting, interval_ms=milliseconds)
        self._write_files()
        self.primary.reload()

    def kill_secondary(self) -> None:
        """SIGKILL to the secondary daemon; its standby is left alone, and waits."""
        self.secondary.kill()

    def restart_secondary(self) -> None:
        self.secondary.start()
        self.secondary.wait_ready()

    def kill_standby(self) -> None:
        """SIGKILL to the QEMU that waits."""
        kill_guest(self._there / _GUEST)

    @property
    def monitor(self) -> Path:
        """The socket of QEMU's monitor, which is ckptd's while it is attached."""
        return self._qmp

    def restart_primary(self) -> None:
        self.primary.start()
        self.primary.wait_ready()

    def promote(self, seconds: float = 10.0) -> dict[str, Any]:
        """Failover, as soon as the secondary has seen that its primary is gone."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            replica = self.secondary.status()["guests"][0]
            if replica["primary"] is None:
                break
            time.sleep(0.002)
        self.promoted = wish(self.secondary.socket, "promote")
        return self.promoted

    def client(self, *, there: bool = False) -> CountingClient:
        """A client of the guest's counter."""
        return CountingClient(self.network.address(COUNTER_PORT, there=there))

    def ask(self, port: int, line: str, *, there: bool = False, seconds: float = _PATIENCE, card: int = 0) -> str:
        """One line to one of the guest's servers, and its answer; on that card's address."""
        with socket.create_connection(self.network.address(port, there=there, card=card), timeout=seconds) as sock:
            stream = sock.makefile("rwb", 0)
            stream.write(line.encode() + b"\n")
            return stream.readline().decode().strip()

    def check(self) -> None:
        """Raises ChildFailed if a daemon has ended."""
        self.primary.check()
        self.secondary.check()

    @property
    def qemu_pid(self) -> int:
        return self._qemu.pid if self._qemu is not None else 0

    def close(self) -> None:
        """End every process that this has started, by its pid. The directories stay: see `remove`."""
        for child in (self.primary, self.secondary):
            child.end()
        for runtime in (self._here, self._there / _GUEST):
            kill_guest(runtime)
        if self._qemu is not None and self._qemu.poll() is None:
            self._qemu.send_signal(signal.SIGKILL)
            self._qemu.wait()

    def remove(self) -> None:
        """The directories too."""
        for place in (self.replicas, self.directory):
            shutil.rmtree(place, ignore_errors=True)

    # --- the proof

    def failures(self, numbers: list[int]) -> list[str]:
        """What is wrong with the numbers that clients were told, in their order, as sentences."""
        said = []
        if len(set(numbers)) < len(numbers):
            said.append(f"{len(numbers) - len(set(numbers))} numbers came twice")
        if any(later < earlier for earlier, later in pairwise(numbers)):
            said.append("the counter went back")
        missing = set(range(numbers[0], numbers[-1] + 1)) - set(numbers) if numbers else set()
        # Where the connection ends with QEMU, what was on its way there is lost, as with any connection that ends.
        if missing and (self.network.same_connection or len(missing) > 1):
            said.append(f"{len(missing)} numbers are missing, from {min(missing)} on")
        return said

    # --- inside

    def _console(self) -> str:
        with suppress(OSError):
            return self.console.read_text(errors="replace")
        return ""

    def _write_files(self) -> None:
        address = f"127.0.0.1:{self._port}"
        self._files[0].write_text(write_toml({
            "guest": {
                "name": _GUEST, "kind": "qemu", "qmp": str(self._qmp),
                "gate_capacity": f"{self.setting.gate_kib}KiB",
            },
            "secondary": {"address": address},
            "checkpoint": {"interval": f"{self.setting.interval_ms}ms"},
            "runtime": {"dir": str(self._here)},
        }))  # fmt: skip
        self._files[1].write_text(write_toml({
            "listen": {"address": address},
            "replica": {"dir": str(self.replicas), "history": 4, "history_bytes": "256MiB", "reserve": "32MiB"},
            "[guest]": {"name": _GUEST, "kind": "qemu"},
            "guest.standby": {"replace": self.network.replace(), **self._standby_binary()},
            "runtime": {"dir": str(self._there)},
        }))  # fmt: skip
        for place in (self._here, self._there):
            place.mkdir(exist_ok=True)

    def _standby_binary(self) -> dict[str, object]:
        """A script that starts QEMU is none that a secondary could find: it sees the program that this has become."""
        return {"binary": self.setting.binary} if "/" in self.setting.binary else {}
