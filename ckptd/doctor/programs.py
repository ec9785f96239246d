"""Programs on PATH: QEMU, etcd and binutils. Each is run, never longer than a few seconds."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from ckptd.doctor.findings import Check, Finding, no, unknown, yes
from ckptd.doctor.kvm import kvm_device

__all__ = ["CHECKS", "binutils", "etcd", "programs_on", "qemu", "qemu_accel_kvm"]

_SECONDS = 4.0  # for one program; the sum of a check's stays below the time that the check has
_QEMU_SECONDS = 10.0
# Older ones may revoke a lease that was renewed, when a leader that is stuck does not know that it was replaced.
_ETCD_SAFE = (3, 5, 13)
# mov $1, %eax; hlt
_SOURCE, _CODE = b".code32\nmov $1, %eax\nhlt\n", bytes.fromhex("b801000000f4")
_BINUTILS = "install binutils (Debian, Fedora: package binutils)"


def programs_on(path: str | None, pattern: str) -> list[Path]:
    """Executables of that name, one for each name, in the order of the directories."""
    found: dict[str, Path] = {}
    for directory in (os.environ.get("PATH", "") if path is None else path).split(os.pathsep):
        with suppress(OSError):  # PATH may name what is not there, or another user's
            for name in sorted(os.listdir(directory) if directory else ()):
                file = Path(directory, name)
                if fnmatch(name, pattern) and os.path.isfile(file) and os.access(file, os.X_OK):
                    found.setdefault(name, file)
    return list(found.values())


def qemu(path: str | None = None) -> Finding:
    """Which machines can QEMU be here, and which QEMU is it?"""
    found = programs_on(path, "qemu-system-*")
    if not found:
        return no("qemu", "no qemu-system-* on PATH", f"install QEMU (Debian: {_package()}; Fedora: qemu-kvm)")
    versions: dict[str, str] = {}
    failed = ""
    until = time.monotonic() + _QEMU_SECONDS
    for one in found:
        if time.monotonic() > until:
            break  # all of QEMU's targets are thirty and more
        try:
            versions[one.name] = _first(r"version (\d[\w.]*)", _output(one, "--version"))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            failed = failed or str(error)
    if not versions:
        return unknown("qemu", failed)
    detail = ", ".join(f"{name} {version}" for name, version in versions.items())
    return yes(
        "qemu", detail + (f" ({failed})" if failed else ""), programs=list(versions), versions=list(versions.values())
    )


def qemu_accel_kvm(path: str | None = None, kvm: Callable[[], Finding] = kvm_device) -> Finding:
    """Does `-accel kvm` start, and is it worth it?"""
    name = "qemu_accel_kvm"
    found = programs_on(path, f"qemu-system-{platform.machine()}")
    if not found:
        return no(name, f"no qemu-system-{platform.machine()} on PATH: see qemu")
    device = kvm()
    if device.state != "yes":
        return no(name, f"{device.detail}; guests run by TCG, many times slower", device.cure)
    # As libvirt asks: no machine, but an accelerator, which opens /dev/kvm and makes a VM.
    trial = ("-no-user-config", "-nodefaults", "-display", "none", "-S", "-machine", "none", "-accel", "kvm",
             "-monitor", "stdio")  # fmt: skip
    try:
        _output(found[0], *trial, given=b"quit\n")
    except ChildProcessError as error:
        return no(name, str(error), "install the QEMU of this distribution, built with KVM")
    if device.data.get("emulates"):
        return no(
            name, "it starts, but this KVM emulates: small guests run, Linux does not boot in reasonable time",
            "use `-accel tcg` here, or a host with VT-x or AMD-V",
        )  # fmt: skip
    return yes(name, f"{found[0].name} -accel kvm starts")


def etcd(path: str | None = None) -> Finding:
    """Is there a server for leases?"""
    found = programs_on(path, "etcd")
    if not found:
        return no(
            "etcd", "no etcd on PATH", "where an etcd server is to run, install it (Debian: etcd-server; Fedora: etcd)"
        )
    version = _first(r"etcd Version: (\d+\.\d+\.\d+)", _output(found[0], "--version"))
    old = tuple(int(part) for part in version.split(".")) < _ETCD_SAFE
    safe = ".".join(map(str, _ETCD_SAFE))
    return yes(
        "etcd", f"{found[0]} {version}" + (" may revoke leases that were renewed" if old else ""),
        cure=f"for production, use etcd {safe} or newer" if old else None, version=version,
    )  # fmt: skip


def binutils(path: str | None = None) -> Finding:
    """Assemble, link and extract six bytes of code for a kvm guest."""
    tools = {tool: programs_on(path, tool) for tool in ("as", "ld", "objcopy")}
    missing = [tool for tool, found in tools.items() if not found]
    if missing:
        return no("binutils", f"not on PATH: {', '.join(missing)}; kvm guest programs cannot be built", _BINUTILS)
    assemble, link, extract = (str(found[0]) for found in tools.values())
    with tempfile.TemporaryDirectory(prefix="ckptd-doctor-") as name:
        directory = Path(name)
        try:
            _output(assemble, "--32", "-o", "a.o", "-", given=_SOURCE, cwd=directory)
            _output(link, "-m", "elf_i386", "-Ttext", "0x4000", "-e", "0x4000", "-o", "a", "a.o", cwd=directory)
            _output(extract, "-O", "binary", "-j", ".text", "a", "a.bin", cwd=directory)
        except ChildProcessError as error:
            return no("binutils", f"cannot build 32-bit x86 code: {error}", _BINUTILS)
        code = (directory / "a.bin").read_bytes()
    if not code.startswith(_CODE):
        return no("binutils", f"built {code[:16].hex()}, not {_CODE.hex()}", _BINUTILS)
    return yes("binutils", f"{assemble}, {link} and {extract} build 32-bit x86 code")


CHECKS: tuple[Check, ...] = (qemu, qemu_accel_kvm, etcd, binutils)


def _output(program: Path | str, *arguments: str, given: bytes = b"", cwd: Path | None = None) -> str:
    """What it prints. Raises ChildProcessError when it fails, TimeoutExpired when it does not end."""
    command = [str(program), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, check=False, timeout=_SECONDS, cwd=cwd)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ChildProcessError(f"{program}: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout.decode(errors="replace")


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no version in {text[:80]!r}")
    return match[1]


def _package() -> str:
    return "qemu-system-x86" if platform.machine() == "x86_64" else "qemu-system"
