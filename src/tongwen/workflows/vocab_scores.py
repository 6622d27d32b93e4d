"""A model with a larger vocabulary before any training: its new rows, and its bits per byte.

Scoring and matching need the whole model in memory; if it does not fit, a notice says so and nothing is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tongwen.core import console
from tongwen.core.i18n import _
from tongwen.model.loading import devices, load
from tongwen.model.loading.locate import WEIGHTS
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.merging import resize
from tongwen.vocab import grow, measure
from tongwen.workflows.tokenizer_files import TokenizerFiles
from tongwen.workflows.vocab_pieces import ExtendedTokenizer

if TYPE_CHECKING:
    from tongwen.workflows.matched_rows import MatchedRows

SCORED = 8_000  # characters that are scored: half a minute for a small model on a CPU
CHUNK = 400  # characters of a scored text
MATCHED = "matched"


@dataclass(frozen=True)
class NewRows:
    """How the rows of new tokens are made.

    kind: one of `grow.KINDS`, or MATCHED with the rows themselves in `matched`
    """

    kind: str
    extended: ExtendedTokenizer
    seed: int
    matched: MatchedRows | None = None

    def blocks(self, rows: resize.RowPlan, is_head: bool, read: grow.ReadRows) -> Iterator[grow.Rows]:
        """Yield the new rows of a matrix in blocks, then the padding. read: returns old rows of the matrix."""
        if self.matched is None:
            parts = self.extended.parts
            yield from grow.iter_rows(self.kind, parts, rows.old, read, padding=rows.padding, seed=self.seed)
            return
        yield self.matched.head if is_head else self.matched.inside
        yield from grow.iter_rows("mean", (), rows.old, read, padding=rows.padding)


def make_and_score(
    place: ModelRef,
    old: TokenizerFiles,
    extended: ExtendedTokenizer,
    kind: str,
    seed: int,
    texts: list[str],
    *,
    sample: Sequence[str] = (),
    score: bool = True,
) -> tuple[NewRows, dict[str, Any]]:
    """Return (the new rows, a report on them).

    The report has `bits_per_byte` of the base and of the extended, untrained model, on the texts and on English, and with
    matched rows `matched`, what they took. Nothing is scored or matched if the model does not fit in memory.

    kind: initial values of the new rows (`vocab.new_rows`); sample: texts to match rows on
    """
    from tongwen.workflows.matched_rows import match_rows

    new = NewRows("subtoken_mean" if kind == MATCHED else kind, extended, seed)
    if not (score or kind == MATCHED) or not _fits(place, kind):
        return new, {}
    with console.waiting(_("scoring before training")):
        model = load.load_model(place, devices.compute_dtype("auto", "cpu")[0])
        scored = (_chunks(texts), _chunks([measure.ENGLISH])) if score else ()
        before = [_score(model, old, old.tokenizer, part) for part in scored]
    report: dict[str, Any] = {}
    if kind == MATCHED and (found := match_rows(model, extended, sample, _start(old.tokenizer))):
        new, report = NewRows(kind, extended, seed, found), {"matched": found.report}
    if not score:
        return new, report
    with console.waiting(_("scoring before training")):
        _grow(model, new)
        after = [_score(model, extended.files, old.tokenizer, part) for part in scored]
    bits = {
        _("base"): before[0],
        _("extended, untrained"): after[0],
        _("base, English"): before[1],
        _("extended, untrained, English"): after[1],
    }
    return new, report | {"bits_per_byte": bits}


def _fits(place: ModelRef, kind: str) -> bool:
    import psutil

    size = sum(file.stat().st_size for pattern in WEIGHTS for file in Path(place.folder).glob(pattern))
    if 2.5 * size <= psutil.virtual_memory().available:
        return True
    console.notice(
        _("bits per byte are not measured: the model ({size}) does not fit in memory").format(
            size=console.human_bytes(size)
        )
    )
    if kind == MATCHED:
        console.notice(_("for the same reason the new rows cannot be matched: they are made as by `subtoken_mean`"))
    return False


def _grow(model: Any, new: NewRows) -> None:
    row_count = len(model.get_input_embeddings().weight)
    rows, matched = resize.plan_rows(new.extended.first_new, new.extended.new_ids, row_count, 1), new.matched
    resize.widen_in_memory(
        model,
        rows,
        lambda is_head, read: new.blocks(rows, is_head, read),
        untie=bool(matched and matched.untied),
        replaced=matched.stays if matched else None,
    )


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

    start = _start(tokenizer)
    coder = files.coder
    sizes = torch.tensor([len(piece) for piece in coder.token_bytes])

    def batches() -> Iterator[dict[str, Any]]:
        for ids in coder.encode(texts):
            whole = torch.tensor([[start, *ids] if start is not None else ids])
            count = whole.shape[1] - 1
            yield {"input_ids": whole, "rows": torch.arange(count), "targets": whole[0, 1:], "learned": count}

    return bits_per_byte(model, batches(), sizes)["bits_per_byte"]


def _start(tokenizer: Any) -> int | None:
    """Return the token that begins a text."""
    start: int | None = tokenizer.bos_token_id
    return start if start is not None else tokenizer.eos_token_id
