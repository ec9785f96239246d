"""What is refused, on surveys made by hand and on real QEMUs."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import ConfigError, GuestError
from ckptd.guests.qemu.refusals import DISK_CHOICES, RUN_STATES, refusals, run_state
from ckptd.guests.qemu.survey import Backend, Block, Device, Disk, Netdev, Survey
from ckptd.guests.qemu.surveyor import survey
from tests.guests.qemu.machines import Machine, needs_qemu, started

RAM = Backend("pc.ram", "memory-backend-ram", 64 << 20, False, True, "pc.ram", 4096, 4096)
FINE = Survey(
    version="7.2.22", package="", architecture="x86_64", machine="pc-q35-7.2", accelerator="tcg", cpus=1, pid=1,
    argv=("qemu",), executable="/q", cwd="/", config_files=(), ram=(RAM,), blocks=(Block("pc.bios", 1 << 18, "rom"),),
    netdevs=(), nics=(), chardevs=(), disks=(), devices=(), descriptors=(), confidential="", status="running",
    migration="none", blocked=(), jobs=(), commands=("xen-save-devices-state",), capabilities=(),
)  # fmt: skip


def reasons(disks: str = "refuse", ignore: tuple[str, ...] = (), **values: Any) -> list[str]:
    return refusals(dataclasses.replace(FINE, **values), disks=disks, ignore_blocks=ignore)


def device(driver: str, reporting: bool = False) -> tuple[Device, ...]:
    return (Device("x0", driver, "/machine/peripheral/x0", False, reporting),)


def netdev(kind: str, vhost: bool = False) -> tuple[Netdev, ...]:
    return (Netdev("n0", kind, "net0", "", 1, vhost, ""),)


def disk(writable: bool = True, inserted: bool = True) -> tuple[Disk, ...]:
    return (Disk("vda", "/machine/x", "d0", "a.img", "qcow2", writable, False, inserted),)


def test_a_plain_guest_is_not_refused() -> None:
    assert reasons() == []
    assert reasons(devices=device("virtio-net-pci"), netdevs=netdev("tap"), disks="refuse") == []
    assert reasons(devices=device("virtio-balloon-pci")) == []
    assert reasons(commands=(), capabilities=("x-ignore-shared",)) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"devices": device("vfio-pci")}, "x0 (vfio-pci) is a device of the host's that writes"),
        ({"devices": device("vfio-pci-nohotplug")}, "vfio-pci-nohotplug"),
        ({"devices": device("vhost-user-fs-pci")}, "is virtiofs"),
        ({"devices": device("vhost-user-blk-pci")}, "served by another process"),
        ({"devices": device("vhost-vsock-pci")}, "or use a serial port"),
        ({"devices": device("vhost-scsi-pci")}, "use virtio-scsi-pci instead"),
        ({"devices": device("vhost-vdpa-device-pci")}, "served by hardware"),
        ({"devices": device("ivshmem-plain")}, "shares memory with other processes"),
        ({"devices": device("virtio-balloon-pci", True)}, "free-page-reporting=off"),
        ({"netdevs": netdev("vhost-user")}, "n0 (vhost-user) is served outside QEMU"),
        ({"netdevs": netdev("vhost-vdpa")}, "use tap with vhost=off"),
        ({"netdevs": netdev("tap", True), "descriptors": ("/dev/vhost-net",)}, "use it with vhost=off"),
        ({"netdevs": netdev("af-xdp")}, "has not been tried"),
        ({"descriptors": ("/dev/vhost-net",)}, "QEMU has /dev/vhost-net open"),
        ({"descriptors": ("/dev/vfio/7",)}, "QEMU has /dev/vfio/7 open"),
        ({"blocks": (Block("0000:00:02.0/vga.vram", 1 << 24, "video"),)}, "vga.vram (16 MiB) is video RAM"),
        ({"blocks": (Block("tpm-ppi", 4096, "other"),)}, "tpm-ppi (4 KiB) is writable RAM of a device"),
        ({"blocks": (Block("system.flash1", 4096, "flash"),)}, "is writable flash"),
        ({"ram": (dataclasses.replace(RAM, problem="it is odd"),)}, "pc.ram cannot be read: it is odd"),
        ({"ram": (dataclasses.replace(RAM, size=5000),)}, "not whole pages"),
        ({"ram": (dataclasses.replace(RAM, kind="memory-backend-epc"),)}, "memory-backend-epc"),
        ({"ram": ()}, "no memory backend"),
        ({"disks_": disk()}, "The disk vda (a.img) is writable"),
        ({"status": "inmigrate"}, "waits for an incoming migration"),
        ({"status": "guest-panicked"}, "has panicked"),
        ({"status": "shutdown"}, "has shut down"),
        ({"status": "internal-error"}, "internal error"),
        ({"status": "watchdog"}, "watchdog has stopped it"),
        ({"status": "postmigrate"}, "has been migrated away"),
        ({"migration": "active"}, "A migration is going on (active)"),
        ({"jobs": ("snapshot-save job0",)}, "A job is going on (snapshot-save job0)"),
        ({"blocked": ("VirtFS is mounted.",)}, "cannot save its device state: VirtFS is mounted; take"),
        ({"architecture": "aarch64"}, "ckptd protects x86_64"),
        ({"machine": "none", "ram": ()}, "nothing to protect"),
        ({"confidential": "/objects/sev0"}, "memory is encrypted (/objects/sev0)"),
        ({"commands": ()}, "neither xen-save-devices-state nor x-ignore-shared"),
    ],
)  # fmt: skip
def test_reasons(values: dict[str, Any], said: str) -> None:
    drives = values.pop("disks_", ())
    found = refusals(dataclasses.replace(FINE, disks=drives, **values), disks="refuse", ignore_blocks=())
    assert len(found) == 1 and said in found[0]
    assert found[0].endswith(".")


def test_disks() -> None:
    writable = dataclasses.replace(FINE, disks=disk())
    harmless = dataclasses.replace(FINE, disks=disk(writable=False) + disk(writable=False, inserted=False))
    for choice in DISK_CHOICES:
        assert refusals(harmless, disks=choice, ignore_blocks=()) == []
        assert bool(refusals(writable, disks=choice, ignore_blocks=())) == (choice == "refuse")
    own = dataclasses.replace(writable, argv=("qemu", "-snapshot"))
    assert "-snapshot" in refusals(own, disks="shared", ignore_blocks=())[0]
    assert refusals(own, disks="ignore", ignore_blocks=()) == []
    with pytest.raises(ConfigError, match="disks cannot be 'mirror'"):
        reasons(disks="mirror")


def test_ignored_blocks() -> None:
    blocks = (Block("0000:00:02.0/vga.vram", 1 << 24, "video"), Block("0000:00:03.0/vga.vram", 1 << 24, "video"))
    assert reasons(blocks=blocks, ignore=("vga.vram",)) == []
    assert len(reasons(blocks=blocks, ignore=("0000:00:02.0/vga.vram",))) == 1
    assert len(reasons(blocks=blocks, ignore=("vram", "2.0/vga.vram"))) == 2


def test_all_reasons_are_told_at_once() -> None:
    devices = device("vfio-pci") + device("vhost-vsock-pci")
    assert len(reasons(devices=devices, status="shutdown", netdevs=netdev("tap", True))) == 4
    assert reasons(devices=device("vfio-pci"), descriptors=("/dev/vfio/vfio", "/dev/vfio/2")) == reasons(
        devices=device("vfio-pci")
    )


def test_states_that_are_waited_for_are_no_reason() -> None:
    for name, state in RUN_STATES.items():
        assert bool(reasons(status=name)) == (state.verdict == "refuse"), name
        assert state.verdict == "protect" or str(state)
    assert [name for name, state in RUN_STATES.items() if state.verdict == "protect"] == ["running"]
    with pytest.raises(GuestError, match="'strange'"):
        run_state("strange")


def real(machine: Machine) -> list[str]:
    found: Survey = asyncio.run(survey(machine, machine.pid))
    return refusals(found, disks="refuse", ignore_blocks=())


@pytest.mark.qemu
@needs_qemu
def test_the_state_table_is_qemus() -> None:
    with started("-display", "none", "-nodefaults", "-m", "16", "-S") as qemu:
        schema = {entry["name"]: entry for entry in qemu.ask("query-qmp-schema")}
        status = schema[schema["query-status"]["ret-type"]]
        (kind,) = [member["type"] for member in status["members"] if member["name"] == "status"]
        assert set(schema[kind]["values"]) <= set(RUN_STATES)
        assert real(qemu) == []  # prelaunch is waited for
        assert run_state(qemu.ask("query-status")["status"]).verdict == "wait"
        qemu.ask("cont")
        qemu.ask("stop")
        assert run_state(qemu.ask("query-status")["status"]).verdict == "wait"


@pytest.mark.qemu
@needs_qemu
def test_a_standby_is_refused() -> None:
    with started("-display", "none", "-nodefaults", "-m", "16", "-S", "-incoming", "defer") as qemu:
        assert ["incoming migration" in reason for reason in real(qemu)] == [True]


@pytest.mark.qemu
@needs_qemu
def test_a_guest_that_was_migrated_away() -> None:
    with started("-display", "none", "-nodefaults", "-m", "16", "-S") as qemu:
        qemu.ask("cont")
        qemu.ask("migrate", {"uri": "exec:cat > /dev/null"})
        while (status := qemu.ask("query-status")["status"]) != "postmigrate":
            assert status in ("running", "finish-migrate")
        assert ["migrated away" in reason for reason in real(qemu)] == [True]


@pytest.mark.qemu
@needs_qemu
def test_a_real_guest_full_of_trouble(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    argv = [
        "-display", "none", "-nodefaults", "-m", "32", "-S", "-M", "q35", "-vga", "std",
        "-drive", "file=disk,format=raw,if=virtio", "-device", "virtio-balloon-pci,free-page-reporting=on",
        "-object", "memory-backend-memfd,id=iv,size=1M", "-device", "ivshmem-plain,memdev=iv",
    ]  # fmt: skip
    with started(*argv, cwd=tmp_path) as qemu:
        found = real(qemu)
    wanted = ("free-page-reporting", "ivshmem-plain", "The disk virtio0 (disk)", "backend iv", "vga.vram", "peer mode")
    assert len(found) == len(wanted)
    for text in wanted:
        assert any(text in reason for reason in found), text
