"""Arguments of commands that have nothing else in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from tongwen.core.i18n import _

SEED = 2**32 - 1  # as in a recipe
MANY = 2**31 - 1  # of anything that is counted


def whole_number(low: int, high: int = MANY) -> Callable[[str], int]:
    """Return the type of an option that takes a whole number of this range."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(_("{value!r} is not a whole number").format(value=text[:40])) from None
        return int(_within(value, text, low, high))

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """Return the type of an option that takes a number of this range."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(_("{value!r} is not a number").format(value=text[:40])) from None
        return _within(value, text, low, high)

    return read


def _within(value: float, text: str, low: float, high: float) -> float:
    if not low <= value <= high:  # also NaN
        raise argparse.ArgumentTypeError(
            _("{value} must be between {low:g} and {high:g}").format(value=text[:40], low=low, high=high)
        )
    return value


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, which every command has."""
    parser.add_argument("--json", action="store_true", help=_("one JSON object on stdout"))


def add_page_address(parser: argparse.ArgumentParser) -> None:
    """Add the address of the page of `web` and of `chat --web`."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=_("web: an address other than loopback needs a token in TONGWEN_API_KEY"),
    )
    parser.add_argument("--port", type=whole_number(0, 65535), default=7860, help=_("web: port; 0: any free port"))
