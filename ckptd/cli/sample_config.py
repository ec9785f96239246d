"""`ckptd sample-config`: the commented files of config/, as they are."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Annotated

from cyclopts import Parameter

from ckptd.config import Role

__all__ = ["sample_config"]


def sample_config(role: Annotated[Role, Parameter(help="Whose file.")], /) -> None:
    """Print a commented configuration file that works as it stands."""
    sys.stdout.write(files("ckptd").joinpath("samples", f"{role}.toml").read_text("utf-8"))
