"""A real pair: `ckptd secondary` and `ckptd primary` as processes, a relay between them that can be made to misbehave.

Every process that is started here is ended by `Pair.close`, the guests' processes too.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ckptd.config import load_primary
from ckptd.control.client import Answered, ask, wish
from ckptd.errors import Unreachable
from ckptd.guests.process.shared import ControlPage, map_file
from ckptd.guests.sim import params_from
from ckptd.guests.sim.machine import Output, Params
from ckptd.guests.sim.oracle import run_to
from ckptd.protocol.wire import MAGIC, Type

__all__ = ["GUEST", "Daemon", "Line", "Pair", "Relay", "free_port", "wait_for"]

T = TypeVar("T")
GUEST = "vm1"
PATIENCE = 40.0  # seconds; a busy machine is slow, not wrong
Direction = Literal["up", "down"]
"""up: primary to secondary."""


def wait_for(condition: Callable[[], T], what: str = "", timeout: float = PATIENCE) -> T:
    """What `condition` returned when it was first true. Fails after `timeout` seconds."""
    until = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"waited {timeout:g} s in vain{': ' + what if what else ''}; last: {found!r}")
        time.sleep(0.01)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Daemon:
    """One daemon's process."""

    def __init__(self, role: Literal["primary", "secondary"], config: Path, socket_path: Path, log: Path) -> None:
        self.role, self.config, self.socket, self.log_path = role, config, socket_path, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "ckptd", self.role, "-c", str(self.config), *arguments]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None and self.process.poll() is None, self.log()
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(PATIENCE)

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.exit_code()

    def exit_code(self, timeout: float = PATIENCE) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ask(self, question: str = "status") -> dict[str, Any]:
        return ask(self.socket, question, timeout=PATIENCE)

    def wish(self, name: str, **parameters: object) -> dict[str, Any]:
        return wish(self.socket, name, timeout=PATIENCE, **parameters)

    def status(self) -> dict[str, Any]:
        """Empty while it does not answer."""
        assert self.running, self.log()
        with suppress(Unreachable, Answered):
            return ask(self.socket, "status", timeout=PATIENCE)
        return {}

    def answers(self) -> bool:
        """Its control socket is there, whatever it says."""
        try:
            self.ask()
        except Unreachable:
            return False
        except Answered:
            pass
        return True

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def rss(self) -> int:
        """Bytes of anonymous memory: neither an image nor a segment."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+)", status)[0]) << 10


class Line(NamedTuple):
    """One direction of the relay: what is to happen to it."""

    frozen: bool = False
    delay: float = 0.0
    flip_at: int = -1  # byte of the connection, counted from its start
    cut_at: int = -1
    cut_before: bytes = b""  # a pattern; what comes before it still passes
    cut_after: bytes = b""


class Relay:
    """TCP in between. `up` and `down` may be set at any time and count for each connection that there is."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.lines: dict[Direction, Line] = {"up": Line(), "down": Line()}
        self.open = True
        self.happened = 0  # cuts and flips that were carried out
        self.passed: dict[Direction, int] = {"up": 0, "down": 0}
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._ended = False
        threading.Thread(target=self._serve, daemon=True).start()

    def set(self, direction: Direction | None = None, **changes: Any) -> None:
        """Both directions unless one is named."""
        for one in ("up", "down") if direction is None else (direction,):
            self.lines[one] = Line(**changes)  # type: ignore[index]

    def cut(self) -> None:
        """End every connection; new ones are taken."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for sock in pair:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._ended = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _serve(self) -> None:
        while not self._ended:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self.open:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), 5)
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs.append((near, far))
            for direction, source, target in (("up", near, far), ("down", far, near)):
                threading.Thread(target=self._pump, args=(direction, source, target), daemon=True).start()

    def _pump(self, direction: Direction, source: socket.socket, target: socket.socket) -> None:
        passed = 0
        try:
            while True:
                data = bytearray(source.recv(1 << 16))
                while self.lines[direction].frozen and not self._ended and source.fileno() >= 0 and self._alive(source):
                    time.sleep(0.01)
                if not data:
                    break
                line = self.lines[direction]
                if line.delay:
                    time.sleep(line.delay)
                if passed <= line.flip_at < passed + len(data):
                    data[line.flip_at - passed] ^= 1 << (line.flip_at % 8)
                    self._done(direction)
                if 0 <= line.cut_at <= passed + len(data):
                    target.sendall(data[: max(0, line.cut_at - passed)])
                    self._done(direction)
                    break
                if line.cut_before and (found := re.search(line.cut_before, data)):
                    target.sendall(data[: found.start()])
                    self._done(direction)
                    break
                target.sendall(data)
                passed += len(data)
                self.passed[direction] += len(data)
                if line.cut_after and re.search(line.cut_after, data):
                    self._done(direction)
                    break
        except OSError:
            pass
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _alive(self, source: socket.socket) -> bool:
        return any(source in pair for pair in self._pairs)

    def _done(self, direction: Direction) -> None:
        self.happened += 1
        self.lines[direction] = Line()


def frame_of(kind: Type) -> bytes:
    """A pattern that finds the header of a frame of this type."""
    return re.escape(MAGIC) + b"[\x01-\x0f]" + re.escape(bytes([kind]))


class Pair:
    """Both daemons' files and processes in `root`.

    Sections of the files as mappings; strings are written as strings.
    """

    def __init__(
        self, root: Path, *, guest: Mapping[str, object] | None = None, checkpoint: Mapping[str, object] | None = None,
        link: Mapping[str, object] | None = None, replica: Mapping[str, object] | None = None,
        secondary_link: Mapping[str, object] | None = None, relay: bool = False, replica_dir: Path | None = None,
    ) -> None:  # fmt: skip
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._own_replica = replica_dir is None
        self.replica_dir = replica_dir or Path(f"/dev/shm/ckptd-test-{os.getpid()}-{root.name}-{free_port()}")
        self.port = free_port()
        self.relay = Relay(self.port) if relay else None
        link = {"heartbeat": "200ms", "timeout": "2s", "backoff_min": "20ms", "backoff_max": "200ms", **(link or {})}
        self.sections: dict[str, dict[str, object]] = {
            "guest": {
                "name": GUEST, "workload": "uniform", "dirty_rate": 20_000, "output_every": 2,
                **({} if "regions" in (guest or {}) else {"memory": "16MiB"}), **(guest or {}),
            },
            "secondary": {"address": f"127.0.0.1:{self.relay.port if self.relay else self.port}"},
            "checkpoint": {"interval": "20ms", "stage": "16MiB", **(checkpoint or {})},
            "link": link,
            "runtime": {"dir": str(root / "p")},
        }  # fmt: skip
        self.secondary_sections: dict[str, dict[str, object]] = {
            "listen": {"address": f"127.0.0.1:{self.port}"},
            "replica": {"dir": str(self.replica_dir), "reserve": "4MiB", "history_bytes": "64MiB", **(replica or {})},
            "link": {"heartbeat": "200ms", "timeout": "2s", **(secondary_link or {})},
            "runtime": {"dir": str(root / "s")},
        }
        self.primary = Daemon("primary", root / "p.toml", root / "p" / "primary.sock", root / "p.log")
        self.secondary = Daemon("secondary", root / "s.toml", root / "s" / "secondary.sock", root / "s.log")
        self.write()

    def write(self) -> None:
        """The files, from the sections as they are now."""
        self.primary.config.write_text(_toml(self.sections))
        self.secondary.config.write_text(_toml(self.secondary_sections) + f'\n[[guest]]\nname = "{GUEST}"\n')

    def start(self, *arguments: str) -> Pair:
        """Both, and wait until the guest is protected."""
        self.secondary.start()
        self.primary.start(*arguments)
        self.protected()
        return self

    def start_quietly(self) -> Pair:
        """As `start`, where no epoch follows the first one by itself."""
        self.secondary.start()
        wait_for(self.held, "the secondary answers")
        self.primary.start()
        self.protected(0)
        return self

    # --- what is

    def status(self) -> dict[str, Any]:
        return self.primary.status()

    def held(self) -> dict[str, Any]:
        """What the secondary says of the guest; empty while it does not answer."""
        found = self.secondary.status().get("guests")
        return found[0] if found else {}

    def no_more_fits(self) -> bool:
        """The window is full, or the socket: on a busy machine epochs are large, and fewer than the window fill it."""
        status = self.primary.ask()
        return status["in_flight"] >= 4 or (status["in_flight"] > 0 and status["sending"])

    def condition(self) -> str:
        return str(self.status().get("condition", ""))

    def protected(self, epochs: int = 3) -> dict[str, Any]:
        """Wait until it is, and `epochs` more are acknowledged. Returns the status."""
        first: list[int] = []

        def done() -> dict[str, Any] | None:
            status = self.status()
            if status.get("condition") != "protected":
                first.clear()
                return None
            first.append(status["epochs_committed"])
            return status if status["epochs_committed"] >= first[0] + epochs else None

        return wait_for(done, "protected") or {}

    def advances(self, key: str, by: int = 1) -> dict[str, Any]:
        """Wait until a figure of the primary has grown."""
        before = self.primary.ask()[key]
        return wait_for(lambda: (now := self.status()) and now[key] >= before + by and now, f"{key} grows") or {}

    def steps(self) -> int:
        return int(self.primary.ask()["guest_facts"]["steps"])

    def verify(self) -> dict[str, Any]:
        """Both ends hash everything (P2, P4)."""
        answer = self.primary.wish("verify")
        assert answer["equal"]
        return answer

    def params(self) -> Params:
        return params_from(load_primary(self.primary.config, {}).config.guest)

    def outputs(self, side: Literal["p", "s"] = "p") -> list[Output]:
        """What left the guest on this side; a last line without its end is not counted."""
        path = self.root / "p" / "output" if side == "p" else self.root / "s" / f"{GUEST}.output"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [Output(int(n), int(step), bytes.fromhex(content)) for n, step, content in map(str.split, lines)]

    def last_output(self, side: Literal["p", "s"] = "p") -> int:
        return max((output.number for output in self.outputs(side)), default=0)

    def check_outputs(self) -> int:
        """P1: together both files have every output from 1 on, and each is what an uninterrupted guest says.

        How many.
        """
        seen: dict[int, Output] = {}
        for output in self.outputs("p") + self.outputs("s"):
            assert seen.setdefault(output.number, output) == output, "two contents for one output"
        assert sorted(seen) == list(range(1, len(seen) + 1)), "outputs are missing"
        if seen:
            right = run_to(self.params(), seen[len(seen)].step).outputs
            assert [seen[one.number] for one in right] == right
        return len(seen)

    def guest_pid(self, side: Literal["p", "s"] = "p") -> int:
        """0: there is none."""
        path = self.root / "p" / "guest.pid" if side == "p" else self.root / "s" / GUEST / "guest.pid"
        with suppress(OSError, ValueError):
            pid = int(path.read_text())
            if b"ckptd.guests.sim.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return 0

    def guest_steps(self) -> int:
        """How far the primary's guest is, from the page that it shares: no daemon is asked."""
        for path in Path(f"/proc/{self.guest_pid()}/fd").iterdir():
            with suppress(OSError):
                if "ckptd-control" in os.readlink(path):
                    fd = os.open(path, os.O_RDWR)
                    try:
                        return ControlPage(map_file(fd)).step
                    finally:
                        os.close(fd)
        raise AssertionError("the guest's process has no control page")

    def kill_guest(self, side: Literal["p", "s"] = "p") -> None:
        pid = self.guest_pid(side)
        assert pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.guest_pid(side), "the guest is dead")

    # --- the end

    def logs(self) -> str:
        files = [self.primary.log_path, self.secondary.log_path, self.root / "p" / "guest.log",
                 self.root / "s" / GUEST / "guest.log"]  # fmt: skip
        return "\n".join(f"--- {path}\n{path.read_text()[-6000:]}" for path in files if path.exists())

    def close(self) -> None:
        if self.relay is not None:
            self.relay.close()
        for daemon in (self.primary, self.secondary):
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()
        for side in ("p", "s"):
            if pid := self.guest_pid(side):  # type: ignore[arg-type]
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self._own_replica:
            shutil.rmtree(self.replica_dir, ignore_errors=True)


def _toml(sections: Mapping[str, Mapping[str, object]]) -> str:
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {_value(value)}\n" for key, value in section.items())
        for name, section in sections.items()
    )


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_value(one)}" for key, one in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value)
