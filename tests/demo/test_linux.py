"""The Linux guest: how it is built, offline and from packages made here, and what its programs do in a real QEMU."""

from __future__ import annotations

import gzip
import lzma
import mmap
import os
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from ckptd.demo.linux import (
    CONTROL_PORT,
    COUNTER_PORT,
    PATTERNS_MAGIC,
    READY,
    SPIN_PORT,
    LinuxGuest,
    build,
    default_folder,
    packages,
)
from ckptd.demo.linux.__main__ import main
from ckptd.demo.linux.archive import Entry, pack, unpack
from ckptd.demo.linux.programs import PROGRAMS, assemble
from ckptd.errors import CkptdError, ConfigError, GuestError

needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("dpkg", "dpkg-deb", "as", "ld")),
    reason="the guest is built with dpkg, as and ld (apt-get install dpkg binutils), and one of them is missing here",
)


# --- the archive


def test_an_archive_holds_what_was_put_in() -> None:
    entries = [
        Entry.folder("bin"),
        Entry.character_device("bin/console", 5, 1),
        *(Entry.file(f"bin/{'n' * size}", bytes(range(size))) for size in range(1, 9)),
        Entry.program("init", b"#!/bin/sh\n"),
    ]
    archive = pack(entries)
    assert list(unpack(archive)) == entries
    assert len(archive) % 4 == 0
    assert pack(entries) == archive


def test_an_archive_that_ends_early_is_said_to() -> None:
    archive = pack([Entry.file("a", b"123456789")])
    for length in (0, 50, 125):
        with pytest.raises(ValueError, match=r"at byte|within 'a'"):
            list(unpack(archive[:length]))


@pytest.mark.skipif(shutil.which("cpio") is None, reason="there is no cpio here to read the archive with")
def test_another_program_reads_the_archive(tmp_path: Path) -> None:
    archive = pack([Entry.folder("x"), Entry.program("x/a", b"12345"), Entry.file("x/b", b"")])
    subprocess.run(["cpio", "-i", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "x" / "a").read_bytes() == b"12345"
    assert (tmp_path / "x" / "b").read_bytes() == b""
    assert stat.S_IMODE((tmp_path / "x" / "a").stat().st_mode) == 0o755


# --- the build


def module(*needed: str) -> bytes:
    """What stands for a kernel's module: of it, only what it depends on is read."""
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(needed).encode() + b"\0name=x\0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds packages, small ones made here, so that nothing has to be downloaded."""
    kernel, busybox = tmp_path / "kernel", tmp_path / "busybox"
    modules = kernel / "lib" / "modules" / "9.9-cloud"
    contents = {
        kernel / "boot" / "vmlinuz-9.9-cloud": b"a kernel",
        modules / "modules.builtin": b"kernel/drivers/virtio/virtio.ko\n",
        modules / "kernel" / "virtio_pci.ko.xz": lzma.compress(module("virtio-ring", "virtio")),
        modules / "kernel" / "virtio_ring.ko": module(),
        modules / "kernel" / "net" / "virtio_net.ko.gz": gzip.compress(module("net_failover")),
        modules / "kernel" / "net" / "net_failover.ko": module(),
        modules / "kernel" / "virtio_blk.ko": module("virtio_ring"),
        modules / "kernel" / "virtio_console.ko": module(),
        busybox / "bin" / "busybox": b"a busybox",
    }
    for path, data in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    place = tmp_path / "guest"
    (place / "packages").mkdir(parents=True)
    for root, name in ((kernel, "linux-image-9.9-cloud-amd64"), (busybox, "busybox-static")):
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: t <t@example.org>\nDescription: test\n"
        )
        subprocess.run(
            ["dpkg-deb", "--build", str(root), str(place / "packages" / f"{name}_1_amd64.deb")],
            check=True, capture_output=True,
        )  # fmt: skip
    return place


def contents(guest: LinuxGuest) -> dict[str, Entry]:
    return {entry.name: entry for entry in unpack(gzip.decompress(guest.initrd.read_bytes()))}


@needs_tools
def test_the_initrd_holds_programs_and_modules_in_order(folder: Path) -> None:
    guest = build(folder)
    assert guest.kernel.read_bytes() == b"a kernel"
    found = contents(guest)
    assert found["bin/busybox"].data == b"a busybox"
    assert found["init"].data.startswith(b"#!/bin/busybox sh\n")
    assert all(found[f"bin/{name}"].data.startswith(b"\x7fELF") for name in PROGRAMS)
    order = found["modules/order"].data.decode().split()
    expected = ("virtio_ring", "virtio_pci", "net_failover", "virtio_net", "virtio_blk", "virtio_console")
    assert order == [f"{name}.ko" for name in expected]
    assert found["modules/virtio_pci.ko"].data == module("virtio-ring", "virtio")


@needs_tools
def test_what_is_whole_is_not_built_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = build(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setenv("PATH", "")
    assert build(folder) == guest
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@needs_tools
@pytest.mark.parametrize("name", ["vmlinuz", "initrd.gz", "guest.json"])
def test_what_is_damaged_is_built_again_and_is_the_same(folder: Path, name: str) -> None:
    build(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-3])
    build(folder)
    assert (folder / name).read_bytes() == whole


@needs_tools
def test_a_build_that_dies_leaves_nothing_that_looks_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    done: list[Path] = []

    def fail(source: Path, target: Path) -> None:
        if done:
            raise OSError("no more")
        done.append(target)
        replace(source, target)

    (folder / ".aside-of-a-killed-one").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no more"):
            build(folder)
    assert not (folder / "guest.json").exists()
    guest = build(folder)
    assert guest.initrd.exists()
    assert not list(folder.glob(".aside-*"))


@needs_tools
def test_of_builds_at_once_one_builds(folder: Path) -> None:
    said: list[str] = []
    threads = [threading.Thread(target=build, args=(folder, said.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["building the guest"]
    assert contents(LinuxGuest(folder))


@needs_tools
def test_a_damaged_package_is_named_and_not_kept(folder: Path) -> None:
    package = folder / "packages" / "busybox-static_1_amd64.deb"
    package.write_bytes(package.read_bytes()[:100])
    with pytest.raises(GuestError, match=r"busybox-static_1_amd64\.deb cannot be unpacked"):
        build(folder)
    assert not package.exists()


def test_what_is_missing_is_said_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(GuestError, match=r"there is no 'as' here; apt-get install binutils"):
        assemble("counter")
    with pytest.raises(GuestError, match=r"there is no 'apt-get' here; build it on a Debian machine"):
        packages.fetch(tmp_path / "packages", tmp_path, lambda _: None)
    assert main([str(tmp_path / "guest")]) == 1
    assert "apt-get install binutils" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "guest").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_used_is_said_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="CKPTD_DEMO_GUEST"):
        build(tmp_path / "file" / "guest")


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_default_folder_is_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == Path("/home/someone/.cache/ckptd/demo-guest")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert default_folder() == Path("/home/someone/.cache/ckptd/demo-guest")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_folder() == Path("/cache/ckptd/demo-guest")
    monkeypatch.setenv("CKPTD_DEMO_GUEST", "/elsewhere")
    assert default_folder() == Path("/elsewhere")


def test_the_command_line_says_what_is_wanted() -> None:
    guest = LinuxGuest(Path("/g"))
    kernel, asked = guest.command_line().split(), guest.command_line(
        ips=["10.1.0.2/24", "10.2.0.2/24"], gateway="none", patterns=(16, 100), dirty=(500, 8), spin=True, say=3,
        shell=True, extra=["nokaslr"],
    ).split()  # fmt: skip
    assert asked == [
        *kernel, "ckptd.ip=10.1.0.2/24", "ckptd.ip1=10.2.0.2/24", "ckptd.gateway=none", "ckptd.patterns=16,100",
        "ckptd.dirty=500,8", "ckptd.say=3", "ckptd.spin=1", "ckptd.shell=1", "nokaslr",
    ]  # fmt: skip
    assert guest.command_line(patterns=16).split() == [*kernel, "ckptd.patterns=16"]
    assert guest.arguments("x") == ["-kernel", "/g/vmlinuz", "-initrd", "/g/initrd.gz", "-append", "x"]


# --- the guest


class Client:
    """One connection to a server of the guest."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._file = self._socket.makefile("rwb", 0)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def line(self) -> str:
        line = self._file.readline()
        assert line.endswith(b"\n")
        return line.decode().strip()

    def ask(self, line: str = "") -> str:
        self.send(line.encode() + b"\n")
        return self.line()


class Running:
    """A booted guest; `connect` takes the guest's port."""

    def __init__(self, process: subprocess.Popen[bytes], ports: dict[int, int], console: Path) -> None:
        self.process = process
        self._ports = ports
        self._console = console

    def connect(self, port: int) -> Client:
        return Client(self._ports[port])

    def console(self) -> list[str]:
        return self._console.read_text(errors="replace").splitlines() if self._console.exists() else []

    def memory(self) -> mmap.mmap:
        """The guest's RAM, from outside."""
        place = Path(f"/proc/{self.process.pid}/fd")
        opened = next(fd for fd in place.iterdir() if "memory-backend-memfd" in os.readlink(fd))
        with opened.open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)

    def wait(self, what: Callable[[], bool]) -> None:
        for _ in range(1200):
            if what():
                return
            assert self.process.poll() is None, f"QEMU has ended: {self.console()}"
            time.sleep(0.05)
        raise AssertionError(f"it did not come: {self.console()}")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("there is no qemu-system-x86_64 here: apt-get install qemu-system-x86")
    try:
        guest = build(default_folder())
    except CkptdError as error:
        pytest.skip(str(error))
    ports = dict(zip((COUNTER_PORT, CONTROL_PORT, SPIN_PORT), free_ports(3), strict=True))
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{ours}-:{theirs}" for theirs, ours in ports.items())
    console = tmp_path_factory.mktemp("linux") / "console"
    said = guest.command_line(
        ips=["10.0.2.15/24", "10.0.3.15/24"], patterns=(16, 5000), dirty=(2000, 8), spin=True, say=50
    )
    process = subprocess.Popen([
        qemu, "-machine", "q35,memory-backend=ram", "-accel", "tcg", "-cpu", "max", "-m", "256",
        "-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-nodefaults", "-no-user-config",
        "-display", "none", "-no-reboot", "-serial", f"file:{console}", *guest.arguments(said),
        "-netdev", f"user,id=n0{forwards}", "-device", "virtio-net-pci,netdev=n0",
    ])  # fmt: skip
    one = Running(process, ports, console)
    try:
        one.wait(lambda: READY in one.console())
        yield one
    finally:
        process.kill()
        process.wait()


@pytest.mark.qemu
def test_two_connections_share_one_counter(running: Running) -> None:
    with running.connect(COUNTER_PORT) as a, running.connect(COUNTER_PORT) as b:
        first = int(a.ask("x"))
        answers = [int((b, a)[turn % 2].ask("x" * turn)) for turn in range(100)]
    assert answers == list(range(first + 1, first + 101))


@pytest.mark.qemu
def test_many_connections_lose_no_number(running: Running) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(running.connect(COUNTER_PORT)) for _ in range(10)]
        first = int(clients[0].ask())
        for client in clients:
            client.send(b"one\r\n\ntwo\n" * 20)
        answers = [[int(client.line()) for _ in range(60)] for client in clients]
    assert all(own == sorted(own) for own in answers)
    assert sorted(chain.from_iterable(answers)) == list(range(first + 1, first + 1 + 10 * 60))


@pytest.mark.qemu
def test_a_loop_counts(running: Running) -> None:
    with running.connect(SPIN_PORT) as client:
        before = int(client.ask())
        running.wait(lambda: int(client.ask()) > before)


@pytest.mark.qemu
def test_the_console_says_numbered_lines(running: Running) -> None:
    running.wait(lambda: "say 50" in running.console())
    lines = running.console()
    said = [line for line in lines if line.startswith("say ")][:50]
    assert said == [f"say {number}" for number in range(1, 51)]
    assert "no network card eth1" in lines


@pytest.mark.qemu
def test_patterns_are_whole_under_load(running: Running) -> None:
    with running.connect(CONTROL_PORT) as client:
        assert client.ask("chek").startswith("unknown")
        word, first, pages = client.ask("check").split()
        assert (word, pages) == ("ok", "4096")

        def later() -> bool:
            word, now, _ = client.ask("check").split()
            assert word == "ok"
            return int(now) > int(first)

        running.wait(later)


@pytest.mark.qemu
def test_a_page_changed_from_outside_is_named_and_the_guest_switches_off(running: Running) -> None:
    page = 77
    with running.memory() as memory:
        words = np.frombuffer(memory, dtype="<u8").reshape(-1, 512)
        found = np.flatnonzero((words[:, 0] == PATTERNS_MAGIC) & (words[:, 1] == page))
        del words
        assert len(found) >= 1
        for place in found:  # where the kernel has moved the page, what it left has the magic, too
            memory[int(place) * 4096 + 2000] ^= 1
    with running.connect(CONTROL_PORT) as client:
        for _ in range(2):
            assert client.ask("check").startswith(f"bad {page} checksum ")
        assert any(line.startswith(f"patterns: bad {page} checksum ") for line in running.console())
        assert client.ask("poweroff") == "bye"
    assert running.process.wait(60) == 0
