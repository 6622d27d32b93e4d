"""The parser of the command line: all commands, in groups, with their help in the user's language."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tongwen import __version__
from tongwen.cli import (
    chat,
    check,
    clean,
    convert,
    demo,
    doctor,
    evaluate,
    fetch,
    generate,
    init,
    launch,
    look,
    merge,
    migrate,
    plan,
    run,
    schema,
    serve,
    show,
    sign,
    tokenizer,
    verify,
    web,
)
from tongwen.cli.localized_parser import LocalizedParser
from tongwen.cli.shared_arguments import add_json
from tongwen.core.i18n import _
from tongwen.core.nearest_names import nearest_names


class Command(Protocol):
    """The functions of a command's module."""

    __name__: str

    def summary(self) -> str:
        """One line of help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to its own parser."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command. Returns the exit code."""


def command_groups() -> dict[str, dict[str, Command]]:
    """Return all commands by name, in the groups and the order in which `--help` lists them."""
    groups: dict[str, tuple[Command, ...]] = {
        _("recipes, from data to a trained model"): (
            demo,
            init,
            check,
            plan,
            look,
            run,
            schema,
        ),
        _("models, adapters and data sets"): (fetch, merge, convert, sign, verify, show),
        _("use and score a model"): (chat, generate, evaluate, serve, web),
        _("tools"): (tokenizer, launch, migrate, clean, doctor),
    }
    return {
        title: {command.__name__.rpartition(".")[2]: command for command in commands}
        for title, commands in groups.items()
    }


class Parser(LocalizedParser):
    """argparse's parser; its errors suggest the nearest names."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            problem = _("unknown command: {value}").format(value=value)
            self.error(f"{problem}\n  → {self._suggestion([value], action.choices)}")
        super()._check_value(action, value)

    def reject(self, unknown: Sequence[str]) -> NoReturn:
        """Exit because of arguments that the command does not accept."""
        problem = _("unrecognized arguments: %s") % " ".join(unknown)
        options = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        self.error(f"{problem}\n  → {self._suggestion(options, self._option_string_actions)}")

    def _suggestion(self, names: Iterable[str], known: Iterable[str]) -> str:
        nearest = [match for name in names for match in nearest_names(name, known, 1)]
        if nearest:
            return _("did you mean {nearest}?").format(nearest=_(", ").join(nearest))
        return _("`{prog} --help` lists all").format(prog=self.prog)


def make_parser() -> Parser:
    """Return the parser of all commands, with its help in the user's language."""
    parser = Parser(
        prog="tongwen",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description=_("Teach a language model Chinese."),
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"tongwen {__version__}",
        help=_("show program's version number and exit"),
    )
    # DeepSpeed's launcher passes it here and in the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.set_defaults(json=False, parser=parser, run_command=_print_help, serves=False, writes=False)
    subparsers = parser.add_subparsers(prog="tongwen", metavar="COMMAND", help=argparse.SUPPRESS)
    for title, commands in command_groups().items():
        # argparse has no groups of commands, so each group is a heading with lines of text.
        parser.add_argument_group(title, "\n".join(f"{name:10}  {one.summary()}" for name, one in commands.items()))
        for name, command in commands.items():
            subparser = subparsers.add_parser(name, description=command.summary())
            add_json(subparser)
            command.add_arguments(subparser)
            subparser.set_defaults(parser=subparser, run_command=command.run)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; `run_command` is the command's `run`. Exits with 2 if they are invalid.

    argparse accepts overrides only right after the recipe; here they may be anywhere.
    """
    arguments, rest = make_parser().parse_known_args(argv)
    overrides = [one for one in rest if "=" in one and not one.startswith("-")] if "overrides" in arguments else []
    if len(overrides) < len(rest):
        arguments.parser.reject([one for one in rest if one not in overrides])
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def readme() -> Path | None:
    """Return the README in the user's language, which links to all other pages. A wheel has it beside the modules, a checkout
    at its root."""
    name, package = _("README.md"), Path(__file__).parents[1]
    pages = [folder / name for folder in (package, package.parents[1])]
    return next((page for page in pages if page.is_file()), None)


def _epilog() -> str | None:
    page = readme()
    return _("docs: {page}").format(page=page) if page else None


def _print_help(arguments: argparse.Namespace) -> int:
    arguments.parser.print_help()
    return 0
