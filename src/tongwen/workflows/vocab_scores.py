"""A model with a larger vocabulary before any training: its new rows, and its bits per byte.

Scoring needs the whole model in memory; if it does not fit, a notice says so and nothing is scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core.i18n import _
from tongwen.model.loading import load
from tongwen.model.merging import resize
from tongwen.vocab import grow, measure
from tongwen.workflows.tokenizer_files import ExtendedTokenizer, TokenizerFiles

SCORED = 8_000  # characters that are scored: half a minute for a small model on a CPU
CHUNK = 400  # characters of a scored text


def iter_rows(
    kind: str, extended: ExtendedTokenizer, rows: resize.RowPlan, seed: int, read: grow.ReadRows
) -> Iterator[grow.Rows]:
    """Yield the new rows of a matrix in blocks, then the padding. read: returns old rows of the matrix."""
    return grow.iter_rows(kind, extended.parts, rows.old, read, padding=rows.padding, seed=seed)


def bits_before_training(
    place: load.ModelRef, old: TokenizerFiles, extended: ExtendedTokenizer, kind: str, seed: int, texts: list[str]
) -> dict[str, Any]:
    """Return `bits_per_byte` of the base and of the extended, untrained model, on the texts and on English; an empty
    dict if the model does not fit in memory. kind: initial values of the new rows (`vocab.new_rows`)."""
    import psutil

    size = sum(file.stat().st_size for pattern in load.WEIGHTS for file in Path(place.folder).glob(pattern))
    if 2.5 * size > psutil.virtual_memory().available:
        console.notice(
            _("bits per byte are not measured: the model ({size}) does not fit in memory").format(
                size=console.human_bytes(size)
            )
        )
        return {}
    scored = _chunks(texts), _chunks([measure.ENGLISH])
    with console.waiting(_("scoring before training")):
        model = load.load_model(place, load.compute_dtype("auto", "cpu")[0])
        row_count = len(model.get_input_embeddings().weight)
        rows = resize.plan_rows(extended.first_new, extended.new_ids, row_count, 1)
        before = [_score(model, old, old.tokenizer, texts_part) for texts_part in scored]
        resize.widen_in_memory(model, rows, lambda read: iter_rows(kind, extended, rows, seed, read))
        after = [_score(model, extended.files, old.tokenizer, texts_part) for texts_part in scored]
    return {
        "bits_per_byte": {
            _("base"): before[0],
            _("extended, untrained"): after[0],
            _("base, English"): before[1],
            _("extended, untrained, English"): after[1],
        }
    }


def damage_of(bits: dict[str, float] | None) -> float | None:
    """Return the relative rise of the bits per byte on the target's texts; None if nothing was measured."""
    if not bits:
        return None
    before, after, *_unused = bits.values()
    return after / before - 1


def _chunks(texts: list[str]) -> list[str]:
    """Return pieces of CHUNK characters, spread evenly over the texts, about SCORED characters in all."""
    whole = "\n".join(texts)
    chunks = [whole[begin : begin + CHUNK] for begin in range(0, len(whole), CHUNK)]
    return chunks[:: max(1, len(whole) // SCORED)]


def _score(model: Any, files: TokenizerFiles, tokenizer: Any, texts: list[str]) -> float:
    """Return the bits per byte of texts, each scored alone after the token that begins a text."""
    import torch

    from tongwen.model.kernels.loss import bits_per_byte

    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    coder = files.coder
    sizes = torch.tensor([len(piece) for piece in coder.token_bytes])

    def batches() -> Iterator[dict[str, Any]]:
        for ids in coder.encode(texts):
            whole = torch.tensor([[start, *ids] if start is not None else ids])
            count = whole.shape[1] - 1
            yield {"input_ids": whole, "rows": torch.arange(count), "targets": whole[0, 1:], "learned": count}

    return bits_per_byte(model, batches(), sizes)["bits_per_byte"]
