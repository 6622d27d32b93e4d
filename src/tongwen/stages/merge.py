"""merge: merge the adapters of the run's training stages into their base; write a Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact
from tongwen.recipe.schema import Recipe
from tongwen.workflows.stage_inputs import base_of_stage


def settings(recipe: Recipe) -> dict[str, Any]:
    assert recipe.merge
    return {"merge": recipe.merge.model_dump(mode="json"), "base": recipe.base}


def check_ahead(recipe: Recipe) -> None:
    """Raise ModelError now, before training, for a base whose stored weights cannot be changed."""
    from tongwen.model.loading.architecture import load_config
    from tongwen.model.loading.config_json import check_unquantised
    from tongwen.model.loading.locate import locate

    place = locate(recipe.base)
    check_unquantised(place, load_config(place).to_dict())


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Merge the adapters of the run's training stages into the model below them."""
    from tongwen.workflows.merging import MergeOptions, merge

    section = recipe.merge
    assert section
    last = Path(base_of_stage(recipe, "merge"))
    trained = artifact.open_artifact(last, last.name)
    options = MergeOptions(section.dtype, parity=section.parity, onto=section.onto, shard_gb=section.shard_gb)
    base = str(trained.manifest["parents"]["base"]["path"])
    return merge(base, [str(trained.path)], out, settings(recipe), options)
