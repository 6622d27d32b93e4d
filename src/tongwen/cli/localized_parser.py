"""An argument parser that also translates argparse's own messages."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from tongwen.core.i18n import N_, _
from tongwen.core.terminal_text import visible

# Messages of argparse (Python 3.10 to 3.13) to users; those to programmers stay English.
ARGPARSE_MESSAGES = (
    N_("usage: "),
    N_("positional arguments"),
    N_("options"),
    N_("subcommands"),
    N_("show this help message and exit"),
    N_("show program's version number and exit"),
    N_(" (default: %(default)s)"),
    N_("%(prog)s: error: %(message)s\n"),
    N_("%(prog)s: warning: %(message)s\n"),
    N_("argument %(argument_name)s: %(message)s"),
    N_("argument '%(argument_name)s' is deprecated"),
    N_("option '%(option)s' is deprecated"),
    N_("command '%(parser_name)s' is deprecated"),
    N_("the following arguments are required: %s"),
    N_("one of the arguments %s is required"),
    N_("not allowed with argument %s"),
    N_("unrecognized arguments: %s"),
    N_("ambiguous option: %(option)s could match %(matches)s"),
    N_("ignored explicit argument %r"),
    N_("unexpected option string: %s"),
    N_("expected one argument"),
    N_("expected at most one argument"),
    N_("expected at least one argument"),
    N_("expected %s argument"),
    N_("expected %s arguments"),
    N_("invalid %(type)s value: %(value)r"),
    N_("invalid choice: %(value)r (choose from %(choices)s)"),
    N_("unknown parser %(parser_name)r (choices: %(choices)s)"),
    N_("can't open '%(filename)s': %(error)s"),
    N_('argument "-" with mode %r'),
)


class LocalizedParser(argparse.ArgumentParser):
    """A parser with translated messages. argparse looks them up through `_` and `ngettext` of its module; these point to our
    catalogue while this parser is built, parses or prints. Other parsers of the process are not affected."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _our_catalogue():
            super().__init__(*args, **kwargs)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        with _our_catalogue():
            return super().parse_args(args, namespace)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        with _our_catalogue():
            return super().parse_known_args(args, namespace)

    def format_usage(self) -> str:
        with _our_catalogue():
            return super().format_usage()

    def format_help(self) -> str:
        with _our_catalogue():
            return super().format_help()

    def error(self, message: str) -> NoReturn:
        found = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
        if found:  # Python 3.10 does not translate this message
            message = _("argument %(argument_name)s: %(message)s") % {"argument_name": found[1], "message": found[2]}
        with _our_catalogue():
            super().error(visible(message))


@contextmanager
def _our_catalogue() -> Iterator[None]:
    names = vars(argparse)
    before = {name: names[name] for name in ("_", "ngettext")}
    names.update(_=_, ngettext=lambda one, many, count: _(one if count == 1 else many))
    try:
        yield
    finally:
        names.update(before)
