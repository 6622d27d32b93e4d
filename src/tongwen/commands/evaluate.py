"""evaluate: a model and tasks in; scores out, and a folder with the rows behind them where one is named."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tongwen.core import artifact, console
from tongwen.recipe.schema import Recipe
from tongwen.workflows.evaluation import read_task
from tongwen.workflows.scoring import EvaluatedModel, examine, keep_answers


def run(
    recipe: Recipe, adapters: Sequence[str], *, before: str, template: str, thinking: str, weights: str, out: str
) -> int:
    """Examine the model that the recipe calls its base, with adapters; keep the result where `out` says."""
    assert recipe.evaluate
    if out:
        artifact.clear_path(Path(out), again=False)
    papers = [read_task(task) for task in recipe.evaluate.tasks]
    sitter = EvaluatedModel(recipe.base, tuple(adapters), template, thinking, weights)
    first = EvaluatedModel(before, (), template, thinking, weights) if before else None
    if not out:
        with tempfile.TemporaryDirectory() as kept:
            examine(papers, sitter, first, recipe.evaluate, Path(kept), None)
        return 0
    parents, folder = {"model": {"path": sitter.name}} | ({"before": {"path": before}} if before else {}), Path(out)
    with (
        keep_answers(folder) as answers,
        artifact.create(folder, "evaluate", parents, recipe.evaluate.model_dump(mode="json")) as draft,
    ):
        draft.facts["scores"] = examine(papers, sitter, first, recipe.evaluate, answers, draft.path)
    console.success(str(folder / "report.html"))
    return 0
