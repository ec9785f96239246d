"""What every command shares: `--json`, how errors are shown, and exit codes.

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 configuration; 4 unreachable; 5 not allowed in this state; 6 fenced;
7 verify failed (2 is given here, the others by the error's class in ckptd/errors.py); 130 interrupted; 141 the reader
of a pipe went away. With `--json`, stdout carries one JSON value, errors too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from cyclopts import CycloptsError, Parameter

from ckptd.errors import CkptdError

__all__ = ["Json", "emit", "run", "run_async"]

T = TypeVar("T")

Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print JSON, errors too.")]
"""The type of every command's `as_json: Json = False`."""

USAGE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def emit(value: T, as_json: bool, render: Callable[[T], object]) -> None:
    """Print `value` as JSON, or what `render` makes of it (text, or anything that rich prints)."""
    if as_json:
        print(json.dumps(value, indent=2, default=str))
        return
    from rich.console import Console

    rendered = render(value)
    if isinstance(rendered, str):
        print(rendered)  # as it is: rich would break lines and read brackets as markup
    else:
        # In a pipe or a log nobody's window is 80 columns wide: a cut digest helps no one.
        Console(width=None if sys.stdout.isatty() else 160).print(rendered)


def run(call: Callable[[], object], *, as_json: bool) -> int:
    """Call it, show what it raises, and return the exit code. A command that returns a number returns its exit code."""
    try:
        result = call()
        sys.stdout.flush()
    except CkptdError as error:
        if as_json:
            print(json.dumps(error.as_dict(), indent=2))
        else:
            where = ", ".join(f"{key} {value}" for key, value in error.where.items())
            print(f"ckptd: {error.message}" + (f" ({where})" if where else ""), file=sys.stderr)
            if error.hint:
                print(f"  hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except CycloptsError:
        return USAGE  # cyclopts has shown it
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Or the interpreter complains once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return result if isinstance(result, int) else 0


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine on uvloop."""
    import uvloop

    return uvloop.run(main)
