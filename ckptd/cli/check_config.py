"""`ckptd check-config`: is a file right, and where does each value come from?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypedDict

from cyclopts import Parameter
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ckptd.cli.common import Json, emit
from ckptd.config import (
    Loaded,
    PrimaryConfig,
    Role,
    SecondaryConfig,
    detect_role,
    flatten,
    load_primary,
    load_secondary,
)

__all__ = ["check_config"]


class _Value(TypedDict):
    value: object
    origin: str


class _Report(TypedDict):
    file: str
    role: Role
    keys: dict[str, _Value]


def check_config(
    file: Annotated[Path, Parameter(help="The configuration file.")],
    /,
    *,
    role: Annotated[Role | None, Parameter(help="Whose file it is; its sections tell, if this does not.")] = None,
    as_json: Json = False,
) -> None:
    """Check a configuration file; print each value and where it comes from."""
    role = role or detect_role(file)
    loaded: Loaded[PrimaryConfig] | Loaded[SecondaryConfig] = (
        load_primary(file, os.environ) if role == "primary" else load_secondary(file, os.environ)
    )
    values = flatten(loaded.config)
    report: _Report = {
        "file": str(file),
        "role": role,
        "keys": {key: {"value": value, "origin": loaded.origins[key]} for key, value in values.items()},
    }
    emit(report, as_json, _table)


def _table(report: _Report) -> Group:
    heading = f"{report['file']}: a {report['role']}'s configuration, without mistakes"
    table = Table("key", "value", "origin")
    for key, entry in report["keys"].items():
        # Text, since rich would take the brackets of an address for markup.
        style = "dim" if entry["origin"] == "default" else None
        table.add_row(key, Text(str(entry["value"])), entry["origin"], style=style)
    return Group(Text(heading, no_wrap=True, overflow="ignore"), table)
