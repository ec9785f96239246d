"""`python -m ckptd`: the same as the `ckptd` script."""

from ckptd.cli.main import main

if __name__ == "__main__":
    main()
