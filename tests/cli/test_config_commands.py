"""The command line: its table, its errors and exit codes, `check-config` and `sample-config`; as real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import ckptd
from ckptd.cli.common import emit, run, run_async
from ckptd.cli.main import COMMANDS
from ckptd.errors import ConfigError, Fenced

CONFIG = Path(__file__).parents[2] / "config"
PRESENT = [name for name in COMMANDS if find_spec(f"ckptd.cli.{name.replace('-', '_')}")]


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from ckptd.cli.main import main; main()", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120", **environ},
    )  # fmt: skip


# The table.


@pytest.mark.parametrize("name", PRESENT)
def test_every_command_loads_and_explains_itself(name: str) -> None:
    done = command(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: ckptd {name}" in done.stdout


def test_help_and_version() -> None:
    assert command("--version").stdout == ckptd.__version__ + "\n"
    shown = command("--help").stdout
    assert all(name in shown for name in PRESENT)


@pytest.mark.parametrize("arguments", [["frobnicate"], ["check-config"], ["sample-config", "third"], ["--frob"]])
def test_wrong_usage_exits_2_and_says_why_on_stderr(arguments: list[str]) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_loads_no_other() -> None:
    code = "import sys; from ckptd.cli import main; print([m for m in sys.modules if m.startswith('ckptd.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded == "['ckptd.cli', 'ckptd.errors', 'ckptd.cli.common', 'ckptd.cli.main']\n"


# Errors and output.


def test_an_error_goes_to_stderr_with_its_place_hint_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise Fenced("a higher term exists", hint="look at the peer", term=3)

    assert run(fails, as_json=False) == 6
    assert capsys.readouterr() == ("", "ckptd: a higher term exists (term 3)\n  hint: look at the peer\n")


def test_an_error_is_json_on_stdout_where_json_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("is wrong", file=Path("/x"))

    def fails() -> None:
        raise error

    assert run(fails, as_json=True) == 3
    shown = capsys.readouterr()
    assert (json.loads(shown.out), shown.err) == (error.as_dict(), "")


def test_a_number_that_a_command_returns_is_its_exit_code() -> None:
    assert run(lambda: 7, as_json=False) == 7
    assert run(lambda: None, as_json=False) == 0


def test_an_interrupted_command_exits_130() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run(interrupted, as_json=False) == 130


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0, as_json=False)


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = "from ckptd.cli.common import run; import sys; sys.exit(run(lambda: print('x' * 10**6), as_json=False))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    emit("[red]" + "x" * 300, False, lambda value: value)
    assert capsys.readouterr().out == "[red]" + "x" * 300 + "\n"


def test_coroutines_run_on_uvloop() -> None:
    async def loop() -> str:
        import asyncio

        return type(asyncio.get_running_loop()).__module__

    assert run_async(loop()) == "uvloop"


# check-config and sample-config.


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "ckptd.toml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_sample_is_the_file_of_config_and_passes_the_check(role: str, file: Callable[[str], Path]) -> None:
    sample = command("sample-config", role)
    assert sample.stdout == (CONFIG / f"{role}.toml").read_text()
    done = command("check-config", str(file(sample.stdout)))
    assert done.returncode == 0, done.stderr
    assert f"a {role}'s configuration" in done.stdout


def test_check_config_shows_every_value_with_its_origin() -> None:
    done = command("check-config", str(CONFIG / "primary.toml"), "--json", CKPTD_CHECKPOINT__INTERVAL="10ms")
    report = json.loads(done.stdout)
    assert report["role"] == "primary"
    assert report["keys"]["checkpoint.interval"] == {
        "value": "10 ms",
        "origin": "environment CKPTD_CHECKPOINT__INTERVAL",
    }
    assert report["keys"]["checkpoint.window"] == {"value": 4, "origin": "file"}
    assert report["keys"]["runtime.socket"] == {"value": "/run/ckptd/demo/primary.sock", "origin": "default"}


def test_the_table_keeps_the_brackets_of_an_address(file: Callable[[str], Path]) -> None:
    path = file('[guest]\nname = "a"\n[secondary]\naddress = "[b::1]:7070"')
    assert "[b::1]:7070" in command("check-config", str(path)).stdout


def test_a_mistake_exits_3_with_file_and_key(file: Callable[[str], Path]) -> None:
    path = file('[guest]\nname = "a"\n[secondary]\naddress = "b:1"\n[checkpoint]\nwindow = 99')
    done = command("check-config", str(path))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"ckptd: checkpoint.window must be 1 to 64, not 99 (file {path}, key checkpoint.window)\n"
    as_json = json.loads(command("check-config", str(path), "--json").stdout)
    assert as_json["where"] == {"file": str(path), "key": "checkpoint.window"}


def test_the_role_can_be_said(file: Callable[[str], Path]) -> None:
    path = str(file('[guest]\nname = "a"'))
    assert "say --role" in command("check-config", path).stderr
    assert "secondary is missing" in command("check-config", path, "--role", "primary").stderr
