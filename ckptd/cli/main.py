"""The `ckptd` command: a table of commands, each loaded when it is called.

The command `check-config` is the function `check_config` in ckptd/cli/check_config.py, and so on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from cyclopts import App

from ckptd import __version__
from ckptd.cli.common import run

__all__ = ["app", "main"]

COMMANDS = {
    "demo": "Two daemons and a guest on this machine; kills the primary and proves what the secondary resumed.",
    "primary": "Run the primary daemon: protect a guest.",
    "secondary": "Run the secondary daemon: hold replicas, ready to resume their guests.",
    "status": "What a daemon does and holds.",
    "promote": "Failover: resume the guest from the replica on this secondary.",
    "switchover": "Move a protected guest to its secondary, on purpose and without loss.",
    "checkpoint": "Take a checkpoint now and wait until it is acknowledged.",
    "detach": "End the protection of a guest, which is left running.",
    "verify": "Hash the guest's memory and the replica's image at one epoch, and compare.",
    "history": "The committed epochs that a secondary still has.",
    "restore": "Write a guest's memory and state as they were at an epoch to a directory.",
    "record": "Write the retained history of a guest as one recording.",
    "replay": "Replay recorded epochs and check every digest.",
    "discard": "Give up what a secondary holds of a guest.",
    "doctor": "What this machine offers, what is missing and its cure, and which tracker suits it.",
    "bench": "Measure every figure that the documents claim.",
    "check-config": "Check a configuration file; print each value and where it comes from.",
    "sample-config": "Print a commented configuration file that works as it stands.",
}

app = App(
    name="ckptd",
    help="Keeps a running machine alive when its host dies.",
    version=__version__,
    version_flags=("--version",),
    suppress_keyboard_interrupt=False,
    exit_on_error=False,
    result_action="return_value",
)
for _name, _help in COMMANDS.items():
    _function = _name.replace("-", "_")
    _module = f"ckptd.cli.{_function}"
    if find_spec(_module):  # what a build leaves out is no command of it
        app.command(f"{_module}:{_function}", name=_name, help=_help)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the `ckptd` script: run the command and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(lambda: app(given), as_json="--json" in given))
