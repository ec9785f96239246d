"""The programs are assembled from their sources, and errors name the cure."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.errors import GuestError
from ckptd.guests.kvm import programs
from ckptd.guests.kvm.programs import assemble, image_of
from ckptd.guests.kvm.spec import BOOT_BLOCK, CODE, CODE_BYTES, PROGRAMS, KvmSpec
from ckptd.memory.regions import Geometry

needs_binutils = pytest.mark.skipif(
    not (shutil.which("as") and shutil.which("ld")), reason="GNU as and ld are not here (apt-get install binutils)"
)


@pytest.fixture(autouse=True)
def nothing_assembled() -> Iterator[None]:
    assemble.cache_clear()
    yield
    assemble.cache_clear()


@needs_binutils
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_small_and_flat(name: str) -> None:
    code = assemble(name)
    # The table of digits is the last thing in each source: nothing that the linker added follows it.
    assert code.endswith(b"0123456789abcdef")
    assert 256 < len(code) < 2048 <= CODE_BYTES
    assert assemble(name) is code, "assembled once"


@needs_binutils
def test_the_image_is_boot_block_and_code() -> None:
    spec = KvmSpec(Geometry.of(ram=32), "counter", vcpus=3)
    assert image_of(spec) == [(BOOT_BLOCK, spec.boot_block()), (CODE, assemble("counter"))]


def test_an_unknown_program() -> None:
    with pytest.raises(GuestError, match="no program 'chess'"):
        assemble("chess")


def test_without_an_assembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestError, match="no 'as' here") as caught:
        assemble("random")
    assert caught.value.hint == "apt-get install binutils"


@needs_binutils
def test_without_a_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "as").symlink_to(shutil.which("as") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestError, match="no 'ld' here") as caught:
        assemble("random")
    assert caught.value.hint == "apt-get install binutils"


@needs_binutils
def test_code_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "CODE_BYTES", 300)
    with pytest.raises(GuestError, match=r"program kv has \d+ bytes of code; there is room for 300"):
        assemble("kv")


@needs_binutils
def test_a_source_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kv.S").write_text("_start: no_such_instruction\n")
    monkeypatch.setattr(programs, "_SOURCES", tmp_path)
    with pytest.raises(GuestError, match=r"as failed: (?s:.*)no_such_instruction"):
        assemble("kv")
