"""evaluate: score the run's model and its base on tasks; write `scores.json`, the scored rows and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.errors import DataError
from tongwen.core.i18n import _
from tongwen.recipe.data import SourceConfig
from tongwen.recipe.outputs import TaskConfig
from tongwen.recipe.schema import Recipe
from tongwen.workflows.stage_inputs import base_of_stage, open_model_before


def settings(recipe: Recipe) -> dict[str, Any]:
    assert recipe.evaluate
    return {
        "evaluate": recipe.evaluate.model_dump(mode="json"),
        "from": Path(base_of_stage(recipe, "evaluate")).name,
        "base": recipe.base,
    }


def check_ahead(recipe: Recipe) -> None:
    """Check nothing: the tasks are read when the model exists."""


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Evaluate the model of the stages before, and the base."""
    from tongwen.workflows.evaluation import read_task
    from tongwen.workflows.scoring import EvaluatedModel, evaluate_models, keep_answers

    section = recipe.evaluate
    assert section
    finished = base_of_stage(recipe, "evaluate")
    model = {"path": recipe.base}
    if finished != recipe.base:
        model = open_model_before(recipe, "evaluate").as_parent()
    tasks = [read_task(_held_out(recipe, task) if task.needs_data else task) for task in section.tasks]
    template = "own" if recipe.sft or recipe.prefer else "auto"
    after = EvaluatedModel(model["path"], template=template)
    before = None
    if section.before and finished != recipe.base:
        taught = recipe.sft or recipe.prefer
        base_template = taught.template if taught else template
        before = EvaluatedModel(recipe.base, template=base_template, optional=True)
    with keep_answers(out) as kept, artifact.create(out, "evaluate", {"model": model}, settings(recipe)) as draft:
        draft.facts["scores"] = evaluate_models(tasks, after, before, section, kept, draft.path)
    console.success(str(out / "report.html"))
    assert draft.artifact
    return draft.artifact


def _held_out(recipe: Recipe, task: TaskConfig) -> TaskConfig:
    """Return the task with the held-out data: dialogues if the run fine-tunes, else documents."""
    kind = "dialogues" if recipe.sft else "documents"
    file = Path(recipe.out) / "prepare" / f"{kind}.held_out.jsonl"
    if not file.is_file() or not file.stat().st_size:
        raise DataError(
            _("there is no held-out data to score"),
            place=f"evaluate: {task.title}",
            remedy="prepare: {held_out: 0.02}   evaluate: {tasks: [{task: …, data: FILE}]}",
        )
    return task.model_copy(update={"data": SourceConfig(path=str(file))})
