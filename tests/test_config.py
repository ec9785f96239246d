"""Configuration files and the environment: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from ckptd.config import (
    Adaptive,
    Loaded,
    PrimaryConfig,
    SecondaryConfig,
    changed_keys,
    detect_role,
    flatten,
    load_primary,
    load_secondary,
    parse_address,
)
from ckptd.config.values import write_duration, write_size
from ckptd.errors import ConfigError
from ckptd.units import parse_duration, parse_size

CONFIG = Path(__file__).parents[1] / "config"
PRIMARY = '[guest]\nname = "vm-1"\n[secondary]\naddress = "10.0.0.2:7070"\n'
SECONDARY = '[listen]\naddress = "[::1]:0"\n[[guest]]\nname = "vm-1"\n'

Primary = Callable[..., PrimaryConfig]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "ckptd.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def primary(file: Callable[[str], Path]) -> Primary:
    def load(more: str = "", **environ: str) -> PrimaryConfig:
        return load_primary(file(PRIMARY + more), environ).config

    return load


@pytest.fixture
def secondary(file: Callable[[str], Path]) -> Callable[..., SecondaryConfig]:
    def load(more: str = "", **environ: str) -> SecondaryConfig:
        return load_secondary(file(SECONDARY + more), environ).config

    return load


# What is read.


def test_defaults_follow_the_guests_name_and_the_directory(primary: Primary) -> None:
    config = primary()
    assert config.guest.pages == {"ram": 65536}
    assert config.guest.output == Path("/run/ckptd/vm-1/output")
    assert config.runtime.socket == Path("/run/ckptd/vm-1/primary.sock")
    elsewhere = primary('[runtime]\ndir = "/srv/x"')
    assert (elsewhere.runtime.socket, elsewhere.guest.output) == (Path("/srv/x/primary.sock"), Path("/srv/x/output"))
    assert primary('[runtime]\nsocket = "/srv/s"').runtime.socket == Path("/srv/s")


def test_the_secondarys_defaults(secondary: Callable[..., SecondaryConfig]) -> None:
    config = secondary()
    assert config.runtime.socket == Path("/run/ckptd/secondary/secondary.sock")
    assert config.guest[0].output == Path("/run/ckptd/secondary/vm-1.output")
    assert config.listen.host_port == ("::1", 0)
    assert secondary('output = "/srv/o"').guest[0].output == Path("/srv/o")


def test_sizes_are_bytes_and_durations_are_nanoseconds(primary: Primary) -> None:
    config = primary('[checkpoint]\ninterval = "10ms"\nbatch = "512KiB"')
    assert (config.checkpoint.interval, config.checkpoint.batch) == (10_000_000, 512 << 10)


def test_an_interval_may_be_adaptive(primary: Primary) -> None:
    interval = primary('[checkpoint]\ninterval = { max = "100ms" }').checkpoint.interval
    assert isinstance(interval, Adaptive)
    assert (interval.min, interval.max, interval.target_lag) == (5_000_000, 100_000_000, 50_000_000)


def test_regions_keep_their_order(file: Callable[[str], Path]) -> None:
    text = PRIMARY.replace("[secondary]", 'regions = { video = "16MiB", ram = "1GiB" }\n[secondary]')
    loaded = load_primary(file(text), {})
    assert list(loaded.config.guest.pages.items()) == [("video", 4096), ("ram", 262144)]
    assert loaded.config.guest.memory is None
    assert loaded.origins["guest.regions.ram"] == "file"


def test_a_configuration_cannot_be_changed(primary: Primary) -> None:
    with pytest.raises(ValueError, match="frozen"):
        primary().checkpoint.window = 9


# The environment and the origins.


def test_the_environment_wins_and_is_read_as_toml_or_text(primary: Primary) -> None:
    config = primary(
        '[checkpoint]\ninterval = "50ms"\nwindow = 2\n',
        CKPTD_CHECKPOINT__INTERVAL="10ms",
        CKPTD_CHECKPOINT__WINDOW="8",
        CKPTD_GUEST__REGIONS='{ low = "1MiB", high = "2MiB" }',
        CKPTD_GUEST__NAME='"7"',
        CKPTD_SECONDARY__ADDRESS="[::1]:9",
    )
    assert (config.checkpoint.interval, config.checkpoint.window) == (10_000_000, 8)
    assert config.guest.pages == {"low": 256, "high": 512}
    assert (config.guest.name, config.secondary.host_port) == ("7", ("::1", 9))


def test_a_variable_can_turn_a_fixed_interval_into_an_adaptive_one(primary: Primary) -> None:
    interval = primary('[checkpoint]\ninterval = "50ms"', CKPTD_CHECKPOINT__INTERVAL__MIN="7ms").checkpoint.interval
    assert isinstance(interval, Adaptive)
    assert interval.min == 7_000_000


def test_a_value_cannot_smuggle_in_other_keys(primary: Primary) -> None:
    with pytest.raises(ConfigError, match=r"guest.name must be"):
        primary(CKPTD_GUEST__NAME='"a"\nother = 1')


def test_the_origin_of_every_value(file: Callable[[str], Path]) -> None:
    loaded = load_primary(file(PRIMARY + '[link]\nheartbeat = "100ms"'), {"CKPTD_LINK__TIMEOUT": "1s", "HOME": "/"})
    assert loaded.origins.keys() == flatten(loaded.config).keys()
    assert loaded.origins["link.heartbeat"] == "file"
    assert loaded.origins["link.timeout"] == "environment CKPTD_LINK__TIMEOUT"
    assert loaded.origins["link.buffer"] == "default"
    assert loaded.origins["runtime.dir"] == "default"


def test_variables_of_the_other_daemon_and_of_no_section_are_let_be(primary: Primary) -> None:
    assert primary(CKPTD_REPLICA__HISTORY="5", CKPTD_SOCKET="/x") == primary()


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("CKPTD_CHEKPOINT__INTERVAL", "no section chekpoint .*did you mean checkpoint"),
        ("CKPTD_CHECKPOINT__INTERVALL", "checkpoint.intervall is not a known key .*CKPTD_.*did you mean interval"),
        ("CKPTD_CHECKPOINT_INTERVAL", "would be ignored .*write CKPTD_CHECKPOINT__INTERVAL"),
    ],
)
def test_a_misspelt_variable_is_never_ignored(primary: Primary, variable: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        primary(**{variable: "10ms"})


def test_guest_entries_cannot_come_from_the_environment(secondary: Callable[..., SecondaryConfig]) -> None:
    with pytest.raises(ConfigError, match="guest is a list"):
        secondary(CKPTD_GUEST__NAME="x")


# What is refused.


@pytest.mark.parametrize(
    ("section", "line", "says"),
    [
        ("checkpoint", "window = 0", r"checkpoint\.window must be 1 to 64, not 0"),
        ("checkpoint", "window = 65", r"must be 1 to 64"),
        ("checkpoint", "window = true", r"must be a whole number, not True"),
        ("checkpoint", 'window = "4"', r"must be a whole number, not '4'"),
        ("checkpoint", 'batch = "255KiB"', r"must be 256 KiB to 4 MiB, not 255 KiB"),
        ("checkpoint", 'batch = "4194305B"', r"not 4194305 B"),
        ("checkpoint", 'interval = "25"', r"'25' is not a duration.*ms"),
        ("checkpoint", "interval = 25", r"25 is not a duration"),
        ("checkpoint", 'interval = "1us"', r"must be 1 ms to 10 min"),
        ("checkpoint", 'interval = { min = "1s" }', r"min \(1 s\) must not exceed max"),
        ("checkpoint", 'interval = { mni = "1s" }', r"did you mean min\? .*target_lag"),
        ("checkpoint", 'level = "disk"', r"must be 'memory' or 'durable', not 'disk'"),
        ("checkpoint", 'encoding = "zstd"', r"'xor-lz4'"),
        ("checkpoint", 'stages = "1MiB"', r"did you mean stage\?"),
        ("link", 'timeout = "500ms"', r"timeout \(500 ms\) must be longer than heartbeat"),
        ("link", 'backoff_min = "3s"', r"backoff_min must not exceed"),
        ("runtime", 'dir = "run"', r"'run' is not an absolute path"),
        ("runtime", f'socket = "/{"x" * 107}"', r"more than 107 bytes"),
        ("runtime", 'log_level = "trace"', r"'debug', 'info', 'warning' or 'error'"),
        ("checkpoints", "window = 1", r"checkpoints is not a known key .*did you mean checkpoint"),
    ],
)
def test_what_is_wrong_is_refused(primary: Primary, section: str, line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        primary(f"[{section}]\n{line}")
    assert caught.value.where["file"]
    assert section in str(caught.value.where["key"])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "vm-1"', "", r"guest\.name is missing"),
        ('name = "vm-1"', 'name = "VM 1"', r"a-z, 0-9 and -, not 'VM 1'"),
        ('name = "vm-1"', 'name = "vm\\n"', r"a-z, 0-9 and -"),
        ('name = "vm-1"', 'name = "a"\nmemory = "1MiB"\nregions = { a = "1MiB" }', r"both memory and regions"),
        ('name = "vm-1"', 'name = "a"\nmemory = "5000B"', r"whole pages of 4096 bytes, not 5000"),
        ('name = "vm-1"', 'name = "a"\nmemory = "0B"', r"whole pages"),
        ('name = "vm-1"', 'name = "a"\nregions = {}', r"regions must not be empty"),
        ('name = "vm-1"', 'name = "a"\nring_entries = 1000', r"power of two, not 1000"),
        ("10.0.0.2:7070", "10.0.0.2", r"is not an address.*host:port"),
        ("10.0.0.2:7070", "10.0.0.2:70700", r"is not an address"),
        ("10.0.0.2:7070", "::1:7070", r"is not an address.*\[::1\]:7070"),
        ("10.0.0.2:7070", "[::g]:7070", r"is not an address"),
        ("[secondary]", "[secondary]\n[secondary]", r"not valid TOML: .*line 4"),
        ('"vm-1"', "vm-1", r"not valid TOML: .*line 2"),
    ],
)
def test_what_is_wrong_in_the_required_part_is_refused(
    file: Callable[[str], Path], old: str, new: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_primary(file(PRIMARY.replace(old, new)), {})


def test_one_mistake_is_reported_once(primary: Primary) -> None:
    with pytest.raises(ConfigError) as caught:
        primary('[runtime]\ndir = "run"')
    assert caught.value.where["key"] == "runtime.dir"


def test_all_mistakes_are_reported_together(primary: Primary) -> None:
    with pytest.raises(ConfigError) as caught:
        primary('[checkpoint]\nwindow = 0\nlevle = "memory"\n[link]\nbuffer = "1"')
    assert caught.value.where["key"] == "checkpoint.window, checkpoint.levle, link.buffer"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SECONDARY.replace("[[guest]]", "[guest]"), "must be a list of tables"),
        (SECONDARY + '[[guest]]\nname = "vm-1"', "names must differ"),
        (SECONDARY.partition("[[")[0], "guest is missing"),
        (SECONDARY + "[replica]\nhistory = -1", "must be 0 to"),
        (SECONDARY + '[link]\nbackoff_min = "1s"', "backoff_min is not a known key"),
        (PRIMARY, "this is a primary's file, not a secondary's"),
    ],
)
def test_what_is_wrong_in_a_secondarys_file_is_refused(file: Callable[[str], Path], text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_secondary(file(text), {})


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file .*ckptd sample-config secondary"):
        load_secondary(tmp_path / "none.toml", {})


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_primary(tmp_path, {})
    (tmp_path / "x").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_primary(tmp_path / "x", {})


def test_the_sections_tell_whose_file_it_is(file: Callable[[str], Path]) -> None:
    assert detect_role(file(PRIMARY)) == "primary"
    assert detect_role(file(SECONDARY)) == "secondary"
    for neither in ("", PRIMARY + SECONDARY.partition("[[")[0]):
        with pytest.raises(ConfigError, match="say --role"):
            detect_role(file(neither))


# Reloading.


def test_a_reload_tells_what_it_takes_over_and_what_needs_a_restart(primary: Primary) -> None:
    old = primary()
    new = primary(
        '[checkpoint]\ninterval = { min = "5ms" }\nwindow = 8\nstage = "128MiB"\n'
        '[link]\ntimeout = "3s"\nbuffer = "1MiB"\n[runtime]\nlog_level = "debug"\nlog_format = "json"'
    )
    assert changed_keys(old, new) == (
        ["checkpoint.interval", "checkpoint.window", "link.timeout", "runtime.log_level"],
        ["checkpoint.stage", "link.buffer", "runtime.log_format"],
    )
    assert changed_keys(old, old) == ([], [])


def test_a_secondarys_reload(secondary: Callable[..., SecondaryConfig]) -> None:
    old = secondary()
    new = secondary('[[guest]]\nname = "b"\n[replica]\nhistory = 5\nreserve = "1MiB"\n[link]\nbuffer = "1MiB"')
    assert changed_keys(old, new) == (["replica.history", "link.buffer"], ["replica.reserve", "guest"])


# The files of config/.


def sample(role: str) -> tuple[Loaded[Any], dict[str, str]]:
    """The configuration, and the text of each section."""
    path = CONFIG / f"{role}.toml"
    parts = re.split(r"^\[+([a-z]+)\]+", path.read_text(), flags=re.M)[1:]
    loaded = (load_primary if role == "primary" else load_secondary)(path, {})
    return loaded, dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_the_sample_files_work_and_show_every_default(role: str) -> None:
    loaded, sections = sample(role)
    for key, value in flatten(loaded.config).items():
        section, *_, name = key.split(".")
        line = re.search(rf"^#?{name} += *(.*?) *(?:#|$)", sections[section], flags=re.M)
        assert line, f"{key} is not in the sample"
        if loaded.origins[key] == "default":
            assert line[1] == f'"{value}"', f"the sample shows another default of {key}"


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_what_the_sample_files_say_is_the_default(role: str) -> None:
    """Except for what has none: names and addresses."""
    loaded, _ = sample(role)
    bare = {"guest": {"name": "demo"}, "secondary": {"address": "127.0.0.1:7070"}}
    if role == "secondary":
        bare = {"guest": [{"name": "demo"}], "listen": {"address": "127.0.0.1:7070"}}  # type: ignore[dict-item]
    model: type[BaseModel] = type(loaded.config)
    assert model.model_validate(bare) == loaded.config


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_the_sample_files_mark_what_a_running_daemon_takes_over(role: str) -> None:
    loaded, sections = sample(role)
    marked = {
        f"{section}.{key}"
        for section, body in sections.items()
        for key in re.findall(r"^([a-z_]+) = .*\[SIGHUP\]", body, flags=re.M)
    }
    reloadable = set()
    for section, value in loaded.config:
        if isinstance(value, BaseModel):
            for key in type(value).model_fields:
                changed = loaded.config.model_copy(update={section: value.model_copy(update={key: object()})})
                reloadable |= set(changed_keys(loaded.config, changed)[0])
    assert marked == reloadable


# Values.


@given(st.integers(0, 1 << 53))
def test_sizes_and_durations_are_written_exactly(value: int) -> None:
    assert parse_size(write_size(value)) == value
    assert parse_duration(write_duration(value)) == value


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        host, port = parse_address(text)
    except ConfigError:
        return
    assert host
    assert 0 <= port <= 65535


# A qemu guest.


def qemu(**guest: object) -> dict[str, Any]:
    return {"guest": {"name": "vm", "kind": "qemu", **guest}, "secondary": {"address": "127.0.0.1:7070"}}


def test_serial_ports_have_their_files_on_both_sides(file: Callable[[str], Path]) -> None:
    primary = PRIMARY.replace("[secondary]", 'kind = "qemu"\nqmp = "/q"\nchardevs = { serial0 = "/c" }\n[secondary]')
    loaded = load_primary(file(primary), {})
    assert loaded.config.guest.chardevs == {"serial0": Path("/c")}
    assert loaded.origins["guest.chardevs.serial0"] == "file"
    secondary = load_secondary(file(SECONDARY + 'kind = "qemu"\nchardevs = { serial0 = "/d" }'), {}).config
    assert secondary.guest[0].chardevs == {"serial0": Path("/d")} and not secondary.guest[0].standby.command


def test_a_qemu_guest_has_its_own_keys_and_a_large_gate() -> None:
    guest = PrimaryConfig.model_validate(qemu(qmp="/run/q", disks="shared", ignore_ram=["vga.vram"])).guest
    assert (guest.qmp, guest.disks, guest.ignore_ram) == (Path("/run/q"), "shared", ("vga.vram",))
    assert guest.gate_capacity == 64 << 20 and guest.pages == {}


@pytest.mark.parametrize(
    ("guest", "said"),
    [
        ({}, "needs qmp"),
        ({"qmp": "/run/q", "memory": "1GiB"}, "memory is not a key of a qemu guest"),
        ({"qmp": "/run/q", "vcpus": 2}, "vcpus is not a key of a qemu guest"),
        ({"qmp": "/run/q", "tracker": "ring"}, "must be one of auto, pagemap, soft-dirty for a qemu guest"),
        ({"qmp": "/run/q", "disks": "mirror"}, "refuse"),
        ({"qmp": "/run/q", "chardevs": {"serial0": "console"}}, "'console' is not an absolute path"),
        ({"qmp": "/run/q", "chardevs": {"": "/c"}}, "has an empty label"),
        ({"qmp": "/run/q", "chardevs": {"a": "/c", "b": "/c"}}, "has the file /c for both a and b"),
    ],
)
def test_what_is_wrong_for_a_qemu_guest_is_said(guest: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PrimaryConfig.model_validate(qemu(**guest))


@pytest.mark.parametrize("kind", ["sim", "kvm"])
def test_keys_of_a_qemu_guest_are_refused_for_others(kind: str) -> None:
    raw = qemu(qmp="/run/q")
    raw["guest"]["kind"] = kind
    with pytest.raises(ValidationError, match=f"qmp is not a key of a {kind} guest"):
        PrimaryConfig.model_validate(raw)
    raw["guest"] = {"name": "vm", "kind": kind, "chardevs": {"serial0": "/c"}}
    with pytest.raises(ValidationError, match=f"chardevs is not a key of a {kind} guest"):
        PrimaryConfig.model_validate(raw)
    entry = {"name": "vm", "kind": kind, "chardevs": {"serial0": "/c"}}
    with pytest.raises(ValidationError, match=f"chardevs is not a key of a {kind} guest"):
        SecondaryConfig.model_validate({"listen": {"address": "127.0.0.1:7070"}, "guest": [entry]})
    entry = {"name": "vm", "kind": kind, "standby": {"drop": ["D"]}}
    with pytest.raises(ValidationError, match=f"standby is not a key of a {kind} guest"):
        SecondaryConfig.model_validate({"listen": {"address": "127.0.0.1:7070"}, "guest": [entry]})
