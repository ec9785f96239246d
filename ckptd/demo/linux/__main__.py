"""`python -m ckptd.demo.linux [FOLDER]`: builds the guest and says where it is."""

from __future__ import annotations

import sys
from pathlib import Path

from ckptd.demo.linux import build, default_folder
from ckptd.errors import CkptdError


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print("usage: python -m ckptd.demo.linux [FOLDER]", file=sys.stderr)
        return 2
    try:
        guest = build(Path(arguments[0]) if arguments else default_folder(), lambda text: print(text, file=sys.stderr))
    except CkptdError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"the guest is in {guest.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
