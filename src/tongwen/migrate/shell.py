"""Parse shell lines from scripts and READMEs: continued lines, variables, prompts.

Nothing is run: variables get the values that the same text assigns, and others stay `${name}`.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _

_PROMPT = re.compile(r"^[>$]\s+")
_ASSIGNMENT = re.compile(r"^([A-Za-z_]\w*)=(.*)$", re.DOTALL)
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass(frozen=True)
class ScriptLine:
    """One command. number: its first line, counted from 1."""

    arguments: tuple[str, ...]
    number: int


def read_script(text: str, name: str) -> list[ScriptLine]:
    """Return the commands of a script. A line that begins with a dash continues the command above, even without a backslash.

    Raises RecipeError for an unclosed quote.
    """
    variables: dict[str, str] = {}
    out: list[ScriptLine] = []
    for number, line in _joined(text):
        try:
            arguments = shlex.split(line, comments=True)
        except ValueError as error:
            raise RecipeError(
                _("this is not a valid shell line: {error}").format(error=error),
                place=f"{name}:{number}",
                remedy=_("close the quote"),
            ) from None
        arguments = [
            _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], found[0]), argument)
            for argument in arguments
        ]
        if len(arguments) == 1 and (found := _ASSIGNMENT.match(arguments[0])):
            variables[found[1]] = found[2]
        elif arguments:
            out.append(ScriptLine(tuple(arguments), number))
    return out


def split_environment(arguments: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return (the NAME=value assignments in front of a command, the command)."""
    environment: dict[str, str] = {}
    for index, argument in enumerate(arguments):
        found = _ASSIGNMENT.match(argument)
        if found is None:
            return environment, arguments[index:]
        environment[found[1]] = found[2]
    return environment, ()


def _joined(text: str) -> list[tuple[int, str]]:
    """Return the lines with continuations joined, each with the number of its first line."""
    out: list[tuple[int, str]] = []
    continued = False
    for number, raw in enumerate(text.splitlines(), 1):
        line = _PROMPT.sub("", raw.strip())
        if not line or line.startswith("#"):
            continued = False
            continue
        if out and (continued or line.startswith("-")):
            first, before = out.pop()
            out.append((first, f"{before} {line.removesuffix(chr(92))}"))
        else:
            out.append((number, line.removesuffix("\\")))
        continued = line.endswith("\\")
    return out
