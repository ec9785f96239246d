"""A QEMU command line: taken apart, and turned from the primary's into the warm standby's.

The standby has the same devices in the same order, all RAM in the replica's files, a monitor of its own, no screen, and
waits for the device state (`-S -incoming defer`). What cannot be taken along is an error that names the option. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptd.errors import ConfigError, GuestError

if TYPE_CHECKING:
    from ckptd.guests.qemu.survey import Backend, Survey

__all__ = ["FLAGS", "Option", "Overrides", "join", "parse", "split", "standby_command"]

FLAGS = frozenset({
    "S", "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "curses", "daemonize", "enable-fips", "enable-kvm",
    "enable-sync-profile", "full-screen", "h", "help", "jitdump", "mem-prealloc", "no-acpi", "no-fd-bootchk",
    "no-frame", "no-hpet", "no-kvm", "no-quit", "no-reboot", "no-shutdown", "no-user-config", "nodefaults",
    "nodefconfig", "nographic", "old-param", "one-insn-per-tb", "only-migratable", "perfmap", "portrait", "preconfig",
    "s", "sdl", "semihosting", "singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach",
    "xen-domid-restrict",
})  # fmt: skip
"""The options that take no argument; every other one takes exactly one."""

_ALIASES = {"M": "machine", "qmp-pretty": "qmp"}
_IMPLIED = {
    "accel": "accel", "audio": "driver", "audiodev": "driver", "blockdev": "driver", "chardev": "backend",
    "device": "driver", "display": "type", "fsdev": "fsdriver", "m": "size", "machine": "type", "mon": "chardev",
    "name": "guest", "net": "type", "netdev": "type", "nic": "type", "numa": "type", "object": "qom-type",
    "readconfig": "file", "smp": "cpus", "tpmdev": "type", "virtfs": "fsdriver",
}  # fmt: skip
_GROUPS = {"memory": "m", "smp-opts": "smp", "boot-opts": "boot"}  # sections of config files that no option is named by

_OWN = frozenset({
    "D", "S", "d", "daemonize", "dfilter", "dump-vmstate", "gdb", "incoming", "loadvm", "mem-path", "mem-prealloc",
    "mon", "monitor", "pidfile", "preconfig", "qmp", "s", "trace", "writeconfig",
})  # fmt: skip
"""The primary's own: monitors, logs, debuggers, how it was started, and where its RAM is."""
_SCREEN = frozenset({
    "alt-grab", "ctrl-grab", "curses", "display", "full-screen", "no-frame", "no-quit", "nographic", "sdl", "spice",
    "vnc",
})  # fmt: skip
_MONITORS = frozenset({"mon", "monitor", "qmp"})
_DESCRIPTORS = frozenset({"fd", "fds", "vhostfd", "vhostfds", "sock_fd"})
_WITH_DESCRIPTORS = frozenset({
    "blockdev", "chardev", "device", "drive", "fsdev", "net", "netdev", "nic", "object", "tpmdev", "virtfs",
})  # fmt: skip
_TERMINAL = frozenset({"braille", "dbus", "qemu-vdagent", "spiceport", "spicevmc", "stdio", "vc"})
"""Chardevs that need a terminal or a screen."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its name without dashes (`M` is machine), "" for a bare disk image; `value` None for a flag."""

    name: str
    value: str | None = None

    @property
    def words(self) -> list[str]:
        if not self.name:
            return [self.value or ""]
        return [f"-{self.name}"] if self.value is None else [f"-{self.name}", self.value]

    @property
    def json(self) -> bool:
        return self.value is not None and self.value.startswith("{")

    @property
    def pairs(self) -> dict[str, Any]:
        """The value as keys and values, whichever form it has; a key that stands alone is "on"."""
        if self.value is None:
            return {}
        if not self.json:
            return {key: "on" if value is None else value for key, value in split(self.value, _IMPLIED.get(self.name))}
        try:
            loaded = json.loads(self.value)
        except ValueError as error:
            raise GuestError(f"-{self.name} {self.value}: {error}") from error
        return dict(loaded)


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the operator wants otherwise.

    `command`: the whole command line instead; `{monitor}` and `{ram:ID}` in it become the standby's socket and files.
    `binary`: the program. `replace`: text for text in each argument of the primary's. `drop`: options by name, or by
    "name=beginning of the value". `append`: arguments at the end.
    """

    command: tuple[str, ...] = ()
    binary: str | None = None
    replace: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    append: tuple[str, ...] = ()


def split(value: str, implied: str | None = None) -> list[tuple[str, str | None]]:
    """The pairs of "key=value,...", where `,,` is a comma; a first word without `=` is the value of `implied`."""
    parts = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")] if value else []
    pairs: list[tuple[str, str | None]] = []
    for part in parts:
        key, equals, rest = part.partition("=")
        if not equals and not pairs and implied:
            pairs.append((implied, part))
        elif part:
            pairs.append((key, rest if equals else None))
    return pairs


def join(pairs: Iterable[tuple[str, str | None] | tuple[str, str]], implied: str | None = None) -> str:
    """The inverse of `split`."""
    words: list[str] = []
    for key, value in pairs:
        text = "" if value is None else value.replace(",", ",,")
        words.append(key if value is None else text if key == implied and not words else f"{key}={text}")
    return ",".join(words)


def parse(argv: Sequence[str]) -> list[Option]:
    """The options of a command line (without the program's name). Raises GuestError where an argument is missing."""
    options: list[Option] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("-") or word == "-":
            options.append(Option("", word))
            continue
        name = word.removeprefix("-").removeprefix("-")
        name = _ALIASES.get(name, name)
        if name in FLAGS:
            options.append(Option(name))
            continue
        value = next(words, None)
        if value is None:
            raise GuestError(f"the command line ends after {word}, which takes an argument")
        options.append(Option(name, value))
    return options


def standby_command(
    survey: Survey, *, ram_files: Mapping[str, str], monitor: str, overrides: Overrides | None = None,
    configuration: bool = False,
) -> list[str]:  # fmt: skip
    """The standby's argv, to be run in the primary's working directory (relative paths).

    `ram_files` has the replica's file for each backend that the guest uses; `monitor` is the path of the QMP socket
    that the standby shall make; `configuration`: the device state comes with a configuration section, as a migration
    writes it. Raises ConfigError for overrides that do not fit, GuestError for what cannot be taken along.
    """
    overrides = overrides or Overrides()
    if overrides.command:
        return _whole(overrides.command, ram_files, monitor)
    backends = {backend.id: backend for backend in survey.ram if backend.used and not backend.firmware}
    for name in backends:
        if name not in ram_files:
            raise GuestError(f"there is no replica file for the memory backend {name}")
    primary = _replaced(_expanded(parse(survey.argv[1:]), survey), overrides.replace)
    primary = _dropped(primary, overrides.drop)
    appended = parse(overrides.append)
    kept = _without_monitors(option for option in primary if option.name not in _SCREEN)
    _refuse_descriptors(kept)
    _refuse_changes(survey, kept, appended)

    there: set[str] = set()
    rest: list[Option] = []
    for option in kept:
        if option.name == "object" and str(option.pairs.get("qom-type", "")).startswith("memory-backend-"):
            name = str(option.pairs.get("id", ""))
            if name in backends:
                there.add(name)
                rest.append(_file_backend(backends[name], ram_files[name]))
            continue  # a backend that nothing uses is left away
        if option.name not in ("machine", "accel", "enable-kvm", "name"):
            rest.append(_moved(option, rest))
            if _to_file(option):
                rest.insert(-1, _appending(option, rest[-1]))
    there |= {str(option.pairs.get("id", "")) for option in appended if option.name == "object"}
    front = [_name(kept), _machine(survey, kept, nographic=any(option.name == "nographic" for option in primary))]
    front += _accelerator(survey, kept)
    for backend in backends.values():
        if backend.id in there:
            continue
        if not backend.default:
            raise GuestError(
                f"the memory backend {backend.id} was added while QEMU ran, so its command line does not have it",
                hint=f"append `-object` with id={backend.id} and its device to the standby's command line",
            )
        front.append(_file_backend(backend, ram_files[backend.id]))
    ends = [
        *_default_ports(survey, kept), Option("display", "none"), Option("monitor", "none"),
        Option("qmp", f"unix:{monitor.replace(',', ',,')},server=on,wait=off"),
        Option("S"), Option("incoming", "defer"),
    ]  # fmt: skip
    if not configuration:
        ends.append(Option("global", "migration.send-configuration=off"))
    binary = overrides.binary or survey.executable
    return [binary, *(word for option in (*front, *rest, *ends) for word in option.words), *overrides.append]


def _whole(command: Sequence[str], ram_files: Mapping[str, str], monitor: str) -> list[str]:
    if not any("{monitor}" in word for word in command):
        raise ConfigError("the standby's command has no {monitor}", hint="add -qmp unix:{monitor},server=on,wait=off")
    known = {"{monitor}": monitor} | {f"{{ram:{name}}}": path for name, path in ram_files.items()}

    def value(match: re.Match[str]) -> str:
        if match[0] not in known:
            raise ConfigError(
                f"the standby's command names {match[0]}", hint=f"there are {', '.join(known)}", field="command"
            )
        return known[match[0]].replace(",", ",,")

    return [re.sub(r"\{monitor\}|\{ram:[^{}]+\}", value, word) for word in command]


def _replaced(options: Iterable[Option], texts: Mapping[str, str]) -> list[Option]:
    words = [word for option in options for word in option.words]
    for old, new in texts.items():
        if not old:
            raise ConfigError("an empty text cannot be replaced", field="replace")
        if not any(old in word for word in words):
            raise ConfigError(f"{old!r} is nowhere in the command line of the primary's QEMU", field="replace")
        words = [word.replace(old, new) for word in words]
    return parse(words)


def _dropped(options: Iterable[Option], drop: Iterable[str]) -> list[Option]:
    """Without the options that `drop` names; a name that fits nothing is an error, as it is a slip of the pen."""
    left = list(options)
    for text in drop:
        name, equals, start = text.lstrip("-").partition("=")
        name = _ALIASES.get(name, name)
        fits = [o for o in left if o.name == name and (not equals or (o.value or "").startswith(start))]
        if not fits:
            raise ConfigError(f"the command line has nothing to drop for {text!r}", field="drop")
        left = [option for option in left if option not in fits]
    return left


_SECTION = re.compile(r'\[\s*([\w-]+)(?:\s+"([^"]*)")?\s*\]')
_SETTING = re.compile(r'\s*([\w.-]+)\s*=\s*"([^"]*)"\s*')


def _expanded(options: Iterable[Option], survey: Survey) -> list[Option]:
    """With the options of its config files instead of -readconfig."""
    found: list[Option] = []
    for option in options:
        if option.name != "readconfig":
            found.append(option)
            continue
        text = next((file.text for file in survey.config_files if file.path == option.value), None)
        if text is None:
            raise GuestError(f"the config file {option.value} was not read")
        group, pairs = "", list[tuple[str, str | None]]()
        for line in [*text.splitlines(), "[end]"]:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if match := _SECTION.fullmatch(line.strip()):
                if group:
                    found.append(Option(_GROUPS.get(group, group), join(pairs)))
                group, pairs = match[1], [("id", match[2])] if match[2] else []
            elif group and (match := _SETTING.fullmatch(line)):
                pairs.append((match[1], match[2]))
            else:
                raise GuestError(f"the config file {option.value} has a line that is not understood: {line!r}")
    return found


def _names_chardev(option: Option, name: str) -> bool:
    pattern = rf'chardev(?:=|:|"\s*:\s*"){re.escape(name)}(?:[,"\s}}]|$)'
    return option.value is not None and re.search(pattern, option.value) is not None


def _without_monitors(options: Iterable[Option]) -> list[Option]:
    """Without what is the primary's own, and the chardevs that served its monitors only."""
    everything = list(options)
    monitors = [option for option in everything if option.name in _MONITORS]
    kept = [option for option in everything if option.name not in _OWN]
    mon_ids = {str(option.pairs.get("chardev", "")) for option in monitors if option.name == "mon"}
    mon_ids |= {(option.value or "").partition(":")[2] for option in monitors if option.name != "mon"}

    def serves_monitor(option: Option) -> bool:
        name = str(option.pairs.get("id", "")) if option.name == "chardev" else ""
        return bool(name) and name in mon_ids and not any(_names_chardev(other, name) for other in kept)

    return [option for option in kept if not serves_monitor(option)]


def _keys(value: Any) -> Iterable[tuple[str, Any]]:
    """All keys and plain values of a value, however deep; dotted keys count by their last part."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key).rpartition(".")[2], inner
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _refuse_descriptors(options: Iterable[Option]) -> None:
    for option in options:
        value = option.value or ""
        inherited = option.name == "add-fd" or (
            option.name != "append" and re.search(r"/dev/fdset/|/dev/fd/|/proc/self/fd/", value) is not None
        )
        if option.name in _WITH_DESCRIPTORS:
            inherited |= any(
                key in _DESCRIPTORS or (key == "type" and inner == "fd") for key, inner in _keys(option.pairs)
            )
        replaced = option.name == "object" and str(option.pairs.get("qom-type", "")).startswith("memory-backend-")
        if inherited and not replaced:
            raise GuestError(
                f"-{option.name} {value} uses a file descriptor that QEMU was given when it was started, "
                "and the standby is not given it",
                hint=f'replace that part (such as "fd=23" by "ifname=tap1,script=no,downscript=no"), or drop '
                f'"{option.name}={value[:40]}" and append another, in the overrides of the standby\'s command line',
            )


def _refuse_changes(survey: Survey, options: Iterable[Option], appended: Iterable[Option]) -> None:
    """Devices that came or went while QEMU ran: the standby would have others than the state tells of."""
    given = {str(option.pairs.get("id", "")) for option in options if option.name == "device"} - {""}
    extra = {str(option.pairs.get("id", "")) for option in appended if option.name == "device"}
    for device in survey.devices:
        if device.hotplugged and (not device.id or device.id not in given | extra):
            raise GuestError(
                f"the device {device.id or device.path} ({device.driver}) was added while QEMU ran, "
                "so its command line does not have it",
                hint="append a `-device` with the same id and address to the standby's command line",
            )
    for name in sorted(given - {device.id for device in survey.devices}):
        raise GuestError(
            f"the device {name} was removed while QEMU ran, but its command line has it",
            hint='drop it from the standby\'s command line: drop = ["device=<how its value begins>"]',
        )


def _file_backend(backend: Backend, path: str) -> Option:
    # the name of the RAM block depends on the machine's age and the backend's type; `migrate` wants the same one
    canonical = "on" if backend.block == f"/objects/{backend.id}" else "off"
    pairs = [
        ("qom-type", "memory-backend-file"), ("id", backend.id), ("size", str(backend.size)), ("mem-path", path),
        ("share", "on"), ("x-use-canonical-path-for-ramblock-id", canonical),
    ]  # fmt: skip
    return Option("object", join(pairs, "qom-type"))


def _name(options: Iterable[Option]) -> Option:
    """The primary's name, marked, so that `ps` tells which is which. Guests do not see it."""
    pairs: dict[str, str | None] = {}
    for option in options:
        if option.name == "name" and option.value is not None:
            pairs |= dict(split(option.value, "guest"))
    return Option("name", join([("guest", f"{pairs.pop('guest', None) or 'ckptd'}-standby"), *pairs.items()], "guest"))


def _machine(survey: Survey, options: Iterable[Option], *, nographic: bool) -> Option:
    """All -machine as one, its type resolved and the default RAM named."""
    pairs: dict[str, str | None] = {}
    for option in options:
        if option.name == "machine" and option.value is not None:
            for key, value in split(option.value, "type"):
                pairs.pop(key, None)
                pairs[key] = value
    pairs.pop("type", None)
    if nographic:
        pairs["graphics"] = "off"  # -nographic tells the firmware as well
    if "accel" in pairs and survey.accelerator != "unknown":
        pairs["accel"] = survey.accelerator
    default = next((backend.id for backend in survey.ram if backend.default), None)
    if default is not None:
        pairs["memory-backend"] = default
    return Option("machine", join([("type", survey.machine), *pairs.items()], "type"))


def _accelerator(survey: Survey, options: Iterable[Option]) -> list[Option]:
    """The one that runs: several -accel are tried in turn, and the standby must end with the primary's."""
    options = list(options)
    accels = [option for option in options if option.name == "accel"]
    in_machine = any("accel" in option.pairs for option in options if option.name == "machine")
    enable = [option for option in options if option.name == "enable-kvm"]
    if survey.accelerator == "unknown":
        return [*accels, *enable]
    fits = [option for option in accels if option.pairs.get("accel") == survey.accelerator]
    if fits:
        return fits[:1]
    return [] if in_machine and not accels and not enable else [Option("accel", survey.accelerator)]


def _moved(option: Option, before: Sequence[Option]) -> Option:
    """The option for a standby: nothing that waits for a peer, truncates a file or needs a terminal."""
    if option.name in ("serial", "parallel", "debugcon") and option.value is not None:
        text = option.value.removeprefix("mon:")  # a monitor on the same line
        kind = re.split("[:,]", text, maxsplit=1)[0]
        if kind in _TERMINAL:
            return Option(option.name, "null")
        if kind == "file":
            # -debugcon takes no chardev but the one of its own name, which it would make itself
            name = f"ckptd-{option.name}{sum(other.name == option.name for other in before)}"
            return Option(option.name, f"chardev:{'debugcon' if option.name == 'debugcon' else name}")
        if kind in ("tcp", "telnet", "tn3270", "unix", "websocket"):
            return Option(option.name, _not_waiting(text))
        return Option(option.name, text)
    if option.name == "chardev" and option.value is not None:
        return Option("chardev", _chardev(option.value))
    if option.name == "audiodev" and not option.json and option.pairs.get("driver") in ("dbus", "sdl", "spice"):
        return Option("audiodev", f"none,id={option.pairs.get('id', '')}")
    return option


def _to_file(option: Option) -> bool:
    return option.name in ("serial", "parallel", "debugcon") and bool(re.match("(mon:)?file:", option.value or ""))


def _appending(old: Option, new: Option) -> Option:
    """The chardev for a `-serial file:PATH`, which has no way to say that the file is to be kept."""
    path = (old.value or "").removeprefix("mon:").removeprefix("file:")
    name = (new.value or "").removeprefix("chardev:")
    return Option("chardev", join([("backend", "file"), ("id", name), ("path", path), ("append", "on")], "backend"))


def _not_waiting(text: str) -> str:
    words = text.split(",")
    if not any(word in ("server", "server=on") for word in words):
        return text
    return ",".join([*(word for word in words if not re.fullmatch(r"(no)?wait(=\w+)?", word)), "wait=off"])


def _chardev(value: str) -> str:
    pairs = split(value, "backend")
    kind = next((inner for key, inner in pairs if key == "backend"), "")
    if kind in _TERMINAL:
        pairs = [("backend", "null"), *((key, inner) for key, inner in pairs if key in ("id", "mux", "logfile"))]
    elif kind == "socket" and any(key == "server" and inner in (None, "on") for key, inner in pairs):
        pairs = [(key, inner) for key, inner in pairs if key not in ("wait", "nowait")] + [("wait", "off")]
    elif kind == "file":
        pairs = [(key, inner) for key, inner in pairs if key != "append"] + [("append", "on")]
    if any(key == "logfile" for key, _ in pairs):
        pairs = [(key, inner) for key, inner in pairs if key != "logappend"] + [("logappend", "on")]
    return join(pairs, "backend")


def _default_ports(survey: Survey, options: Iterable[Option]) -> list[Option]:
    """Serial and parallel ports that QEMU gave the primary unasked: theirs is the terminal, but the device must be."""
    options = list(options)
    names = {str(option.pairs.get("id", "")) for option in options if option.name == "chardev"}
    labels = {chardev.label for chardev in survey.chardevs} - names
    return [
        Option(kind, "null")
        for kind in ("serial", "parallel")
        if f"{kind}0" in labels and not any(option.name == kind for option in options)
    ]
