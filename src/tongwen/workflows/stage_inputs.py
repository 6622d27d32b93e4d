"""The inputs of a stage: the base or the model of an earlier stage, the available data, and the settings that decide a
training's result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.i18n import _
from tongwen.model.loading.instruct import is_instruct
from tongwen.recipe.data import Prepare
from tongwen.recipe.effects import deciding_settings
from tongwen.recipe.schema import STAGES, Recipe
from tongwen.recipe.training import Pretrain, Training

TRAINING = ("pretrain", "sft", "prefer")  # stages that run on all devices; `prefer` on one
MODELS = ("vocab", "pretrain", "sft", "prefer", "merge")  # stages that leave a model, each based on the one before


def base_of_stage(recipe: Recipe, stage: str, *, finished: bool = False) -> str:
    """Return the model that a stage starts from: the output of the last model stage before it, else the recipe's base.

    finished: consider only finished stages, for commands that write nothing.
    """
    before = [name for name in MODELS if name in recipe.stages and STAGES.index(name) < STAGES.index(stage)]
    for name in reversed(before):
        folder = Path(recipe.out) / name
        if not finished or artifact.find(folder):
            return str(folder)
    return recipe.base


def training_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the settings that decide a training stage's result."""
    section: Training = getattr(recipe, stage)
    return {stage: deciding_settings(section), "seed": recipe.seed, "base": base_of_stage(recipe, stage)}


def open_model_before(recipe: Recipe, stage: str) -> artifact.Artifact:
    """Open the model that a stage after training starts from. Raises ArtifactError if it is not finished."""
    folder = Path(base_of_stage(recipe, stage))
    return artifact.open_artifact(folder, "model" if recipe.merge else folder.name)


def inputs(recipe: Recipe) -> Prepare:
    """Return the `prepare` section for commands that write nothing: data not yet synthesized is left out."""
    assert recipe.prepare
    made = Path(recipe.out) / "synthesize" / "dialogues.jsonl"
    if recipe.synthesize is None or made.exists():
        return recipe.prepare
    console.notice(_("synthesize has not generated its data yet"))
    existing = [source for source in recipe.prepare.dialogues if Path(source.path) != made]
    return recipe.prepare.model_copy(update={"dialogues": existing})


def advise_keep(base: str, template: str, section: Pretrain) -> None:
    """Print a notice if the base is an instruct model: training on plain text weakens its ability to answer."""
    if not section.keep and is_instruct(base, template):
        console.notice(
            _(
                "the base is an instruct model, and plain text wears down its ability to answer: `keep: 0.5` holds on to it. Or pre-train its base model, then add what the instruct model learned (tongwen merge --base RESULT --chat-vector INSTRUCT BASE), or run `sft` afterwards"
            )
        )
