"""An old command line, or an old file, read from its first word to its last: what it was, and what does it today."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tongwen.core.errors import RecipeError, raise_all
from tongwen.core.i18n import _
from tongwen.migrate import build_recipe
from tongwen.migrate.flag_values import MigrationContext
from tongwen.migrate.flags import FlagReader, Verdict
from tongwen.migrate.shell import split_environment
from tongwen.migrate.tables import OldProgram, known_files, programs, scripts, spoken

Today = Callable[[str], str]
SIZES = {"7B": "llama-7b", "13B": "llama-13b", "30B": "llama-30b", "65B": "llama-65b"}


@dataclass
class MigrationResult:
    """What an old command is today. recipe: empty when commands do it; commands: without the word `tongwen`; instead: a
    line of another program; launch: options of torchrun on several machines; environment: what stood before the command."""

    old: str
    project: str
    verdicts: list[Verdict] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)
    instead: str = ""
    launch: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def migrate_command(words: Sequence[str], today: Today) -> MigrationResult:
    """Read one old command line. Raises RecipeError, or SeveralErrors with every flag that cannot be read."""
    old = shlex.join(words)
    environment, rest = split_environment(tuple(words))
    if not rest:
        raise RecipeError(_("no command given"), place=old or "tongwen migrate --")
    outcome = _plain_line(rest, old) or _program_line(rest, old, today)
    outcome.environment = environment
    outcome.verdicts = [
        *(
            Verdict(name, value, "kept", f"{name}={value}", _("set in front of the new command"))
            for name, value in environment.items()
        ),
        *outcome.verdicts,
    ]
    return outcome


def migrate_files(paths: Sequence[str], today: Today) -> MigrationResult:
    """Read old configuration files that belong together. Raises RecipeError, or SeveralErrors."""
    reading, project = _new_reading(today), ""
    commands: list[list[str]] = []
    for path in paths:
        data = _read_data(path)
        program = _recognise(data, path)
        project = project or program.project
        reading.section = reading.section or ("pretrain" if data.get("stage") == "pt" else program.section or "sft")
        _take_keys(reading, program, data, path)
        if program.command:
            commands = build_recipe.build_commands(reading, program)
    raise_all(reading.problems)
    outcome = MigrationResult(" ".join(paths), project, reading.verdicts, commands=commands, notes=reading.notes)
    if not commands:
        outcome.recipe = build_recipe.build_recipe(reading, paths[0])
        raise_all(reading.problems)
    return outcome


def _new_reading(today: Today) -> FlagReader:
    reading = FlagReader(MigrationContext(today, lambda path, flag: None))
    reading.context.read_file = lambda path, flag: _take_file(reading, path)
    return reading


# -- lines that start no program of theirs -------------------------------------------------------------------------


def _plain_line(words: tuple[str, ...], old: str) -> MigrationResult | None:
    """conda, pip, git, wget, sha256sum, accelerate's questions: each word dropped, or an argument of what is done here."""
    for program in programs("lines").values():
        name = next((name for name in program.names if words[: len(name.split())] == tuple(name.split())), None)
        if name is None or program.holds not in " ".join(words):
            continue
        rest = words[len(name.split()) :]
        commands = [list(line) for line in program.lines] or (_LINES[program.read](rest) if program.read else [])
        kept = {word for line in commands for word in line}
        verdicts = [
            Verdict(word, None, "kept", "tongwen " + commands[0][0])
            if word in kept
            else Verdict(word, None, "dropped", why=spoken(program.reason))
            for word in rest
        ]
        return MigrationResult(
            old,
            program.project,
            verdicts,
            commands=commands,
            instead=" ".join(program.instead),
            notes=[spoken(program.reason)],
        )
    return None


def _llama_address(rest: Sequence[str]) -> list[list[str]]:
    """`wget …/LLaMA/7B/consolidated.00.pth`: the model of that size; its md5 list and the tokenizer come along."""
    address = next(word for word in rest if "://" in word)
    size = next((name for part, name in SIZES.items() if f"/{part}/" in address), SIZES["7B"])
    return [["fetch", size]]


def _address(rest: Sequence[str]) -> list[list[str]]:
    return [["fetch", word] for word in rest if "://" in word]


def _sums(rest: Sequence[str]) -> list[list[str]]:
    files = [word for word in rest if not word.startswith("-")]
    if {"-c", "--check"} & set(rest):
        return [["verify", str(Path(file).parent), "--against", file] for file in files]
    return [["verify", file] for file in files]


_LINES: dict[str, Callable[[Sequence[str]], list[list[str]]]] = {
    "llama_address": _llama_address,
    "address": _address,
    "sums": _sums,
}


# -- programs ------------------------------------------------------------------------------------------------------


def _program_line(words: tuple[str, ...], old: str, today: Today) -> MigrationResult:
    launcher, rest = _split_launcher(words)
    at = next((place for place, word in enumerate(rest) if _script_name(rest, place)), None)
    if at is None:
        raise RecipeError(
            _("this names no program of an older project"),
            place=old,
            remedy=_nearest_scripts(rest),
        )
    name = _script_name(rest, at)
    flags = rest[at + len(name.split()) :]
    program = _choose(name, flags)
    reading = _new_reading(today)
    reading.section = program.section
    if launcher:
        reading.take(launcher, _flags(rest[:at], reading, old), old)
    as_above = "..." in flags
    if not as_above:
        reading.take(program, list(_flags(flags, reading, old, program.positional)), old)
    raise_all(reading.problems)
    reading.notes += [
        spoken(one) for one in (program.note, launcher and "devices" not in reading.said and launcher.note) if one
    ]
    launch = reading.context.launch
    if launch and "devices" in reading.context.batch:
        launch["nproc_per_node"] = str(reading.context.batch["devices"])
    outcome = MigrationResult(old, program.project, reading.verdicts, launch=launch, notes=reading.notes)
    if program.lines:
        outcome.commands = [list(line) for line in program.lines]
    elif program.command:
        outcome.commands = build_recipe.build_commands(reading, program)
    elif as_above:
        outcome.verdicts.append(Verdict("...", None, "kept", "RECIPE", _("the recipe of the command above")))
    else:
        outcome.recipe = build_recipe.build_recipe(reading, old)
    raise_all(reading.problems)
    return outcome


def _split_launcher(words: tuple[str, ...]) -> tuple[OldProgram | None, tuple[str, ...]]:
    """(the program that starts the script, the rest)."""
    found = [
        (len(name.split()), one)
        for one in programs("launchers").values()
        for name in one.names
        if words[: len(name.split())] == tuple(name.split())
    ]
    if not found:
        return None, words
    size, launcher = max(found, key=lambda pair: pair[0])
    return launcher, words[size:]


def _script_name(words: Sequence[str], at: int) -> str:
    """The name of an old program that stands there, by its file alone; empty when it is none."""
    for program in scripts():
        for name in program.names:
            parts = name.split()
            if list(words[at : at + len(parts)]) == parts or Path(words[at]).name == name:
                return name
    return ""


def _nearest_scripts(words: Sequence[str]) -> str:
    known = [name for program in scripts() for name in program.names]
    near = [name for word in words for name in difflib.get_close_matches(Path(word).name, known, 3)]
    return ", ".join(dict.fromkeys(near or known))


def _choose(name: str, flags: Sequence[str]) -> OldProgram:
    """The program of that name: several projects have a finetune.py, and their flags tell them apart. One without any is
    BELLE's, whose manual alone shows such a line."""
    named = [program for program in scripts() if name in program.names]
    given = {flag.lstrip("-").partition("=")[0] for flag in flags if flag.startswith("--")}
    for program in named:
        if given & set(program.signs) or any(sign in word for sign in program.sign_values for word in flags):
            return program
    unsigned = [program for program in named if not program.signs and not program.sign_values]
    return unsigned[0] if given and unsigned else named[0]


def _flags(
    words: Sequence[str], reading: FlagReader, place: str, positional: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """(flag, value) of each option. A word that is no flag belongs to the flag before it, or is the next positional one."""
    waiting: str | None = None
    names = iter(positional)
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            if waiting is not None:
                yield waiting, None
            option, equals, value = word.partition("=")
            waiting = option.lstrip("-").replace("-", "_")
            if equals:
                yield waiting, value
                waiting = None
        elif waiting is not None:
            yield waiting, word
            waiting = None
        elif name := next(names, ""):
            yield name, word
        else:
            reading.wrong(
                place,
                _("{word!r} does not belong to any flag").format(word=word),
                _("an extra space?"),
            )
    if waiting is not None:
        yield waiting, None


# -- files ---------------------------------------------------------------------------------------------------------


def _take_file(reading: FlagReader, path: str) -> None:
    """A file that a flag names: its keys are flags of their own. The project's own when it is not here."""
    name = Path(path).name
    if not Path(path).is_file() and name in known_files():
        data = known_files()[name]
        reading.notes.append(_("{path} does not exist here: using its project's own file").format(path=path))
    else:
        data = _read_data(path)
    program = _recognise(data, path)
    _take_keys(reading, program, data, path, name)


def _take_keys(reading: FlagReader, program: OldProgram, data: Mapping[str, Any], path: str, inside: str = "") -> None:
    """The keys of a file as flags; a null says nothing."""
    keys = dict(_flat(data))
    reading.take(program, [pair for pair in keys.items() if pair[1] is not None], path, inside)
    said = [f"{inside}:{key}" if inside else key for key, value in keys.items() if value is None]
    reading.verdicts += [Verdict(key, None, "dropped", why=_("null sets nothing")) for key in said]


def _read_data(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        data = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except FileNotFoundError:
        raise RecipeError(_("there is no such file"), place=path) from None
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(_("cannot be read: {error}").format(error=error), place=path) from None
    if not isinstance(data, dict):
        raise RecipeError(_("a configuration must map keys to values"), place=path)
    return data


def _recognise(data: Mapping[str, Any], path: str) -> OldProgram:
    """What a file is by its keys: all that its program is known by must be there."""
    files = [*programs("trainer").values(), *scripts()]
    for program in files:
        if program.keys and all(key in data for key in program.keys):
            return program
    near = [name for name in known_files() if name != Path(path).name][:4]
    raise RecipeError(
        _("this is not a configuration file of an older project; it has: {data}").format(
            data=_(", ").join(list(data)[:6])
        ),
        place=path,
        remedy=_("readable files: ") + ", ".join([*near, "LLaMA-Factory's YAML"]),
    )


def _flat(data: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of nested mappings, joined by dots."""
    for key, value in data.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
