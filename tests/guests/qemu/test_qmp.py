"""QEMU's monitor: against QEMU, and against servers that say what no QEMU would."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.errors import GuestError
from ckptd.guests.qemu import qmp as module
from ckptd.guests.qemu.qmp import Monitor, QmpError

from .machines import Machine, needs_qemu, started

BARE = ["-M", "none", "-nodefaults", "-display", "none"]
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


@pytest.fixture
def place() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ckq", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def qemu() -> Iterator[tuple[Machine, Path]]:
    made = Path(tempfile.mkdtemp(prefix="ckq", dir="/tmp"))
    try:
        extra = ["-qmp", f"unix:{made}/k,server=on,wait=off", "-monitor", f"unix:{made}/h,server=on,wait=off"]
        with started(*BARE, *extra) as machine:
            yield machine, made
    finally:
        shutil.rmtree(made)


def served(path: Path, talk: Callable[[socket.socket], None]) -> threading.Thread:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def run() -> None:
        with listener, listener.accept()[0] as sock:
            talk(sock)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.qemu
@needs_qemu
def test_questions_answers_events_and_refusals(qemu: tuple[Machine, Path]) -> None:
    machine, place = qemu
    monitor = Monitor(place / "k")
    try:
        assert monitor.peer_pid == machine.pid
        assert monitor.execute("query-name") == {}
        assert "QEMU" in monitor.human("info version") or "7." in monitor.human("info version")
        with pytest.raises(QmpError, match=r"QEMU refuses no-such-command: .*not been found") as caught:
            monitor.execute("no-such-command")
        assert "not been found" in caught.value.reason
        machine.ask("stop")
        machine.ask("cont")
        monitor.execute("stop")
        assert monitor.execute("query-status")["status"] == "paused"
        assert [event["event"] for event in monitor.events] == ["STOP", "RESUME", "STOP"]
        assert monitor.wait_event("RESUME", 30) is not None
        assert [event["event"] for event in monitor.events] == ["STOP", "STOP"]
        assert monitor.wait_event("RESUME", 0.05) is None
        number = monitor.begin("query-status")
        assert monitor.execute("query-name") == {}
        assert monitor.finish("query-status", number)["status"] == "paused"
        with pytest.raises(QmpError, match="refuses no-such-command"):
            monitor.finish("no-such-command", monitor.begin("no-such-command"))
    finally:
        monitor.close()


@pytest.mark.qemu
@needs_qemu
def test_a_descriptor_goes_along(qemu: tuple[Machine, Path], place: Path) -> None:
    machine, monitors = qemu
    fd = os.open(place / "file", os.O_WRONLY | os.O_CREAT)
    monitor = Monitor(monitors / "k")
    try:
        given = monitor.execute("add-fd", {"opaque": "x" * 70_000}, [fd])  # longer than a socket takes at once, maybe
        assert os.path.samestat(os.stat(f"/proc/{machine.pid}/fd/{given['fd']}"), os.fstat(fd))
        monitor.execute("remove-fd", {"fdset-id": given["fdset-id"]})
    finally:
        monitor.close()
        os.close(fd)


@pytest.mark.qemu
@needs_qemu
def test_a_monitor_that_somebody_holds_does_not_greet(
    qemu: tuple[Machine, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, place = qemu
    end = 30
    monkeypatch.setattr(module, "_GREETING", end)
    first = Monitor(place / "k")
    monkeypatch.setattr(module, "_GREETING", 0.5)
    with pytest.raises(GuestError, match="another client holds it"):
        Monitor(place / "k")
    first.close()
    monkeypatch.setattr(module, "_GREETING", end)
    Monitor(place / "k").close()


@pytest.mark.qemu
@needs_qemu
def test_what_is_no_qmp_is_said_to_be_none(qemu: tuple[Machine, Path], place: Path) -> None:
    _, monitors = qemu
    with pytest.raises(GuestError, match=r"no QMP monitor: it says b.QEMU .*type"):  # the human one
        Monitor(monitors / "h")
    for number, (said, why) in enumerate([
        (b"{}\n", "does not greet with QMP"), (b"[1]\n", "it says"), (b"\xff\xfe\n", "it says"),
        (b"", "QEMU is gone: its monitor was closed"), (b'{"QM', "QEMU is gone"),
    ]):  # fmt: skip
        thread = served(place / str(number), lambda sock, said=said: sock.sendall(said))  # type: ignore[misc]
        with pytest.raises(GuestError, match=why):
            Monitor(place / str(number))
        thread.join(30)
    (place / "file").touch()
    for missing in (place / "nothing", place / "file"):
        with pytest.raises(GuestError, match="cannot be reached"):
            Monitor(missing)


def test_lines_may_be_cut_anywhere_and_events_come_in_between(place: Path) -> None:
    said = (
        GREETING + b'{"return": {}, "id": 1}\r\n{"event": "A", "data": {"id": 2, "return": 5}}\r\n'
        b'{"return": "late", "id": 77}\r\n{"error": {"class": "x"}}\r\n{"event": "B"}\r\n'
        b'{"id": 2, "return": "\xc3\xa9"}\r\n'
    )

    def talk(sock: socket.socket) -> None:
        for byte in said:
            sock.sendall(bytes([byte]))
        sock.recv(1 << 16)

    served(place / "k", talk)
    monitor = Monitor(place / "k")
    try:
        assert monitor.execute("question") == "é"
        assert [event["event"] for event in monitor.events] == ["A", "B"]
    finally:
        monitor.close()


def test_a_late_answer_never_passes_for_that_to_another_question(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    def talk(sock: socket.socket) -> None:
        sock.sendall(GREETING + b'{"return": {}, "id": 1}\r\n')
        end.wait(60)

    served(place / "k", talk)
    monkeypatch.setattr(module, "_TIMEOUT", 0.2)
    monitor = Monitor(place / "k")
    try:
        with pytest.raises(GuestError, match="does not answer slow within"):
            monitor.execute("slow")
        with pytest.raises(GuestError, match="QEMU is gone"):
            monitor.execute("next")
        with pytest.raises(GuestError, match="QEMU is gone"):
            monitor.poll()
    finally:
        end.set()
        monitor.close()


@pytest.mark.qemu
@needs_qemu
def test_qemu_killed_in_the_middle_of_a_command_and_before_one(place: Path) -> None:
    with started(*BARE, "-qmp", f"unix:{place}/k,server=on,wait=off") as machine:
        monitor = Monitor(place / "k")
        os.kill(machine.pid, signal.SIGSTOP)
        threading.Timer(0.2, lambda: os.kill(machine.pid, signal.SIGKILL)).start()
        with pytest.raises(GuestError, match=r"QEMU is gone \(query-status"):
            monitor.execute("query-status")
        with pytest.raises(GuestError, match="QEMU is gone"):
            monitor.execute("query-status")
        with pytest.raises(GuestError, match="QEMU is gone"):
            monitor.poll()
        with pytest.raises(GuestError, match="QEMU is gone"):
            monitor.wait_event("STOP", 30)
        monitor.close()
    with pytest.raises(GuestError, match="cannot be reached"):
        Monitor(place / "k")
