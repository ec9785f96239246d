"""From a file and the environment to a configuration, with the origin of every value and one error for all mistakes.

`CKPTD_SECTION__KEY` overrides a key; its value is read as TOML where it is valid TOML, as text otherwise. A variable
with a section or key that nobody knows is an error, as it is in the file.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ckptd.config.models import PrimaryConfig, SecondaryConfig
from ckptd.errors import ConfigError

__all__ = ["Loaded", "Role", "detect_role", "flatten", "load_primary", "load_secondary"]

Role = Literal["primary", "secondary"]
Config = TypeVar("Config", bound=BaseModel)

PREFIX = "CKPTD_"
_MODELS: dict[Role, type[BaseModel]] = {"primary": PrimaryConfig, "secondary": SecondaryConfig}
_OWN_SECTIONS: dict[Role, frozenset[str]] = {
    "primary": frozenset(PrimaryConfig.model_fields.keys() - SecondaryConfig.model_fields.keys()),
    "secondary": frozenset(SecondaryConfig.model_fields.keys() - PrimaryConfig.model_fields.keys()),
}


@dataclass(frozen=True)
class Loaded(Generic[Config]):
    """A configuration, its file, and for each key whether "file", "environment CKPTD_..." or "default" set it."""

    config: Config
    path: Path
    origins: Mapping[str, str]


def load_primary(path: Path, environ: Mapping[str, str]) -> Loaded[PrimaryConfig]:
    """The primary's configuration. Raises ConfigError naming file, key and what is allowed."""
    return _load("primary", PrimaryConfig, path, environ)


def load_secondary(path: Path, environ: Mapping[str, str]) -> Loaded[SecondaryConfig]:
    """The secondary's configuration. Raises ConfigError naming file, key and what is allowed."""
    return _load("secondary", SecondaryConfig, path, environ)


def detect_role(path: Path) -> Role:
    """Whose file it is, by its sections. Raises ConfigError when they do not tell."""
    role = _role_of(_read(path, None))
    if role is None:
        raise ConfigError("the sections do not tell whose file this is", hint="say --role", file=path)
    return role


def flatten(config: BaseModel) -> dict[str, object]:
    """Every dotted key and its value as the file would have it: {"checkpoint.interval": "25 ms"}."""
    return dict(_leaves(config.model_dump(mode="json", exclude_none=True), ""))


def _load(role: Role, model: type[Config], path: Path, environ: Mapping[str, str]) -> Loaded[Config]:
    raw = _read(path, role)
    found = _role_of(raw)
    if found not in (None, role):
        raise ConfigError(f"this is a {found}'s file, not a {role}'s", hint=_sample_hint(role), file=path)
    in_file = set(_paths(raw))
    variables = _override(raw, role, environ)
    try:
        config = model.model_validate(raw)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False), model, path, variables) from None
    origins = {}
    for key in flatten(config):
        setters = (name for name, parts in variables.items() if f"{key}.".startswith(".".join(parts) + "."))
        variable = next(setters, None)
        origins[key] = f"environment {variable}" if variable else "file" if key in in_file else "default"
    return Loaded(config, path, origins)


def _read(path: Path, role: Role | None) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError("there is no such file", hint=_sample_hint(role), file=path) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path) from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", file=path, byte=error.start) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not valid TOML: {error}", hint='text needs quotes: "25ms"', file=path) from None


def _sample_hint(role: Role | None) -> str:
    return f"`ckptd sample-config {role or 'primary'}` prints one that works"


def _role_of(raw: Mapping[str, Any]) -> Role | None:
    roles: list[Role] = [role for role, own in _OWN_SECTIONS.items() if own & raw.keys()]
    return roles[0] if len(roles) == 1 else None


# The environment.


def _override(raw: dict[str, Any], role: Role, environ: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Put the variables into `raw`; what each of them set."""
    own, other = _MODELS[role], _MODELS["secondary" if role == "primary" else "primary"]
    taken: dict[str, tuple[str, ...]] = {}
    for variable in sorted(name for name in environ if name.startswith(PREFIX)):
        parts = tuple(variable.removeprefix(PREFIX).lower().split("__"))
        section = parts[0]
        if len(parts) == 1:
            _refuse_single_underscore(variable, section, own)
        elif section in own.model_fields:
            if _section_at(own, parts[:1], through_lists=False) is None:
                raise ConfigError(f"{section} is a list, which only the file can change", environment=variable)
            table = raw
            for part in parts[:-1]:
                # A table that the file has as something else is replaced: an interval may be both.
                if not isinstance(table.get(part), dict):
                    table[part] = {}
                table = table[part]
            table[parts[-1]] = _environment_value(environ[variable])
            taken[variable] = parts
        elif section not in other.model_fields:  # both daemons may share one environment
            raise ConfigError(
                f"there is no section {section}", hint=_nearest(section, own.model_fields), environment=variable
            )
    return taken


def _refuse_single_underscore(variable: str, name: str, model: type[BaseModel]) -> None:
    for section in model.model_fields:
        inner = _section_at(model, (section,))
        key = name.removeprefix(f"{section}_")
        if inner is not None and key != name and key in inner.model_fields:
            right = f"{PREFIX}{section}__{key}".upper()
            raise ConfigError("this variable would be ignored", hint=f"write {right}", environment=variable)


def _environment_value(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


# Keys.


def _leaves(value: object, key: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping | list):
        for part, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(inner, f"{key}.{part}" if key else str(part))
    else:
        yield key, value


def _paths(raw: Mapping[str, Any]) -> Iterable[str]:
    return (key for key, _ in _leaves(raw, ""))


def _section_at(
    model: type[BaseModel], parts: Iterable[str | int], *, through_lists: bool = True
) -> type[BaseModel] | None:
    """The section that a path of keys leads to; None where it leads to a value."""
    for part in parts:
        if isinstance(part, str):
            field = model.model_fields.get(part)
            inner = next(_sections_in(field.annotation, through_lists), None) if field else None
            if inner is None:
                return None
            model = inner
    return model


def _sections_in(annotation: object, through_lists: bool) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif through_lists or getattr(annotation, "__origin__", None) is not tuple:
        for inner in get_args(annotation):
            yield from _sections_in(inner, through_lists)


# Mistakes.

_MUST_BE = {
    "int_type": "must be a whole number",
    "string_type": "must be text in quotes",
    "string_pattern_mismatch": "must be 1 to 64 of the characters a-z, 0-9 and -",
    "is_instance_of": "must be a path in quotes",
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a list of tables",
    "too_short": "must not be empty",
}


def _explain(
    mistakes: list[ErrorDetails], model: type[BaseModel], path: Path, variables: Mapping[str, tuple[str, ...]]
) -> ConfigError:
    """One error for all mistakes, with their keys, the hints, and the variables that brought them in."""
    keys, texts, hints, names = [], [], [], []
    for mistake in mistakes:
        # Parts such as (fixed) and [key] are pydantic's own, not keys of the file.
        parts = tuple(part for part in mistake["loc"] if not str(part).startswith(("(", "[")))
        key = ".".join(map(str, parts))
        text, hint = _mistake(mistake, parts, model)
        keys.append(key)
        colon = "" if text.startswith(("must ", "is ", "has ")) else ":"
        texts.append(f"{key}{colon} {text}" if key else text)
        hints += [hint] if hint and hint not in hints else []
        names += [name for name, taken in variables.items() if taken == parts]
    where = {"file": path, "key": ", ".join(filter(None, keys)) or None, "environment": ", ".join(names) or None}
    return ConfigError("; ".join(texts), hint="; ".join(hints) or None, **where)


def _mistake(mistake: ErrorDetails, parts: tuple[str | int, ...], model: type[BaseModel]) -> tuple[str, str | None]:
    kind, context, given = mistake["type"], mistake.get("ctx", {}), mistake["input"]
    if kind == "ckptd":
        return context["message"], context["hint"]
    if kind == "missing":
        return "is missing", None
    if kind == "extra_forbidden":
        section = _section_at(model, parts[:-1])
        return "is not a known key", _nearest(str(parts[-1]), section.model_fields if section else ())
    if kind == "literal_error":
        return f"must be {context['expected']}, not {given!r}", None
    if kind in _MUST_BE:
        return f"{_MUST_BE[kind]}, not {given!r}", None
    return mistake["msg"], None


def _nearest(name: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    near = difflib.get_close_matches(name, allowed, n=2)
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"the keys here are {', '.join(allowed)}"
