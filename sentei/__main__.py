"""`python -m sentei` is the command `sentei`."""

from sentei.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
