"""Arguments of commands that have nothing else in common."""

from __future__ import annotations

import argparse

from tongwen.core.i18n import _


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
    parser.add_argument("--port", type=int, default=7860, help=_("web: port; 0: any free port"))
