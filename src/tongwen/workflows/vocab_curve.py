"""What more pieces are worth for a model: the curve of a tokenizer's growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tongwen.model.loading.architecture import count_body, load_config
from tongwen.model.loading.locate import locate
from tongwen.vocab.measure import CURVE, NOMINAL, SEEN_ENOUGH, CurvePoint, ModelSize, make_curve
from tongwen.workflows.vocab_pieces import LearnedPieces


def curve(
    learned_pieces: LearnedPieces, rest: list[str], shape: ModelSize, steps: Sequence[int] = CURVE
) -> tuple[CurvePoint, list[CurvePoint]]:
    """Measure the tokenizer with more and more pieces on texts that were not learned from."""
    points = []
    for step in _reached(steps, len(learned_pieces)):
        extended = learned_pieces.extended(step)
        seen = sum(count >= SEEN_ENOUGH for count in extended.seen)
        points.append((step, extended.files.coder, seen))
    return make_curve(learned_pieces.base.coder, shape, rest, points)


def _reached(steps: Sequence[int], most: int) -> list[int]:
    """Return the steps that the corpus has pieces for, and the number of its pieces if it has fewer."""
    return sorted({min(step, most) for step in steps} - {0})


def shape_of(name: str) -> ModelSize:
    """Return the size of the model, which decides a token's cost; a nominal size without a model."""
    if Path(name).is_file() and Path(name).suffix != ".gguf":
        return NOMINAL
    place = locate(name)
    if place.is_local and not (Path(place.folder) / "config.json").is_file() and not place.gguf:
        return NOMINAL
    config = load_config(place)
    body, width = count_body(config)
    return ModelSize(name, body, width)
