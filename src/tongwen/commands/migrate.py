"""migrate: turn a command or files of an older project into a recipe, or into the tongwen commands that do the same.

Every flag is accounted for. The recipe is read again as `run` would read it, so that every printed recipe can be run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tongwen.core import console, originals
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.hub.names import current_id
from tongwen.migrate.build_recipe import as_yaml
from tongwen.migrate.migrate import CONFIGURATIONS, MigrationResult, migrate_command, migrate_files
from tongwen.migrate.shell import read_script
from tongwen.recipe.load import read

SCRIPTS, SHELLS = (".sh", ".bash", ".txt"), ("sh", "bash")


def run(inputs: Sequence[str], out: str, alpha: float | None, *, to_run: bool) -> Iterator[tuple[list[str], bool]]:
    """Print the replacement of each old command; yield the tongwen commands in their order, and whether each is the last. A
    folder is an old adapter: it is written to `out` as an ordinary one, with alpha as its scale.

    inputs: files, or a command. out: the recipe's file; by default beside the run's folder if `to_run`. Each command runs
    before the next line is read, because a line may need the files that the line before it wrote.
    """
    if len(inputs) == 1 and Path(inputs[0]).is_dir():
        _migrate_adapter(Path(inputs[0]), Path(out or f"{inputs[0].rstrip('/')}-lora"), alpha)
        return
    outcomes = list(_read(list(inputs)))
    _check(outcomes, out, to_run=to_run)
    final = max(
        (position for position, result in enumerate(outcomes, 1) if result.recipe or result.commands), default=0
    )
    rows = list[dict[str, Any]]()
    for position, result in enumerate(_read(list(inputs)) if to_run else outcomes, 1):
        target = out or (f"{result.recipe['out']}.yaml" if to_run and result.recipe else "")
        mark = "# " if result.recipe and not target else ""  # what is printed is a recipe file as it stands
        _report(result, mark)
        lines, text = result.commands, ""
        if result.recipe:
            text = as_yaml(result.recipe, result.old)
            read(text, target or "recipe.yaml")  # as `run` would, with every problem
            _output_recipe(text, target)
            lines = [["run", target or "RECIPE", *(_device_overrides(result.recipe) if to_run else [])]]
        for line in lines:
            console.info(f"{mark}  {_assignments(result)}{shlex.join(['tongwen', *line])}")
        if to_run:
            os.environ.update(result.environment)
        for number, line in enumerate(lines, 1):
            yield line, position == final and number == len(lines)
        rows.append({**dataclasses.asdict(result), "commands": [["tongwen", *line] for line in lines], "text": text})
    if not to_run:  # otherwise the commands print their own JSON
        console.emit({"migrated": rows})


def _check(outcomes: Sequence[MigrationResult], out: str, *, to_run: bool) -> None:
    """Raise RecipeError when the options do not fit the old commands."""
    if out and sum(bool(result.recipe) for result in outcomes) > 1:
        raise RecipeError(
            _("the result is several recipes, but --out names one file"),
            place=out,
            remedy=_("omit --out"),
        )
    if to_run and any(result.launch for result in outcomes):
        raise RecipeError(
            _("a run on several machines has to be started with torchrun on each of them"),
            place="--run",
            remedy=_("omit --run: the command is printed"),
        )


def _migrate_adapter(folder: Path, out: Path, alpha: float | None) -> None:
    from tongwen.model.adapters.legacy import convert_legacy_adapter

    originals.clear_path(out, [str(folder)], again=False)
    made = convert_legacy_adapter(folder, out, alpha)
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    console.success(f"{out} · r {config['r']}, alpha {config['lora_alpha']:g}: {', '.join(config['target_modules'])}")
    console.info(f"  tongwen merge --base BASE --adapter {out} --out MODEL")
    console.emit({"out": str(out), "config": config, "fingerprint": made.fingerprint})


def _read(inputs: list[str]) -> Iterator[MigrationResult]:
    """Read configuration files, all commands of a script, or one command, depending on the first argument."""
    if not inputs:
        raise RecipeError(
            _("give a file or a command"),
            place="tongwen migrate",
            remedy="tongwen migrate run_config/Bloom_config.json   |   tongwen migrate -- torchrun finetune.py …",
        )
    first = Path(inputs[1] if inputs[0] in SHELLS and len(inputs) > 1 else inputs[0])
    if first.suffix in CONFIGURATIONS:
        yield migrate_files(inputs, current_id)
    elif first.suffix in SCRIPTS:
        try:
            text = first.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(_("cannot be read: {error}").format(error=error), place=str(first)) from None
        yield from (migrate_command(line.arguments, current_id) for line in read_script(text, str(first)))
    else:
        yield migrate_command(inputs, current_id)


def _report(result: MigrationResult, mark: str) -> None:
    """Print what became of the old command. mark: what each line begins with."""
    console.header(mark + result.project, result.old)
    for note in result.notes:
        console.show(console.styled(mark, ("!", "yellow"), f" {note}"), soft_wrap=True)
    verdicts = {
        "kept": _("kept"),
        "renamed": _("renamed"),
        "mended": _("mended"),
        "dropped": _("dropped"),
    }
    for verdict in result.verdicts:
        flag = verdict.flag if verdict.value is None else f"{verdict.flag} {verdict.value}"
        new = f" → {verdict.becomes}" if verdict.becomes else ""
        why = f"  ({verdict.why})" if verdict.why else ""
        console.info(f"{mark}  {verdicts[verdict.verdict]}  {flag}{new}{why}")
    if result.instead:
        console.info(f"{mark}  {result.instead}")
    if result.launch:
        options = " ".join(f"--{name} {value}" for name, value in result.launch.items())
        if "nnodes" in result.launch:
            console.info(mark + _("on each machine:"))
        console.info(f"{mark}  {_assignments(result)}torchrun {options} -m tongwen run RECIPE")


def _assignments(result: MigrationResult) -> str:
    """Return the variables in front of a command, as a shell reads them."""
    return "".join(f"{name}={shlex.quote(value)} " for name, value in result.environment.items())


def _output_recipe(text: str, target: str) -> None:
    """Print the recipe, or write it unless another file is in the way."""
    if not target:
        for line in text.splitlines():
            console.info(line)
        return
    originals.write_new(Path(target), text)
    console.success(target)


def _device_overrides(recipe: dict[str, Any]) -> list[str]:
    """Return overrides for a machine with fewer devices than the old command used; the batch size stays the same."""
    import torch

    available = max(torch.accelerator.device_count(), 1)
    if recipe.get("devices", 1) <= available:
        return []
    console.notice(
        _("devices: {here}, not {devices}: this machine has no more; the batch size stays the same").format(
            here=available, devices=recipe["devices"]
        )
    )
    engines = [f"{section}.engine=auto" for section in ("pretrain", "sft") if available == 1 and section in recipe]
    return [f"devices={available}", *engines]
