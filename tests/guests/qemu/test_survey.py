"""Surveys of real QEMUs, checked against what the process really has, and the parsers against what QEMU prints."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path

import msgpack
import pytest

from ckptd.errors import GuestError
from ckptd.guests.qemu import proc, surveyor
from ckptd.guests.qemu.cmdline import parse
from ckptd.guests.qemu.hmp import classify, parse_flat_ranges, parse_network, parse_ram_blocks
from ckptd.guests.qemu.survey import Backend, Netdev, Nic, Survey
from ckptd.guests.qemu.surveyor import survey
from tests.guests.qemu.machines import Machine, needs_qemu, started

PLAIN = ["-display", "none", "-nodefaults", "-S"]
MEM = "memory-backend"


def surveyed(machine: Machine) -> Survey:
    return asyncio.run(survey(machine, machine.pid))


def proves(machine: Machine, backend: Backend, offset: int, gpa: int) -> None:
    """What is written at the backend's address in the process is what the guest has at `gpa`."""
    assert backend.address is not None, backend.problem
    word = os.urandom(4)
    with open(f"/proc/{machine.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(backend.address + offset)
        memory.write(word)
    shown = machine.ask("human-monitor-command", {"command-line": f"xp /1xw {gpa:#x}"})
    assert int(shown.split(": 0x")[1], 16) == int.from_bytes(word, "little")


def by_id(found: Survey) -> dict[str, Backend]:
    return {backend.id: backend for backend in found.ram}


@pytest.mark.qemu
@needs_qemu
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_private_ram_above_4_gib(machine: str) -> None:
    with started(*PLAIN, "-M", machine, "-m", "5G") as qemu:
        found = surveyed(qemu)
        assert found.machine in ("pc-i440fx-7.2", "pc-q35-7.2") or found.machine.startswith("pc-")
        assert found.machine != machine
        ram = by_id(found)["pc.ram"]
        assert (ram.size, ram.share, ram.default, ram.page_size) == (5 << 30, False, True, 4096)
        assert (ram.kind, ram.file_path, ram.file_inode) == ("memory-backend-ram", "", 0)
        below = (3 << 30) if machine == "pc" else (2 << 30)  # how much lies below 4 GiB
        proves(qemu, ram, 0x500, 0x500)
        proves(qemu, ram, below - 4096, below - 4096)
        proves(qemu, ram, below, 4 << 30)
        proves(qemu, ram, (5 << 30) - 8, (4 << 30) + (5 << 30) - below - 8)
        assert [one for one in found.ram if not one.firmware] == [ram]


@pytest.mark.qemu
@needs_qemu
def test_several_backends(tmp_path: Path) -> None:
    argv = [
        *PLAIN, "-M", "pc", "-m", "5G,slots=4,maxmem=16G", "-smp", "2",
        "-object", f"{MEM}-memfd,id=a,size=2G", "-object", f"{MEM}-file,id=b,size=3G,share=on,mem-path=ram",
        "-numa", "node,memdev=a", "-numa", "node,memdev=b",
        "-object", '{"qom-type":"memory-backend-ram","id":"d","size":33554432,"share":true}', "-device",
        "pc-dimm,memdev=d", "-object", f"{MEM}-file,id=private,size=32M,share=off,mem-path=own",
        "-device", "pc-dimm,memdev=private,id=p", "-object", f"{MEM}-ram,id=idle,size=16M",
    ]  # fmt: skip
    with started(*argv, cwd=tmp_path) as qemu:
        found = surveyed(qemu)
        ram = by_id(found)
        assert sorted(ram) == ["a", "b", "d", "idle", "pc.bios", "private"] and ram.pop("pc.bios").firmware
        shared = {name: backend.share for name, backend in ram.items() if backend.used}
        assert shared == {"a": True, "b": True, "d": True, "private": False}
        assert not any(backend.default for backend in ram.values())
        assert not ram["idle"].used and ram["idle"].address is None and ram["idle"].problem is None
        proves(qemu, ram["a"], 0x9000, 0x9000)
        proves(qemu, ram["b"], 4096, (2 << 30) + 4096)
        proves(qemu, ram["b"], (1 << 30) + 4, (4 << 30) + 4)
        dimms = {dimm["data"]["memdev"]: dimm["data"]["addr"] for dimm in qemu.ask("query-memory-devices")}
        proves(qemu, ram["d"], 12, dimms["/objects/d"] + 12)
        proves(qemu, ram["private"], 12, dimms["/objects/private"] + 12)
        assert ram["a"].file_path.startswith("/memfd:") and ram["a"].file_inode
        at = (tmp_path / "ram").stat()
        assert ram["b"].file_path.endswith(str(tmp_path / "ram")) and ram["b"].file_inode == at.st_ino
        assert ram["b"].file_device == f"{os.major(at.st_dev):02x}:{os.minor(at.st_dev):02x}"
        assert ram["private"].file_path.endswith(str(tmp_path / "own"))
        assert found.cpus == 2 and [device.driver for device in found.devices] == ["pc-dimm", "pc-dimm"]
        assert not [block for block in found.blocks if block.kind != "rom"]


@pytest.mark.qemu
@needs_qemu
def test_old_machines_name_blocks_by_path() -> None:
    argv = ["-M", "pc-q35-3.1", "-m", "64", "-object", f"{MEM}-memfd,id=r,size=64M", "-numa", "node,memdev=r"]
    with started(*PLAIN, *argv) as qemu:
        ram = by_id(surveyed(qemu))["r"]
        assert ram.block == "/objects/r"
        proves(qemu, ram, 0x500, 0x500)


@pytest.mark.qemu
@needs_qemu
def test_after_the_firmware_has_run() -> None:
    """SeaBIOS shadows itself into RAM, which splits the ranges."""
    with started("-display", "none", "-nodefaults", "-m", "64", "-debugcon", "null") as qemu:
        found = surveyed(qemu)
        for _ in range(3):
            qemu.ask("stop")
            assert surveyed(qemu).ram == found.ram
            qemu.ask("cont")
        assert found.status == "running" and found.accelerator == "tcg"


@pytest.mark.qemu
@needs_qemu
def test_devices_disks_and_networks(tmp_path: Path) -> None:
    for name, size in (("disk", 1 << 20), ("code", 1 << 17), ("vars", 1 << 16), ("cd", 1 << 20)):
        (tmp_path / name).write_bytes(bytes(size))
    argv = [
        "-display", "none", "-S", "-M", "q35", "-m", "64", "-vga", "virtio", "-snapshot",
        "-drive", "if=pflash,file=code,format=raw,readonly=on", "-drive", "if=pflash,file=vars,format=raw",
        "-drive", "file=disk,format=raw,if=virtio", "-blockdev",
        '{"driver":"raw","node-name":"d1","read-only":true,"file":{"driver":"file","filename":"cd"}}',
        "-device", "virtio-blk-pci,drive=d1,id=ro", "-device", "virtio-balloon-pci,free-page-reporting=on,id=bal",
        "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,id=net0", "-netdev", "hubport,id=h,hubid=4",
        "-device", "e1000,netdev=h,mac=52:54:00:00:00:09", "-serial", "null", "-monitor", "none",
        "-object", "filter-dump,id=f,netdev=n0,file=dump", "-device", "ivshmem-plain,memdev=iv",
        "-object", f"{MEM}-memfd,id=iv,size=16M",
    ]  # fmt: skip
    with started(*argv, cwd=tmp_path) as qemu:
        found = surveyed(qemu)
    assert {block.name: block.kind for block in found.blocks if block.kind != "rom"} == {
        "0000:00:01.0/vga.vram": "video", "system.flash1": "flash",
    }  # fmt: skip
    disks = {disk.name: disk for disk in found.disks}
    writable = {name: disk.writable for name, disk in disks.items() if name != "sd0"}  # which older versions have
    assert writable == {
        "pflash0": False, "pflash1": True, "virtio0": True, "/machine/peripheral/ro/virtio-backend": False,
        "ide2-cd0": False,
    }  # fmt: skip
    assert disks["ide2-cd0"].removable and not disks["ide2-cd0"].inserted and disks["ide2-cd0"].file == ""
    assert disks["/machine/peripheral/ro/virtio-backend"].node == "d1"
    assert {device.id: device.reporting for device in found.devices if device.id} == {
        "ro": False, "bal": True, "net0": False,
    }  # fmt: skip
    assert Netdev("n0", "user", "net0", "", 1, False, "net=10.0.2.0,restrict=off") in found.netdevs
    assert Nic("e1000.0", "e1000", "52:54:00:00:00:09") in found.nics
    assert {"compat_monitor0", "serial0"} <= {chardev.label for chardev in found.chardevs}
    shared = by_id(found)["iv"]
    assert shared.used and shared.address is None
    assert shared.problem and "nowhere in its address space" in shared.problem
    assert (found.status, found.migration, found.jobs) == ("prelaunch", "none", ())
    assert ["ivshmem" in reason for reason in found.blocked] == [True]
    assert "xen-save-devices-state" in found.commands and "x-ignore-shared" in found.capabilities
    assert found.argv[1:3] == ("-display", "none") and found.cwd.endswith(str(tmp_path))
    assert os.path.basename(found.executable).startswith("qemu-system")
    assert Survey.from_dict(msgpack.unpackb(msgpack.packb(found.as_dict()))) == found


@pytest.mark.qemu
@needs_qemu
def test_a_config_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.cfg").write_text('[memory]\n size = "32M"\n')
    with started(*PLAIN, "-readconfig", "a.cfg", cwd=tmp_path) as qemu:
        found = surveyed(qemu)
        assert [(file.path, file.text) for file in found.config_files] == [("a.cfg", '[memory]\n size = "32M"\n')]
        assert found.ram[0].size == 32 << 20
        (tmp_path / "a.cfg").unlink()
        with pytest.raises(GuestError, match=r"a\.cfg"):
            surveyed(qemu)


@pytest.mark.qemu
@needs_qemu
def test_another_process_is_not_it() -> None:
    with started(*PLAIN, "-m", "16") as qemu:
        with pytest.raises(GuestError, match="not the QEMU that answers"):
            asyncio.run(survey(qemu, os.getpid()))
        with pytest.raises(GuestError):
            asyncio.run(survey(qemu, 1 << 22))


@pytest.mark.qemu
@needs_qemu
def test_ram_of_which_a_part_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with started(*PLAIN, "-m", "64") as qemu:
        whole = surveyed(qemu).ram[0]
        assert whole.address is not None
        real = proc.mappings

        def cut(pid: int) -> list[proc.Mapped]:
            hole = whole.address + (1 << 20)
            return [
                dataclasses.replace(part, end=hole) if part.start <= hole < part.end else part for part in real(pid)
            ]

        monkeypatch.setattr(surveyor, "mappings", cut)
        found = surveyed(qemu).ram[0]
        assert found.address is None and found.problem == f"it is mapped to {whole.address + (1 << 20):#x} only"


def mapping(start: int, end: int, access: str = "rw-s", offset: int = 0, inode: int = 5) -> proc.Mapped:
    return proc.Mapped(start, end, access, offset, "00:01", inode, "/memfd:x")


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([mapping(0x1000, 0x9000)], None),
        ([mapping(0x2000, 0x4000, offset=0), mapping(0x4000, 0x6000, offset=0x2000)], None),
        ([mapping(0x2000, 0x4000, offset=0), mapping(0x4000, 0x6000, offset=0x3000)], "another file"),
        ([mapping(0x2000, 0x4000), mapping(0x4000, 0x6000, offset=0x2000, inode=6)], "another file"),
        ([mapping(0x2000, 0x3000), mapping(0x5000, 0x6000)], "8192 bytes at 0x3000 are not mapped"),
        ([mapping(0x3000, 0x6000)], "no memory is mapped at 0x2000"),
        ([mapping(0x2000, 0x5000)], "mapped to 0x5000 only"),
        ([mapping(0x2000, 0x6000, "r--s")], "is r--s, not shared rw"),
        ([mapping(0x2000, 0x6000, "rw-p")], "is rw-p, not shared rw"),
        ([], "no memory"),
    ],
)
def test_whether_mappings_cover_a_backend(parts: list[proc.Mapped], problem: str | None) -> None:
    first, said = proc.fit(parts, 0x2000, 0x4000, True)
    assert (said is None) == (problem is None) == (first is not None)
    assert problem is None or (said is not None and problem in said)


MTREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): /objects/a b
  00000000000c0000-00000000000c3fff (prio 1, rom): pc.ram @00000000000c0000
  0000000100000000-000000017fffffff (prio 0, ram): /objects/a b @0000000040000000 KVM
  00000000fd000000-00000000fdffffff (prio 1, nv-ram): x
  00000000fe000000-00000000fe000fff (prio -1000, romd): system.flash0

FlatView #2
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-000000000009ffff (prio 0, ram): other
"""


def test_flat_ranges() -> None:
    assert [dataclasses.astuple(part) for part in parse_flat_ranges(MTREE)] == [
        (0, 0x9FFFF, "/objects/a b", 0), (0x100000000, 0x17FFFFFFF, "/objects/a b", 0x40000000),
    ]  # fmt: skip
    with pytest.raises(GuestError, match="not understood: '  something else'"):
        parse_flat_ranges(MTREE.replace(' AS "cpu-memory-0", root: system', "  something else"))
    with pytest.raises(GuestError, match="info mtree"):
        parse_flat_ranges("unknown command")


RAMBLOCK = """\
              Block Name    PSize              Offset               Used              Total{0}
                  pc.ram    4 KiB  0x0000000001000000 0x0000000012c00000 0x0000000012c00000{1}
                            2 MiB  0x0000000000000000 0x0000000001000000 0x0000000001000000{1}
0000:00:01.0/virtio-net-pci.rom    4 KiB  0x0000000020080000 0x0000000000040000 0x0000000000080000{1}
"""


@pytest.mark.parametrize(("head", "tail"), [("", ""), ("                HVA  RO", " 0x00007f1234567000  rw")])
def test_ram_blocks(head: str, tail: str) -> None:
    assert parse_ram_blocks(RAMBLOCK.format(head, tail)) == [
        ("pc.ram", 4096, 0x12C00000), ("", 2 << 20, 0x1000000), ("0000:00:01.0/virtio-net-pci.rom", 4096, 0x40000),
    ]  # fmt: skip
    with pytest.raises(GuestError, match="info ramblock"):
        parse_ram_blocks(RAMBLOCK.format(head, tail + " what"))
    with pytest.raises(GuestError, match="info ramblock"):
        parse_ram_blocks("unknown command: 'info ramblock'")


NETWORK = """\
hub 3
 \\ hub3port1: #net170: index=0,type=user,net=10.0.2.0,restrict=off
 \\ hub3port0: e1000.1: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:58
 \\ h2
s0: index=0,type=socket,
virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
 \\ t0: index=0,type=tap,ifname=tq0,script=no,downscript=no
virtio-net-pci.0: index=1,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
 \\ t0: index=1,type=tap,ifname=tq0,script=no,downscript=no
filters:
  - f: type=filter-dump,file=/tmp/dump,maxlen=65536,netdev=t0,queue=all
e1000.2: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:59
"""


def test_network() -> None:
    netdevs, nics = parse_network(NETWORK)
    assert netdevs == [
        Netdev("#net170", "user", "e1000.1", "3", 1, False, "net=10.0.2.0,restrict=off"),
        Netdev("s0", "socket", "", "", 1, False, ""),
        Netdev("t0", "tap", "virtio-net-pci.0", "", 2, False, "ifname=tq0,script=no,downscript=no"),
    ]
    assert [nic.name for nic in nics] == ["e1000.1", "virtio-net-pci.0", "e1000.2"]
    with pytest.raises(GuestError, match="info network"):
        parse_network("t0: something")
    assert parse_network("") == ([], [])


def test_which_netdev_has_vhost() -> None:
    netdevs = parse_network(NETWORK)[0]

    def marked(*argv: str, opened: tuple[str, ...] = ("/dev/vhost-net",)) -> list[str]:
        return [netdev.id for netdev in surveyor._with_vhost(netdevs, parse(argv), opened) if netdev.vhost]

    assert marked("-netdev", "tap,id=t0,vhost=on", opened=()) == []  # QEMU fell back
    assert marked("-netdev", "tap,id=t0,vhost=on") == ["t0"]
    assert marked("-netdev", '{"type":"tap","id":"t0","vhost":true}') == ["t0"]
    assert marked("-net", "tap,vhost=on") == ["t0"]  # not known which, so every tap
    assert marked() == ["t0"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pc.bios", "rom"), ("isa-bios", "rom"), ("pc.rom", "rom"), ("/rom@etc/acpi/tables", "rom"),
        ("/rom@etc/table-loader", "rom"), ("0000:00:01.0/e1000.rom", "rom"),
        ("0000:00:02.0:00.0/virtio-net-pci.rom", "rom"),
        ("system.flash0", "rom"), ("system.flash1", "flash"), ("0000:00:02.0/vga.vram", "video"), ("vga.vram", "video"),
        ("0000:00:02.0/qxl.vram", "video"), ("0000:00:02.0/qxl.rom", "video"), ("vmsvga.fifo", "video"),
        ("0000:00:02.0/bochs-display-vram", "video"), ("tpm-ppi", "other"), ("synic-0-msg-page", "other"),
        ("0000:00:04.0/nvme.pmr", "other"), ("(unnamed)", "other"), ("my.rom.ram", "other"),
    ],
)  # fmt: skip
def test_kinds_of_blocks(name: str, kind: str) -> None:
    assert classify(name, {"system.flash0"}) == kind


@pytest.mark.parametrize(
    "change",
    [
        {"cpus": "2"}, {"argv": [1]}, {"ram": [{"id": "a"}]}, {"ram": ["a"]}, {"more": 1}, {"status": None},
        {"disks": 4},
    ],
)  # fmt: skip
def test_what_is_no_survey(change: dict[str, object]) -> None:
    values: dict[str, object] = {}
    for field in dataclasses.fields(Survey):
        values[field.name] = [] if str(field.type).startswith("tuple") else 0 if field.type == "int" else ""
    assert Survey.from_dict(values).argv == ()
    with pytest.raises(GuestError, match="not a survey"):
        Survey.from_dict(values | change)
