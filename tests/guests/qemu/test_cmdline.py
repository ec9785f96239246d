"""Command lines: taken apart, and for real QEMUs turned into standbys that take the primary's device state."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import CkptdError, ConfigError, GuestError
from ckptd.guests.qemu.cmdline import FLAGS, Option, Overrides, join, parse, split, standby_command
from ckptd.guests.qemu.survey import Backend, Chardev, ConfigFile, Device, Survey
from ckptd.guests.qemu.surveyor import survey
from tests.guests.qemu.machines import QEMU, Machine, copy_ram, needs_qemu, started

PLAIN = ["-display", "none", "-nodefaults"]

if os.access("/dev/kvm", os.R_OK | os.W_OK):
    KVM = {"kvm": [*PLAIN, "-m", "64", "-accel", "kvm", "-smp", "2"], "enable-kvm": [*PLAIN, "-m", "64", "-enable-kvm"]}
else:
    KVM = {}

PRIMARIES: dict[str, list[str]] = {
    "private RAM": [*PLAIN, "-m", "64"],
    "no -m at all": [*PLAIN],
    "all defaults": ["-display", "none"],
    "nographic": ["-nographic", "-m", "64", "-M", "q35"],
    "memfd": [*PLAIN, "-m", "64", "-object", "memory-backend-memfd,id=r,size=64M,share=on,prealloc=on",
              "-machine", "q35,memory-backend=r", "-machine", "suppress-vmdesc=on"],
    "file": [*PLAIN, "-m", "64", "-object", "memory-backend-file,id=r,size=64M,share=on,mem-path=ram,,file",
             "--machine", "pc,memory-backend=r"],
    "mem-path": [*PLAIN, "-m", "64", "-mem-path", ".", "-mem-prealloc"],
    "JSON object": [*PLAIN, "-m", "64", "-M", "memory-backend=r,type=pc", "-object",
                    '{"qom-type":"memory-backend-ram","id":"r","size":67108864,"share":true,"policy":"default"}'],
    "two numa nodes": [*PLAIN, "-M", "q35", "-m", "96", "-smp", "2", "-object", "memory-backend-ram,id=a,size=32M",
                       "-object", "memory-backend-memfd,id=b,size=64M", "-numa", "node,memdev=a,cpus=0",
                       "-numa", "node,memdev=b,cpus=1"],
    "5 GiB": [*PLAIN, "-M", "pc", "-m", "5G"],
    "dimms": [*PLAIN, "-M", "q35", "-m", "64,slots=4,maxmem=2G",
              "-object", "memory-backend-ram,id=d0,size=34M", "-device", "pc-dimm,memdev=d0",
              "-object", "memory-backend-memfd,id=d1,size=32M", "-device", "pc-dimm,memdev=d1,id=dimm1"],
    "old machine": [*PLAIN, "-M", "pc-q35-3.1", "-m", "64", "-object", "memory-backend-ram,id=r,size=64M",
                    "-numa", "node,memdev=r"],
    "JSON devices": [*PLAIN, "-M", "q35", "-m", "64", "-netdev", '{"type":"user","id":"n0"}', "-device",
                     '{"driver":"pcie-root-port","port":8,"chassis":1,"id":"p1","bus":"pcie.0","addr":"0x2"}',
                     "-device", '{"driver":"virtio-net-pci","netdev":"n0","id":"net0","bus":"p1","addr":"0x0"}',
                     "-blockdev", '{"driver":"null-co","size":1048576,"node-name":"d0","read-only":true}',
                     "-device", '{"driver":"virtio-blk-pci","drive":"d0"}'],
    "usb": [*PLAIN, "-m", "64", "-usb", "-device", "usb-tablet", "-device", "qemu-xhci,id=x", "-device",
            "usb-kbd,bus=x.0", "-vga", "std", "-vnc", "unix:vnc.sock"],
    "several NICs": [*PLAIN, "-m", "64", "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0",
                     "-netdev", "user,id=n1", "-device", "e1000,netdev=n1,mac=52:54:00:12:34:57",
                     "-nic", "user,model=rtl8139", "-netdev", "hubport,id=h,hubid=1", "-device", "e1000,netdev=h"],
    "serial to a file": [*PLAIN, "-m", "64", "-serial", "file:console.log", "-serial", "unix:sock,server=on,wait=off",
                         "-parallel", "null", "-chardev", "file,id=f,path=debug.log", "-device",
                         "isa-debugcon,chardev=f", "-debugcon", "file:second.log"],
    "monitors": [*PLAIN, "-m", "64", "-chardev", "stdio,id=both,mux=on", "-mon", "both", "-serial", "chardev:both",
                 "-chardev", "socket,id=libvirt,path=mon.sock,server=on,wait=off", "-mon",
                 "chardev=libvirt,mode=control", "-monitor", "unix:hmp.sock,server=on,wait=off", "-pidfile", "pid",
                 "-S", "-D", "log", "-name",
                 "guest=vm,,1,debug-threads=on", "-uuid", "5d7d2d63-2b2a-4d1c-bd5c-0dd2aca1b0f3", "-boot", "menu=on"],
    "config file": ["-display", "none", "-no-user-config", "-nodefaults", "-readconfig", "vm.cfg"],
    "sandbox": [*PLAIN, "-m", "64", "-sandbox",
                "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny", "-rtc", "base=localtime"],
    "numa by size": [*PLAIN, "-M", "pc-q35-3.1", "-m", "64", "-smp", "2", "-numa", "node,mem=24M", "-numa",
                     "node,mem=40M"],
    "disks": [*PLAIN, "-m", "64", "-hda", "disk", "-drive", "file=disk2,format=raw,if=virtio", "-cdrom", "cd",
              "-blockdev", "driver=file,node-name=f,filename=disk3", "-device", "virtio-scsi-pci,id=s", "-device",
              "scsi-hd,drive=f,bus=s.0"],
    "a bare disk": ["-m", "64", "-net", "nic", "-net", "user", "-usb", "-usbdevice", "tablet", "-vnc", "unix:v",
                    "disk"],
    "many devices": [*PLAIN, "-M", "q35,usb=off", "-m", "64", "-smp", "3,maxcpus=4", "-cpu", "max", "-accel",
                     "tcg,thread=multi", "-object", "rng-random,id=g,filename=/dev/urandom",
                     "-device", "virtio-rng-pci,rng=g", "-device", "virtio-balloon", "-device", "virtio-serial",
                     "-chardev", "null,id=c", "-device", "virtserialport,chardev=c", "-device", "i6300esb",
                     "-device", "intel-iommu", "-object", "iothread,id=io", "-global", "ICH9-LPC.disable_s3=1",
                     "-drive", "if=none,id=cd,media=cdrom", "-device", "ide-cd,drive=cd",
                     "-device", "vmgenid,guid=auto"],
    **KVM,
}  # fmt: skip

CONFIG = """
# as -writeconfig made them
[machine]
  type = "q35"
  memory-backend = "m0"
[memory]
  size = "64M"
[object "m0"]
  qom-type = "memory-backend-memfd"
  size = "64M"
[netdev "u0"]
  type = "user"
[device "nic0"]
  driver = "virtio-net-pci"
  netdev = "u0"
[chardev "c0"]
  backend = "null"
[mon "m"]
  chardev = "c0"
  mode = "readline"
"""


def surveyed(machine: Machine) -> Survey:
    return asyncio.run(survey(machine, machine.pid))


@pytest.mark.qemu
@needs_qemu
@pytest.mark.parametrize("name", PRIMARIES)
def test_the_standby_takes_the_state(name: str, tmp_path: Path) -> None:
    (tmp_path / "vm.cfg").write_text(CONFIG)
    for image in ("disk", "disk2", "disk3", "cd"):
        (tmp_path / image).write_bytes(bytes(1 << 20))
    logs = {log: f"kept: {log}" for log in ("console.log", "debug.log", "second.log")}
    with started(*PRIMARIES[name], cwd=tmp_path) as primary:
        before = surveyed(primary)
        assert [backend.problem for backend in before.ram] == [None] * len(before.ram)
        if before.status == "prelaunch":
            primary.ask("cont")
        primary.ask("stop")
        files = copy_ram(before, tmp_path)
        inodes = {name: os.stat(path).st_ino for name, path in files.items()}
        primary.save(tmp_path / "state")
        registers = primary.ask("human-monitor-command", {"command-line": "info registers -a"})
        dimms = primary.ask("query-memory-devices")
        monitor = tmp_path / "s,ock"
        for log, text in logs.items():
            (tmp_path / log).write_text(text)
        command = standby_command(before, ram_files=files, monitor=str(monitor))
        standby = Machine(command, monitor, tmp_path, tmp_path / "log")
        try:
            after = surveyed(standby)
            assert after.status == "inmigrate"
            standby.load(tmp_path / "state")
            assert standby.ask("human-monitor-command", {"command-line": "info registers -a"}) == registers
            assert [dimm["data"]["addr"] for dimm in standby.ask("query-memory-devices")] == [
                dimm["data"]["addr"] for dimm in dimms
            ]
            primary.kill()  # and lets go of its disks
            standby.ask("cont")
            assert standby.ask("query-status")["status"] == "running"
        finally:
            standby.kill()
    for log, text in logs.items():
        assert (tmp_path / log).read_text().startswith(text), "the standby has truncated the primary's file"
    for what in ("machine", "architecture", "accelerator", "cpus", "blocks", "netdevs", "nics", "disks", "devices"):
        # QEMU numbers by chance what has no id
        ours, theirs = (re.sub(r"#(net|block)\d+", "#", str(getattr(found, what))) for found in (after, before))
        assert ours == theirs
    used = [one for one in before.ram if one.used and not one.firmware]
    found = [one for one in after.ram if not one.firmware]
    assert [(b.id, b.size, b.block, b.default) for b in found] == [(b.id, b.size, b.block, b.default) for b in used]
    assert {backend.id: backend.file_inode for backend in found} == inodes
    assert all(backend.share and backend.file_offset == 0 for backend in found)


@pytest.mark.qemu
@needs_qemu
def test_devices_that_come_and_go(tmp_path: Path) -> None:
    with started(*PLAIN, "-M", "pc", "-m", "64", "-S", "-device", "virtio-rng-pci,id=old") as primary:
        primary.ask("device_add", {"driver": "virtio-balloon-pci", "id": "new", "addr": "0x9"})
        found = surveyed(primary)
        with pytest.raises(GuestError, match=r"device new .virtio-balloon-pci. was added while QEMU ran"):
            standby_command(found, ram_files={"pc.ram": "/r"}, monitor="/m")
        appended = Overrides(append=("-device", "virtio-balloon-pci,id=new,addr=0x9"))
        command = standby_command(found, ram_files={"pc.ram": "/r"}, monitor="/m", overrides=appended)
        assert command[-2:] == list(appended.append)
        primary.ask("object-add", {"qom-type": "memory-backend-ram", "id": "late", "size": 1 << 20})
        assert [backend.used for backend in surveyed(primary).ram if backend.id == "late"] == [False]


@pytest.mark.qemu
@needs_qemu
def test_all_options_of_this_qemu_are_known() -> None:
    text = subprocess.run([str(QEMU), "-help"], capture_output=True, text=True, check=True).stdout
    flags, valued = set(), set()
    for name, rest in re.findall(r"^--?([\w-]+)(.*)$", text, re.MULTILINE):
        if len(name) != 14:  # a name of that length fills its column, and what follows is the description
            (valued if re.match(r" \S|/", rest) else flags).add(name)
    assert len(flags) > 15 and len(valued) > 70
    assert valued & FLAGS == {"h"}  # "-h or -help"
    assert flags - FLAGS <= {"dtb"}  # whose argument the help sets in a column


def made(*argv: str, **values: object) -> Survey:
    """A survey of a plain 64 MiB machine with this command line."""
    base = Survey(
        version="7.2.22", package="", architecture="x86_64", machine="pc-q35-7.2", accelerator="tcg", cpus=1, pid=1,
        argv=("/usr/bin/kvm", *argv), executable="/usr/bin/qemu-system-x86_64", cwd="/", config_files=(),
        ram=(Backend("pc.ram", "memory-backend-ram", 64 << 20, False, True, "pc.ram", 4096, 4096),),
        blocks=(), netdevs=(), nics=(), chardevs=(), disks=(), devices=(), descriptors=(), confidential="",
        status="running", migration="none", blocked=(), jobs=(), commands=(), capabilities=(),
    )  # fmt: skip
    return dataclasses.replace(base, **values)  # type: ignore[arg-type]


def derived(*argv: str, overrides: Overrides | None = None, **values: object) -> list[str]:
    return standby_command(made(*argv, **values), ram_files={"pc.ram": "/r"}, monitor="/m", overrides=overrides)


FRONT = [
    "/usr/bin/qemu-system-x86_64", "-name", "ckptd-standby", "-machine", "pc-q35-7.2,memory-backend=pc.ram",
    "-accel", "tcg", "-object", "memory-backend-file,id=pc.ram,size=67108864,mem-path=/r,share=on,"
    "x-use-canonical-path-for-ramblock-id=off",
]  # fmt: skip
END = [
    "-display", "none", "-monitor", "none", "-qmp", "unix:/m,server=on,wait=off", "-S", "-incoming", "defer",
    "-global", "migration.send-configuration=off",
]  # fmt: skip


def middle(command: list[str]) -> list[str]:
    assert command[: len(FRONT)] == FRONT and command[-len(END) :] == END
    return command[len(FRONT) : -len(END)]


def test_what_is_left_away_and_what_is_kept() -> None:
    argv = [
        "-m", "64", "--nodefaults", "-daemonize", "-pidfile", "p", "-gdb", "tcp::1", "-s", "-S", "-D", "x", "-d", "int",
        "-trace", "a*", "-incoming", "defer", "-loadvm", "x", "-vnc", ":1", "-spice", "port=1", "-qmp", "stdio",
        "-full-screen", "-cpu", "max", "-snapshot", "-runas", "u", "-chroot", "/c", "-no-reboot", "disk.img",
    ]  # fmt: skip
    assert middle(derived(*argv)) == [
        "-m", "64", "-nodefaults", "-cpu", "max", "-snapshot", "-runas", "u", "-chroot", "/c", "-no-reboot", "disk.img",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        (["-serial", "mon:stdio"], ["-serial", "null"]),
        (["-serial", "tcp::4444,server,nowait"], ["-serial", "tcp::4444,server,wait=off"]),
        (["-serial", "unix:/s,server=on"], ["-serial", "unix:/s,server=on,wait=off"]),
        (["-serial", "tcp:host:1"], ["-serial", "tcp:host:1"]),
        (["-serial", "mon:pty"], ["-serial", "pty"]),
        (["-serial", "none"], ["-serial", "none"]),
        (["-serial", "null", "-serial", "file:/a,b"],
         ["-serial", "null", "-chardev", "file,id=ckptd-serial1,path=/a,,b,append=on", "-serial",
          "chardev:ckptd-serial1"]),
        (["-chardev", "socket,id=c,path=/s,server"], ["-chardev", "socket,id=c,path=/s,server,wait=off"]),
        (["-chardev", "file,id=c,path=/f,append=off,logfile=/l"],
         ["-chardev", "file,id=c,path=/f,logfile=/l,append=on,logappend=on"]),
        (["-chardev", "spicevmc,id=c,name=vdagent"], ["-chardev", "null,id=c"]),
        (["-audiodev", "spice,id=a"], ["-audiodev", "none,id=a"]),
        (["-object", "memory-backend-ram,id=idle,size=1M"], []),
        (["-chardev", "stdio,id=c,mux=on", "-mon", "chardev=c", "-device", '{"driver":"isa-serial","chardev": "c"}'],
         ["-chardev", "null,id=c,mux=on", "-device", '{"driver":"isa-serial","chardev": "c"}']),
        (["-chardev", "stdio,id=c", "-monitor", "chardev:c"], []),
    ],
)  # fmt: skip
def test_single_options(given_: list[str], wanted: list[str]) -> None:
    assert middle(derived(*given_)) == wanted


def test_machine_options_are_merged() -> None:
    argv = ["-M", "q35,smm=off", "-machine", "accel=kvm:tcg,smm=on", "-nographic", "-machine", "type=pc,vmport=off"]
    command = derived(*argv)
    assert "pc-q35-7.2,accel=tcg,smm=on,vmport=off,graphics=off,memory-backend=pc.ram" in command
    assert "-accel" not in command and "-nographic" not in command and command.count("-machine") == 1


def test_accelerators() -> None:
    argv = ["-accel", "kvm", "-accel", "tcg,thread=single"]
    assert "tcg,thread=single" in derived(*argv) and "kvm" not in derived(*argv)
    assert derived("-enable-kvm", accelerator="kvm").count("-accel") == 1
    assert "-enable-kvm" not in derived("-enable-kvm", accelerator="kvm")


def test_default_ports_become_null() -> None:
    ports = (Chardev("serial0", "stdio"), Chardev("parallel0", "vc"), Chardev("compat_monitor0", "vc"))
    assert derived("-nographic", chardevs=ports)[-15:-11] == ["-serial", "null", "-parallel", "null"]
    assert derived("-serial", "pty", chardevs=ports).count("-serial") == 1
    assert "-serial" not in derived("-chardev", "null,id=serial0", chardevs=ports)


def test_config_files() -> None:
    files = (ConfigFile("a.cfg", CONFIG),)
    backend = Backend("m0", "memory-backend-memfd", 64 << 20, True, True, "m0", 4096, 4096)
    found = made("-readconfig", "a.cfg", config_files=files, ram=(backend,), devices=(
        Device("nic0", "virtio-net-pci", "/machine/peripheral/nic0", False, False),))  # fmt: skip
    command = standby_command(found, ram_files={"m0": "/r"}, monitor="/m")
    assert command[1:-len(END)] == [
        "-name", "ckptd-standby", "-machine", "pc-q35-7.2,memory-backend=m0", "-accel", "tcg", "-m", "size=64M",
        "-object", "memory-backend-file,id=m0,size=67108864,mem-path=/r,share=on,"
        "x-use-canonical-path-for-ramblock-id=off", "-netdev", "id=u0,type=user",
        "-device", "id=nic0,driver=virtio-net-pci,netdev=u0",
    ]  # fmt: skip
    with pytest.raises(GuestError, match="line that is not understood: 'size 64M'"):
        derived("-readconfig", "a.cfg", config_files=(ConfigFile("a.cfg", "[memory]\nsize 64M"),))
    with pytest.raises(GuestError, match="was not read"):
        derived("-readconfig", "b.cfg", config_files=files)


@pytest.mark.parametrize(
    "argv",
    [
        ["-netdev", "tap,id=n0,fd=23,vhost=off"],
        ["-netdev", "tap,id=n0,fds=23:24"],
        ["-netdev", '{"type":"tap","id":"n0","fd":"23"}'],
        ["-netdev", "stream,id=n0,addr.type=fd,addr.str=5"],
        ["-add-fd", "fd=3,set=1"],
        ["-blockdev", '{"driver":"file","filename":"/dev/fdset/2","node-name":"d"}'],
        ["-drive", "file=/dev/fd/9"],
        ["-device", "vhost-scsi-pci,vhostfd=8,wwpn=x"],
        ["-chardev", "socket,id=c,fd=4", "-serial", "chardev:c"],
        ["-fsdev", "proxy,id=f,sock_fd=5"],
    ],
)
def test_inherited_descriptors_are_refused(argv: list[str]) -> None:
    with pytest.raises(GuestError) as caught:
        derived(*argv)
    assert f"-{argv[0].lstrip('-')} {argv[1]}" in caught.value.message
    assert "overrides" in (caught.value.hint or "")


def test_descriptors_of_what_is_left_away_do_not_matter() -> None:
    argv = ["-chardev", "socket,id=m,fd=20,server=on", "-mon", "chardev=m,mode=control", "-append", "fd=1 /dev/fd/1"]
    assert middle(derived(*argv)) == ["-append", "fd=1 /dev/fd/1"]
    cured = Overrides(replace={"fd=23": "ifname=tap1"}, drop=("add-fd",))
    command = derived("-netdev", "tap,id=n,fd=23", "-add-fd", "fd=3,set=1", overrides=cured)
    assert middle(command) == ["-netdev", "tap,id=n,ifname=tap1"]


def test_overrides() -> None:
    argv = ["-m", "64", "-netdev", "user,id=a", "-netdev", "user,id=b", "-device", "x"]
    drop = ("--netdev=tap,id=b", "M=q35")
    wanted = Overrides(binary="/opt/q", replace={"user": "tap"}, drop=drop, append=("-a", "b"))
    command = derived("-M", "q35", *argv, overrides=wanted)
    assert command[0] == "/opt/q" and command[-2:] == ["-a", "b"]
    assert command[9:15] == ["-m", "64", "-netdev", "tap,id=a", "-device", "x"]
    with pytest.raises(ConfigError, match="nothing to drop for 'netdev=slirp'"):
        derived(*argv, overrides=Overrides(drop=("netdev=slirp",)))
    with pytest.raises(ConfigError, match="empty text"):
        derived(*argv, overrides=Overrides(replace={"": "x"}))
    with pytest.raises(ConfigError, match="'tap-x' is nowhere in the command line"):
        derived(*argv, overrides=Overrides(replace={"tap-x": "tap-b"}))


def test_a_whole_command_instead() -> None:
    whole = Overrides(command=("qemu", "-object", "id=a,mem-path={ram:pc.ram}", "-qmp", "unix:{monitor},server=on"))
    command = standby_command(made(), ram_files={"pc.ram": "/r,1"}, monitor="/m", overrides=whole)
    assert command == ["qemu", "-object", "id=a,mem-path=/r,,1", "-qmp", "unix:/m,server=on"]
    with pytest.raises(ConfigError, match=r"no \{monitor\}"):
        derived(overrides=Overrides(command=("qemu",)))
    with pytest.raises(ConfigError, match=r"names \{ram:x\}"):
        derived(overrides=Overrides(command=("{monitor}", "{ram:x}")))


def test_what_is_missing() -> None:
    with pytest.raises(GuestError, match=r"no replica file for the memory backend pc.ram"):
        standby_command(made(), ram_files={}, monitor="/m")
    with pytest.raises(GuestError, match="device gone was removed"):
        derived("-device", "virtio-rng-pci,id=gone")
    late = (Backend("late", "memory-backend-ram", 4096, False, False, "late", 4096, 4096),)
    with pytest.raises(GuestError, match="late was added while QEMU ran"):
        standby_command(made(ram=late), ram_files={"late": "/r"}, monitor="/m")
    with pytest.raises(GuestError, match=r"ends after -m, which takes"):
        parse(["-S", "-m"])
    with pytest.raises(CkptdError, match=r"-device \{nonsense"):
        derived("-device", "{nonsense")


def test_parse() -> None:
    argv = ["-S", "--m", "1G", "-M", "q35", "disk", "-device", '{"driver": "x"}', "-append", "-S"]
    assert parse(argv) == [
        Option("S"), Option("m", "1G"), Option("machine", "q35"), Option("", "disk"),
        Option("device", '{"driver": "x"}'), Option("append", "-S"),
    ]  # fmt: skip
    assert Option("device", '{"driver": "x"}').pairs == {"driver": "x"}
    assert Option("m", "1G,slots=2").pairs == {"size": "1G", "slots": "2"}
    assert Option("chardev", "socket,server,path=a,,b").pairs == {"backend": "socket", "server": "on", "path": "a,b"}


keys = st.text("abc.-0", min_size=1)
values = st.text("ab,=\\{ \"'", max_size=8)


@given(st.lists(st.tuples(keys, st.one_of(st.none(), values))), st.booleans())
def test_pairs_survive_both_ways(pairs: list[tuple[str, str | None]], implied: bool) -> None:
    if implied and pairs and (pairs[0][1] is None or "=" in (pairs[0][1] or "=") or not pairs[0][1]):
        return  # a first word without "=" is the implied key's
    key = pairs[0][0] if implied and pairs else None
    assert split(join(pairs, key), key) == pairs


names = st.sampled_from(["S", "usb", "m", "device", "append", "no-such", ""])


@given(st.lists(st.tuples(names, values)))
def test_parsing_loses_nothing(pairs: list[tuple[str, str]]) -> None:
    options = [Option(name, None if name in FLAGS else value or "x") for name, value in pairs]
    assert parse([word for option in options for word in option.words]) == options
