"""Programs on PATH: real ones where they are, scripts that play them everywhere."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptd.doctor import programs
from ckptd.doctor.findings import Finding, no, yes
from ckptd.doctor.system import in_child

Make = Callable[[str, str], str]
QEMU = f"qemu-system-{platform.machine()}"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """An executable script; returns the PATH that has it."""

    def script(name: str, body: str) -> str:
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
        return str(tmp_path)

    return script


def offered(emulates: bool) -> Callable[[], Finding]:
    return lambda: yes("kvm_device", "/dev/kvm", emulates=emulates)


@pytest.mark.parametrize("check", programs.CHECKS)
def test_each_check_answers_here_whatever_this_machine_is(check: Callable[[], Finding], settled: Any) -> None:
    settled(check)


@pytest.mark.parametrize("check", programs.CHECKS)
def test_a_program_that_is_not_on_path_wants_a_package(check: Callable[..., Finding], tmp_path: Path) -> None:
    (tmp_path / "qemu-system-none").write_text("not executable")
    found = check(path=f"{tmp_path}:{tmp_path}/nowhere")
    assert found.state == "no" and "on PATH" in found.detail
    assert "install" in (found.cure or "") or "see qemu" in found.detail


def test_the_first_on_path_counts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "etcd").touch(0o755)
    assert programs.programs_on(f"{tmp_path}/b::{tmp_path}/a", "etcd") == [tmp_path / "b" / "etcd"]


def test_a_directory_of_path_that_is_another_users_is_passed_over(open_dir: Path, as_nobody: Any) -> None:
    private = open_dir / "private"
    private.mkdir()
    private.chmod(0)
    (open_dir / "etcd").touch(0o755)
    found = as_nobody(lambda: programs.programs_on(f"{private}:{open_dir}", "etcd"))
    assert found == [open_dir / "etcd"]


# QEMU.


def test_every_qemu_has_its_version(make: Make) -> None:
    make("qemu-system-aarch64", "echo 'QEMU emulator version 10.0.2 (x)'")
    found = programs.qemu(make("qemu-system-x86_64", "echo 'QEMU emulator version 7.2.22 (Debian 1:7.2)'"))
    assert found.detail == "qemu-system-aarch64 10.0.2, qemu-system-x86_64 7.2.22"
    assert found.data["programs"] == ["qemu-system-aarch64", "qemu-system-x86_64"]
    assert found.data["versions"] == ["10.0.2", "7.2.22"]


def test_a_qemu_that_does_not_run_is_told_beside_one_that_does(make: Make) -> None:
    path = make("qemu-system-arm", "echo 'libx.so is missing' >&2; exit 127")
    assert (programs.qemu(path).state, programs.qemu(path).detail.endswith("libx.so is missing")) == ("unknown", True)
    make("qemu-system-x86_64", "echo version 7.2")
    found = programs.qemu(path)
    assert found.state == "yes" and "x86_64 7.2" in found.detail and "libx.so is missing" in found.detail


def test_a_qemu_that_hangs_holds_nobody_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_SECONDS", 0.2)
    found = in_child(lambda: programs.qemu(make(QEMU, "exec /bin/sleep 1000")))
    assert found.state == "unknown" and "timed out" in found.detail


def test_many_targets_are_not_all_asked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_QEMU_SECONDS", 0.2)
    for number in range(20):
        path = make(f"qemu-system-{number:02}", "sleep 0.1; echo version 1.0")
    assert 1 <= len(str(programs.qemu(path).data["programs"]).split(",")) < 20


def test_an_accelerator_is_started_and_told_to_quit(make: Make, tmp_path: Path) -> None:
    path = make(QEMU, f'echo "$@" > {tmp_path}/asked; cat >> {tmp_path}/asked')
    assert programs.qemu_accel_kvm(path, offered(emulates=False)).state == "yes"
    asked = (tmp_path / "asked").read_text()
    assert "-machine none -accel kvm" in asked and asked.endswith("quit\n")


def test_an_accelerator_that_emulates_makes_no_sense(make: Make) -> None:
    found = programs.qemu_accel_kvm(make(QEMU, "exit 0"), offered(emulates=True))
    assert found.state == "no" and found.cure and "-accel tcg" in found.cure


def test_an_accelerator_that_fails_says_why(make: Make) -> None:
    path = make(QEMU, "echo 'first line' >&2; echo 'failed to initialize kvm: No such file' >&2; exit 1")
    found = programs.qemu_accel_kvm(path, offered(emulates=False))
    assert found.state == "no" and found.detail.endswith("failed to initialize kvm: No such file")


def test_without_kvm_qemu_is_not_asked(make: Make) -> None:
    found = programs.qemu_accel_kvm(make(QEMU, "exit 9"), lambda: no("kvm_device", "there is none", "load the module"))
    assert (found.state, found.cure) == ("no", "load the module")
    assert "TCG" in found.detail


@pytest.mark.qemu
@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed here")
def test_a_real_qemu_has_a_version() -> None:
    found = in_child(programs.qemu)
    assert found.state == "yes" and QEMU in found.detail


# etcd.


@pytest.mark.parametrize(
    ("version", "safe"), [("3.4.23", False), ("3.5.12", False), ("3.5.13", True), ("3.6.0-rc.1", True)]
)
def test_an_old_etcd_is_told(make: Make, version: str, safe: bool) -> None:
    found = programs.etcd(make("etcd", f"echo 'etcd Version: {version}'; echo 'Git SHA: none'"))
    assert found.state == "yes" and version.startswith(str(found.data["version"]))
    assert (found.cure is None) == safe


def test_an_etcd_that_says_nothing_is_unknown(make: Make) -> None:
    with pytest.raises(ValueError, match="no version in"):
        programs.etcd(make("etcd", "echo hello"))


# binutils.

needs_binutils = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("as", "ld", "objcopy")), reason="binutils are not installed here"
)


@needs_binutils
@pytest.mark.skipif(platform.machine() != "x86_64", reason="an assembler for another processor")
def test_real_binutils_build_code_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert in_child(programs.binutils).state == "yes"
    assert os.listdir(tmp_path) == []


def test_a_tool_that_is_missing_is_named(make: Make) -> None:
    found = programs.binutils(make("as", "exit 0"))
    assert found.state == "no" and "ld, objcopy" in found.detail and "binutils" in (found.cure or "")


def test_an_assembler_that_cannot_is_told(make: Make) -> None:
    for tool in ("ld", "objcopy"):
        make(tool, "exit 0")
    found = programs.binutils(make("as", "echo \"as: unrecognized option '--32'\" >&2; exit 1"))
    assert found.state == "no" and "unrecognized option '--32'" in found.detail


def test_code_that_is_wrong_is_told(make: Make) -> None:
    for tool in ("as", "ld"):
        make(tool, "exit 0")
    found = programs.binutils(make("objcopy", "printf wrong > a.bin"))
    assert found.state == "no" and b"wrong".hex() in found.detail


def test_an_assembler_that_hangs_leaves_no_file(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(programs, "_SECONDS", 0.2)
    for tool in ("ld", "objcopy"):
        make(tool, "exit 0")
    path = make("as", "exec /bin/sleep 1000")
    with pytest.raises(subprocess.TimeoutExpired):
        programs.binutils(path)
    assert os.listdir(scratch) == []
