"""`python -m tongwen` is the `tongwen` command; torchrun starts it this way."""

from tongwen.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
