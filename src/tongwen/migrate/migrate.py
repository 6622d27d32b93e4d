"""Read old command lines and configuration files completely, and find their replacement in tongwen."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tongwen.core.errors import RecipeError, raise_all
from tongwen.core.i18n import _
from tongwen.core.nearest_names import nearest_names
from tongwen.migrate import build_recipe
from tongwen.migrate.flag_values import MigrationContext
from tongwen.migrate.flags import FlagReader, Verdict
from tongwen.migrate.shell import split_environment
from tongwen.migrate.tables import OldProgram, known_files, programs, scripts, translate
from tongwen.recipe.yaml_reader import read_foreign

CurrentId = Callable[[str], str]
ALONE = ("node_rank", "machine_rank", "master_addr", "master_port", "main_process_ip", "main_process_port")
CONFIGURATIONS = (".json", ".yaml", ".yml")
SIZES = {"7B": "llama-7b", "13B": "llama-13b", "30B": "llama-30b", "65B": "llama-65b"}


SECTIONS_OF_STAGES = {"pt": "pretrain", "dpo": "prefer", "kto": "prefer"}  # LLaMA-Factory's


@dataclass
class MigrationResult:
    """The replacement of an old command. recipe: empty if commands replace it; commands: without the leading `tongwen`;
    instead: a line of another program; launch: options of torchrun on several machines; environment: variables set in
    front of the command."""

    old: str
    project: str
    verdicts: list[Verdict] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)
    instead: str = ""
    launch: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def migrate_command(arguments: Sequence[str], current_id: CurrentId) -> MigrationResult:
    """Read one old command line. Raises RecipeError, or SeveralErrors with every invalid flag."""
    old = shlex.join(arguments)
    environment, rest = split_environment(tuple(arguments))
    if not rest:
        raise RecipeError(_("no command given"), place=old or "tongwen migrate --")
    outcome = _plain_line(rest, old) or _program_line(rest, old, current_id)
    outcome.environment |= environment
    outcome.verdicts = [
        *(
            Verdict(name, value, "kept", f"{name}={value}", _("set in front of the new command"))
            for name, value in environment.items()
        ),
        *outcome.verdicts,
    ]
    return outcome


def migrate_files(
    paths: Sequence[str],
    current_id: CurrentId,
    named: OldProgram | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> MigrationResult:
    """Read old configuration files that belong together. named: the program of the command that names them; overrides: keys
    that it sets beside them.

    Raises RecipeError, or SeveralErrors.
    """
    reader, project = _new_reader(current_id), ""
    commands: list[list[str]] = []
    for path in paths:
        data = _read_data(path) | dict(overrides or {})
        program = named or _recognise(data, path)
        project = project or program.project
        reader.section = reader.section or SECTIONS_OF_STAGES.get(str(data.get("stage")), program.section or "sft")
        if data.get("stage") == "kto":
            reader.set_value("prefer.method", "stage", "kto", path)
        _read_keys(reader, program, data, path)
        if program.command:
            commands = build_recipe.build_commands(reader, program)
    raise_all(reader.problems)
    names = " ".join(Path(path).name for path in paths)
    outcome = MigrationResult(names, project, reader.verdicts, commands=commands, notes=reader.notes)
    if not commands:
        outcome.recipe = build_recipe.build_recipe(reader, paths[0])
        raise_all(reader.problems)
    return outcome


def _new_reader(current_id: CurrentId) -> FlagReader:
    reader = FlagReader(MigrationContext(current_id, lambda path, flag: {}))
    reader.context.read_file = lambda path, flag: _read_file_flags(reader, path)
    return reader


# -- lines that run a general tool ---------------------------------------------------------------------------------


def _plain_line(arguments: tuple[str, ...], old: str) -> MigrationResult | None:
    """Read a line of conda, pip, git, wget, sha256sum or `accelerate config`; its arguments are dropped or passed on."""
    for program in programs("lines").values():
        prefix = next(
            (prefix for prefix in program.names if arguments[: len(prefix.split())] == tuple(prefix.split())), None
        )
        if prefix is None or program.holds not in " ".join(arguments):
            continue
        rest = arguments[len(prefix.split()) :]
        commands = [list(line) for line in program.lines] or (_LINES[program.read](rest) if program.read else [])
        kept = {argument for line in commands for argument in line}
        verdicts = [
            Verdict(argument, None, "kept", "tongwen " + commands[0][0])
            if argument in kept
            else Verdict(argument, None, "dropped", why=translate(program.reason))
            for argument in rest
        ]
        return MigrationResult(
            old,
            program.project,
            verdicts,
            commands=commands,
            instead=" ".join(program.instead),
            notes=[translate(program.reason)],
        )
    return None


def _llama_address(rest: Sequence[str]) -> list[list[str]]:
    """Fetch the model of the size in `wget …/LLaMA/7B/consolidated.00.pth`, which includes its md5 list and tokenizer."""
    address = next(argument for argument in rest if "://" in argument)
    size = next((name for part, name in SIZES.items() if f"/{part}/" in address), SIZES["7B"])
    return [["fetch", size]]


def _address(rest: Sequence[str]) -> list[list[str]]:
    return [["fetch", argument] for argument in rest if "://" in argument]


def _sums(rest: Sequence[str]) -> list[list[str]]:
    files = [argument for argument in rest if not argument.startswith("-")]
    if {"-c", "--check"} & set(rest):
        return [["verify", str(Path(file).parent), "--against", file] for file in files]
    return [["verify", file] for file in files]


_LINES: dict[str, Callable[[Sequence[str]], list[list[str]]]] = {
    "llama_address": _llama_address,
    "address": _address,
    "sums": _sums,
}


# -- programs ------------------------------------------------------------------------------------------------------


def _program_line(arguments: tuple[str, ...], old: str, current_id: CurrentId) -> MigrationResult:
    launcher, rest = _split_launcher(arguments)
    position = next((index for index, argument in enumerate(rest) if _script_name(rest, index)), None)
    if position is None:
        raise RecipeError(
            _("no known script of an older project is in this command"),
            place=old,
            remedy=_nearest_scripts(rest),
        )
    name = _script_name(rest, position)
    flags = rest[position + len(name.split()) :]
    program = _choose(name, flags)
    if program.reads_file and flags and Path(flags[0]).suffix in CONFIGURATIONS:
        return migrate_files(flags[:1], current_id, program, _overrides(flags[1:], old))
    reader = _new_reader(current_id)
    reader.section = program.section
    if launcher:
        reader.read_flags(launcher, _flags(rest[:position], reader, old), old)
    as_above = "..." in flags
    if not as_above:
        reader.read_flags(program, list(_flags(flags, reader, old, program.positional)), old)
    raise_all(reader.problems)
    reader.notes += [
        translate(one) for one in (program.note, launcher and "devices" not in reader.settings and launcher.note) if one
    ]
    outcome = MigrationResult(old, program.project, reader.verdicts, launch=_torchrun(reader, old), notes=reader.notes)
    outcome.environment = reader.context.environment
    if program.lines:
        outcome.commands = [list(line) for line in program.lines]
    elif program.command:
        outcome.commands = build_recipe.build_commands(reader, program)
    elif as_above:
        outcome.verdicts.append(Verdict("...", None, "kept", "RECIPE", _("the recipe of the command above")))
    else:
        outcome.recipe = build_recipe.build_recipe(reader, old)
    raise_all(reader.problems)
    return outcome


def _torchrun(reader: FlagReader, place: str) -> dict[str, str]:
    """Return the options with which torchrun starts the run on each of several machines; none for a single machine.

    Without ranks the machines find each other at the first one's address.
    """
    context, many = reader.context, reader.context.batch.get("machines", 1)
    if together := context.batch.pop("processes", 0):
        if together % many:
            reader.add_problem(
                place,
                _("{together} processes cannot be divided among {many} machines").format(together=together, many=many),
            )
        context.batch["devices"] = together // many
        reader.settings["devices"] = (reader.settings["devices"][0], together // many)
    launch = dict(context.launch)
    if "devices" in context.batch:
        launch["nproc_per_node"] = str(context.batch["devices"])
    if many == 1 and launch.get("nnodes", "1") == "1":
        for verdict in reader.verdicts:
            if verdict.flag in ALONE:
                verdict.verdict, verdict.why = "dropped", _("a single machine needs no flag")
        per_node = launch.get("nproc_per_node", "1")
        return {} if per_node.isdigit() else {"nproc_per_node": per_node}
    if not launch.keys() & {"node_rank", "rdzv_endpoint"}:
        first, port = launch.pop("master_addr", "FIRST_HOST"), launch.pop("master_port", "29500")
        launch |= {"rdzv_backend": "c10d", "rdzv_endpoint": f"{first}:{port}"}
        if first == "FIRST_HOST":
            reader.notes.append(_("write the address of the first machine for FIRST_HOST"))
    return launch


def _overrides(arguments: Sequence[str], place: str) -> dict[str, Any]:
    """Return what `key=value` behind a configuration file sets. Raises RecipeError for anything else."""
    for argument in arguments:
        if not re.match(r"[A-Za-z_][\w.]*=", argument):
            raise RecipeError(
                _("{argument!r} behind the file is no key=value").format(argument=argument),
                place=place,
            )
    pairs = (argument.split("=", 1) for argument in arguments)
    try:
        return {key: read_foreign(value, is_json=False) for key, value in pairs}
    except ValueError as error:
        raise RecipeError(_("cannot be read: {error}").format(error=error), place=place) from None


def _split_launcher(arguments: tuple[str, ...]) -> tuple[OldProgram | None, tuple[str, ...]]:
    """Return (the launcher that starts the script, the rest)."""
    found = [
        (len(name.split()), one)
        for one in programs("launchers").values()
        for name in one.names
        if arguments[: len(name.split())] == tuple(name.split())
    ]
    if not found:
        return None, arguments
    size, launcher = max(found, key=lambda pair: pair[0])
    return launcher, arguments[size:]


def _script_name(arguments: Sequence[str], position: int) -> str:
    """Return the name of the old program at this position, by its file name; "" if there is none."""
    for program in scripts():
        for name in program.names:
            parts = name.split()
            if list(arguments[position : position + len(parts)]) == parts or Path(arguments[position]).name == name:
                return name
    return ""


def _nearest_scripts(arguments: Sequence[str]) -> str:
    known = [name for program in scripts() for name in program.names]
    near = [name for argument in arguments for name in nearest_names(Path(argument).name, known)]
    return ", ".join(dict.fromkeys(near or known))


def _choose(name: str, flags: Sequence[str]) -> OldProgram:
    """Return the program of that name. Several projects have a finetune.py, which are distinguished by their flags; a line
    without flags is BELLE's, the only project whose manual shows one."""
    named = [program for program in scripts() if name in program.names]
    given = {flag.lstrip("-").partition("=")[0] for flag in flags if flag.startswith("--")}
    for program in named:
        if given & set(program.signs) or any(sign in argument for sign in program.sign_values for argument in flags):
            return program
    unsigned = [program for program in named if not program.signs and not program.sign_values]
    return unsigned[0] if given and unsigned else named[0]


def _flags(
    arguments: Sequence[str], reader: FlagReader, place: str, positional: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield (flag, value) of each option. Other arguments are the value of the flag before them, or positional."""
    waiting: str | None = None
    names = iter(positional)
    for argument in arguments:
        if re.match(r"--?[A-Za-z]", argument):
            if waiting is not None:
                yield waiting, None
            option, equals, value = argument.partition("=")
            waiting = option.lstrip("-").replace("-", "_")
            if equals:
                yield waiting, value
                waiting = None
        elif waiting is not None:
            yield waiting, argument
            waiting = None
        elif name := next(names, ""):
            yield name, argument
        else:
            reader.add_problem(
                place,
                _("{argument!r} follows no flag").format(argument=argument),
                _("an extra space?"),
            )
    if waiting is not None:
        yield waiting, None


# -- files ---------------------------------------------------------------------------------------------------------


def _read_file_flags(reader: FlagReader, path: str) -> Mapping[str, Any]:
    """Read the keys of a file that a flag names, and return its content. If it does not exist, use the file that the project shipped."""
    name = Path(path).name
    if not Path(path).is_file() and name in known_files():
        data = known_files()[name]
        reader.notes.append(_("{path} does not exist here: using its project's own file").format(path=path))
    else:
        data = _read_data(path)
    program = _recognise(data, path)
    _read_keys(reader, program, data, path, name)
    return data


def _read_keys(reader: FlagReader, program: OldProgram, data: Mapping[str, Any], path: str, inside: str = "") -> None:
    """Read the keys of a file as flags; null sets nothing."""
    keys = dict(_flat(data))
    reader.read_flags(program, [pair for pair in keys.items() if pair[1] is not None], path, inside)
    null_keys = [f"{inside}:{key}" if inside else key for key, value in keys.items() if value is None]
    reader.verdicts += [Verdict(key, None, "dropped", why=_("null sets nothing")) for key in null_keys]


def _read_data(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        data = read_foreign(text, is_json=path.endswith(".json"))
    except FileNotFoundError:
        raise RecipeError(_("there is no such file"), place=path) from None
    except (OSError, ValueError) as error:
        raise RecipeError(_("cannot be read: {error}").format(error=error), place=path) from None
    if not isinstance(data, dict):
        raise RecipeError(_("a configuration must map keys to values"), place=path)
    return data


def _recognise(data: Mapping[str, Any], path: str) -> OldProgram:
    """Return the program to which a file belongs: the first of whose keys all occur in it."""
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
        remedy=_("readable files: {names}").format(names=", ".join([*near, "LLaMA-Factory's YAML"])),
    )


def _flat(data: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of nested mappings, joined by dots, and their values."""
    for key, value in data.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
