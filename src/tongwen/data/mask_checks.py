"""Check the loss mask of encoded samples, describe it, and count the texts that do not decode to themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from tongwen.core.errors import DataError
from tongwen.core.i18n import _
from tongwen.core.records import Span
from tongwen.data.encoded_samples import BATCH
from tongwen.data.encoder import Encoder
from tongwen.data.token_store import TokenStore
from tongwen.recipe.training import Sft

ROUND_TRIPS = 20_000  # dialogues that are decoded again, at most: a few seconds
OF_TEMPLATE = ("part_lost", "prompt_differs", "answer_changed", "no_stop", "template_refuses", "template_fails")


def check_store(store: TokenStore, section: Sft, rejected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the statistics of the mask over all samples. rejected: the rows of rejected.jsonl. Raises DataError when no
    sample is left, or too few samples learn their stop token."""
    if not len(store):
        too_long = sum(bad["reason"] == "too_long" for bad in rejected)
        first = rejected[0] if rejected else None
        problem = _(
            "no sample is left to train on ({too_long} of {count} are longer than max_length {max_length})"
        ).format(too_long=too_long, count=len(rejected), max_length=section.max_length)
        raise DataError(
            _("{problem}; the first: {rule}").format(problem=problem, rule=first["rule"]) if first else problem,
            place=f"{first['file']}:{first['row']}" if first else "sft",
            remedy=_("; ").join(dict.fromkeys(_remedy(bad["reason"]) for bad in rejected))
            or _("shorten the samples, or raise sft.max_length"),
        )
    stops = float(np.mean(store.stops))
    if stops < section.min_stop_learned:
        raise DataError(
            _(
                "only {stops:.1%} of the samples learn their stop token; the model would not learn to end its answers"
            ).format(stops=stops),
            place="sft.learn",
            remedy=_("sft: {learn: assistant}, or lower sft.min_stop_learned"),
        )
    return describe(store)


def _remedy(reason: str) -> str:
    """Return what can be done about rows that are refused for this reason."""
    if reason == "too_long":
        return _("raise sft.max_length, or shorten the samples (sft.too_long: drop_turns or cut_prompt)")
    if reason in OF_TEMPLATE:
        return _(
            "choose an `sft.template` that renders such rows: chatml, or plain where the tokenizer lacks its tokens"
        )
    if reason == "no_thinking":
        return "sft: {thinking: mixed}"
    return _("mend these rows, or leave them out")


def describe(store: TokenStore) -> dict[str, Any]:
    """Return counts of tokens and learned tokens, and the lengths of the samples."""
    tokens, learned = len(store.ids), store.learned_tokens
    answers, learned_answers = store.roles
    return {
        "tokens": tokens,
        "learned_tokens": learned,
        "learned_share": round(learned / tokens, 6),
        "roles": {
            "assistant": {"tokens": answers, "learned": learned_answers},
            "prompt": {"tokens": tokens - answers, "learned": learned - learned_answers},
        },
        "samples": len(store),
        "stop_learned_share": round(float(np.mean(store.stops)), 6),
        "longest": int(store.lengths.max()),
        "mean_length": round(float(store.lengths.mean()), 2),
        "lengths": histogram(store.lengths),
    }


def histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Return (upper edge, number of samples in the bin); edges are powers of two."""
    edges = [16]
    while edges[-1] < int(lengths.max()):
        edges.append(2 * edges[-1])
    places = np.searchsorted(edges, lengths)
    return [(edge, int(count)) for edge, count in zip(edges, np.bincount(places, minlength=len(edges)), strict=True)]


def check_round_trip(
    records: Iterable[Any], count: int, render: Callable[[Any], Iterable[Sequence[Span]]], encoder: Encoder
) -> dict[str, int]:
    """Count the samples that do not decode to the rendered text, because the tokenizer lacks or changes characters. Prefix
    tokens and spaces are ignored. At most ROUND_TRIPS records are checked, evenly spread."""
    checked = differ = 0
    stream = islice(records, 0, None, max(1, -(-count // ROUND_TRIPS)))
    while chunk := list(islice(stream, BATCH)):
        samples = [spans for record in chunk for spans in render(record)]
        encoded = encoder.encode(samples)
        ids = [[int(index) for piece in pieces for index in piece.ids] for pieces in encoded]
        for spans, text in zip(samples, encoder.backend.decode_batch(ids, skip_special_tokens=False), strict=True):
            checked += 1
            differ += "".join("".join(span.text for span in spans).split()) not in "".join(text.split())
    return {"checked": checked, "differ": differ}
