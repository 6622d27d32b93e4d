"""evaluate: score a model on tasks; write scores, rows and a report to a folder if one is named."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tongwen.core import artifact, console, originals
from tongwen.recipe.schema import Recipe
from tongwen.workflows.evaluation import read_task
from tongwen.workflows.scoring import EvaluatedModel, evaluate_models, keep_answers


def run(
    recipe: Recipe, adapters: Sequence[str], *, before: str, template: str, thinking: str, weights: str, out: str
) -> int:
    """Evaluate the recipe's base with these adapters; write the result to `out` unless it is empty."""
    assert recipe.evaluate
    if out:
        originals.clear_path(Path(out), [recipe.base, before, *adapters], again=False)
    tasks = [read_task(task) for task in recipe.evaluate.tasks]
    model = EvaluatedModel(recipe.base, tuple(adapters), template, thinking, weights)
    model_before = EvaluatedModel(before, (), template, thinking, weights) if before else None
    if not out:
        with tempfile.TemporaryDirectory() as scratch:
            evaluate_models(tasks, model, model_before, recipe.evaluate, Path(scratch), None)
        return 0
    parents, folder = {"model": {"path": model.name}} | ({"before": {"path": before}} if before else {}), Path(out)
    with (
        keep_answers(folder) as answers,
        artifact.create(folder, "evaluate", parents, recipe.evaluate.model_dump(mode="json")) as draft,
    ):
        draft.facts["scores"] = evaluate_models(tasks, model, model_before, recipe.evaluate, answers, draft.path)
    console.success(str(folder / "report.html"))
    return 0
