"""check: read and clean the recipe's data as `prepare` would, without writing anything. Needs no model and no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core import artifact, console
from tongwen.core.errors import DataError, RecipeError, TongwenError, raise_all
from tongwen.core.i18n import _
from tongwen.data import prepare_steps
from tongwen.data.clean import Cleaner
from tongwen.data.input_parts import KINDS, InputPart, list_parts
from tongwen.data.ledger import table_rows
from tongwen.data.sampling import choose_held_out
from tongwen.export.gguf import check_type
from tongwen.export.gguf_metadata import check_family
from tongwen.hub.download import local_copy
from tongwen.model.loading.config_json import check_trainable, check_unquantised, read_text_type
from tongwen.model.loading.instruct import stored_template
from tongwen.model.loading.loader_errors import explain_errors
from tongwen.model.loading.model_ref import ModelRef
from tongwen.recipe.data import Prepare
from tongwen.recipe.schema import Recipe
from tongwen.train import trackers
from tongwen.workflows.pipeline import check_machine, check_processes
from tongwen.workflows.run_folder import check_folder
from tongwen.workflows.stage_inputs import advise_keep, inputs


def run(recipe: Recipe) -> int:
    console.emit(check_recipe(recipe))
    return 0


def check_recipe(recipe: Recipe) -> dict[str, Any]:
    """Report what `prepare` would keep before it compares the rows, and every problem of the data at once.

    Returns the name, the stages, and the ledger of each kind of data."""
    console.header("check", recipe.name)
    errors: list[TongwenError] = []
    try:
        check_processes(recipe, recipe.stages)
    except RecipeError as error:  # a launcher may still start the processes
        console.notice(error.text())
    for check in (_check_folder, _check_machine, _check_base, _check_export, _check_trackers):
        try:
            check(recipe)
        except TongwenError as error:
            errors.append(error)
    tables = {}
    section = inputs(recipe) if recipe.prepare else None
    all_parts = list_parts(section, local_copy, console.notice, errors) if section else []
    for kind in KINDS:
        parts = [part for part in all_parts if part.kind == kind]
        if not parts:
            continue
        assert section
        try:
            tally = _read(parts, section, errors)
            if not errors and any(part.role == "train" for part in parts):
                if not isinstance(section.held_out, str):
                    everything = np.ones(tally.ledger.kept, bool)
                    choose_held_out(everything, section.held_out, recipe.seed, section.held_out_at_most)
                tables[kind] = {**tally.ledger.to_dict(), "rejected": tally.bad}
        except DataError as error:
            errors.append(error)
    raise_all(errors)
    if recipe.pretrain:
        advise_keep(recipe.base, stored_template(Path(recipe.base)), recipe.pretrain)
    rows = [row for kind, table in tables.items() for row in table_rows(table, kind, _("kept"))]
    console.table((_("data"), _("rows"), _("bytes")), rows)
    console.success(_("stages: {stages}").format(stages=_(", ").join(recipe.stages)))
    return {"name": recipe.name, "stages": recipe.stages, "data": tables}


def _check_folder(recipe: Recipe) -> None:
    """Raise for an output folder in which `run` would replace what tongwen did not write."""
    check_folder(recipe, [name for name in recipe.stages if not artifact.find(Path(recipe.out) / name)])


def _check_machine(recipe: Recipe) -> None:
    """Raise for more processes than this machine can carry."""
    check_machine(recipe, recipe.stages)


def _check_base(recipe: Recipe) -> None:
    """Raise for a base that no training stage could train. Only a local base is checked."""
    model_ref = ModelRef(recipe.base, recipe.base)
    with explain_errors(model_ref):
        if recipe.training:
            check_trainable(model_ref)
        if recipe.merge:
            check_unquantised(model_ref)


def _check_export(recipe: Recipe) -> None:
    """Raise for a GGUF file that `export` could not write. Only a local base is checked; `plan` checks one on a hub."""
    if recipe.export is None or "gguf" not in recipe.export.formats:
        return
    check_type(recipe.export.quantize)
    model_ref = ModelRef(recipe.base, recipe.base)
    with explain_errors(model_ref):
        kind = read_text_type(model_ref)
    if kind:
        check_family(kind, f"{recipe.out}/merge")


def _check_trackers(recipe: Recipe) -> None:
    """Raise for an experiment tracker under `track` that could not start."""
    if recipe.training:
        trackers.check(recipe.track)


def _read(parts: list[InputPart], section: Prepare, errors: list[TongwenError]) -> prepare_steps.ScanCounts:
    """Read all files of one kind and return the counts of the training rows. Raises DataError if too many rows of any role
    are unreadable; errors of whole files are added to `errors`."""
    tallies = {role: prepare_steps.ScanCounts() for role in ("held_out", "evaluation", "train")}
    for role, tally in tallies.items():
        for part in (one for one in parts if one.role == role):
            try:
                for raw, record in prepare_steps.iter_rows(
                    part, section, Cleaner(section.clean, part.kind), console.notice
                ):
                    tally.count(raw, record)
            except DataError as error:
                errors.append(error)
        ledger = tally.ledger
        if ledger.items_in:
            prepare_steps.check_losses(
                ledger.items_in, ledger.kept, tally.bad, tally.first_bad, section.max_bad, parts[0].kind
            )
        for place, rule in tally.first_bad[:3]:
            console.notice(f"{place}: {rule}")
        if notice := prepare_steps.describe_unread(tally.unread):
            console.notice(notice)
    return tallies["train"]
