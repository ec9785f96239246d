"""The configuration of both daemons: TOML files, overridden by the environment, as frozen models.

Values come from, the later one winning: the default, the file, the environment (`CKPTD_CHECKPOINT__INTERVAL=10ms`
sets checkpoint.interval). Every key is known: one that is not is an error, so that a misspelt safeguard is never
silently off. Opens nothing but the file that it is told to read.
"""

from ckptd.config.load import Loaded, Role, detect_role, flatten, load_primary, load_secondary
from ckptd.config.models import (
    Adaptive,
    Checkpoint,
    GuestConfig,
    GuestEntry,
    Listen,
    PrimaryConfig,
    PrimaryLink,
    Replica,
    Runtime,
    SecondaryAddress,
    SecondaryConfig,
    SecondaryLink,
    changed_keys,
)
from ckptd.config.values import parse_address

__all__ = [
    "Adaptive", "Checkpoint", "GuestConfig", "GuestEntry", "Listen", "Loaded", "PrimaryConfig", "PrimaryLink",
    "Replica", "Role", "Runtime", "SecondaryAddress", "SecondaryConfig", "SecondaryLink", "changed_keys",
    "detect_role", "flatten", "load_primary", "load_secondary", "parse_address",
]  # fmt: skip
