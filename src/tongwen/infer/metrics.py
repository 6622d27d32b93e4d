"""Metrics: each one counts something per row and computes its figures from the sums of these counts.

Because a figure needs only sums over rows, the bootstrap is the same for every metric, including BLEU and F1: draw rows again,
sum, and compute the figures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from tongwen.core.errors import MissingPackage
from tongwen.core.i18n import _
from tongwen.infer import entities

DRAWS = 1000  # resamples of the bootstrap


class AnsweredPrompt(NamedTuple):
    """One row: the question, the model's answer, and the answer in the data."""

    question: str
    answer: str
    wanted: str


@dataclass(frozen=True)
class Metric:
    """count: a row -> its K counts; figures: their sums (K,) -> named figures, the main one first; check: a reference answer ->
    its problem, or "" """

    count: Callable[[AnsweredPrompt], Sequence[float]]
    figures: Callable[[np.ndarray], dict[str, float]]
    check: Callable[[str], str] = lambda wanted: ""


def without_thinking(text: str) -> str:
    """Return the answer after its thinking; "" if the thinking never ended."""
    after = text.rpartition("</think>")[2]
    return re.sub(r"<think>.*", "", after, flags=re.DOTALL).strip()


# -- figures and their spread --------------------------------------------------------------------------------------


def summarise(counts: np.ndarray, figures: Callable[[np.ndarray], dict[str, float]]) -> dict[str, Any]:
    """Return the main figure `value` with its 95 % interval `low`, `high`; all figures; the number of rows. counts: (N, K)"""
    totals = figures(counts.sum(axis=0))
    main = next(iter(totals))
    low, high = _interval([figures(sums)[main] for sums in _drawn(len(counts)) @ counts])
    return {"value": totals[main], "low": low, "high": high, "rows": len(counts), "figures": totals}


def compare(
    before: np.ndarray, after: np.ndarray, figures: Callable[[np.ndarray], dict[str, float]]
) -> dict[str, float]:
    """Return the main figure's change, after - before, with its 95 % interval; rows are drawn in pairs. (N, K) each"""
    main = next(iter(figures(after.sum(axis=0))))

    def difference(old: np.ndarray, new: np.ndarray) -> float:
        return figures(new)[main] - figures(old)[main]

    draws = _drawn(len(before))
    low, high = _interval([difference(*pair) for pair in zip(draws @ before, draws @ after, strict=True)])
    return {"value": difference(before.sum(axis=0), after.sum(axis=0)), "low": low, "high": high}


def _drawn(rows: int) -> np.ndarray:
    """Return (DRAWS, N): how often each draw contains each row; deterministic for a given number of rows."""
    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), DRAWS)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


# -- texts ---------------------------------------------------------------------------------------------------------


def _is_same(row: AnsweredPrompt) -> Sequence[float]:
    return float(row.answer.strip() == row.wanted.strip()), 1.0


def _share(name: str, sums: np.ndarray) -> dict[str, float]:
    return {name: float(sums[0] / max(sums[-1], 1))}


def _bleu_counts(row: AnsweredPrompt) -> Sequence[float]:
    """Return matching and total n-grams of four orders, and both lengths, in the tokens of sacrebleu's `zh`."""
    found = _bleu().sentence_score(row.answer, [row.wanted])
    return *found.counts, *found.totals, found.sys_len, found.ref_len


def _bleu_of(sums: np.ndarray) -> dict[str, float]:
    totals = [int(count) for count in sums]
    score = _bleu().compute_bleu(totals[:4], totals[4:8], totals[8], totals[9], smooth_method="exp")
    return {"bleu": float(score.score)}


@cache
def _bleu() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise _missing("sacrebleu", "BLEU") from None
    return BLEU(tokenize="zh", effective_order=True)


ROUGE = ("rougeL", "rouge1", "rouge2")


def _rouge_counts(by_words: bool, row: AnsweredPrompt) -> Sequence[float]:
    scores = _rouge(by_words).score(row.wanted, row.answer)
    return *(scores[name].fmeasure for name in ROUGE), 1.0


def _rouge_of(sums: np.ndarray) -> dict[str, float]:
    return {name: float(total / max(sums[-1], 1)) for name, total in zip(ROUGE, sums, strict=False)}


@cache
def _rouge(by_words: bool) -> Any:
    """Return ROUGE over the tokens of BLEU's `zh` (characters; words in other scripts), or over jieba's words."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh
    except ImportError as error:
        raise _missing(str(error.name), "ROUGE") from None
    characters: Any = TokenizerZh()  # type: ignore[no-untyped-call]
    return RougeScorer(ROUGE, tokenizer=_Cut(_jieba() if by_words else lambda text: characters(text).split()))


def _jieba() -> Callable[[str], list[str]]:
    import logging

    try:
        import jieba
    except ImportError:
        raise _missing("jieba", _("Chinese word segmentation")) from None
    jieba.setLogLevel(logging.ERROR)
    return lambda text: [word for word in jieba.lcut(text) if word.strip()]


class _Cut:
    """rouge-score's tokenizer interface."""

    def __init__(self, tokenize: Callable[[str], list[str]]) -> None:
        self.tokenize = tokenize


def _missing(package: str, needed_for: str) -> MissingPackage:
    return MissingPackage(package.split(".")[0], needed_for, "evaluate")


# -- likelihood ----------------------------------------------------------------------------------------------------


def _bits_of(sums: np.ndarray) -> dict[str, float]:
    """Return the figures from sums of (nats of the text, bytes, nats, tokens)."""
    text, size, nats, tokens = map(float, sums)
    loss = nats / max(tokens, 1)
    return {"bits_per_byte": text / (math.log(2) * max(size, 1)), "perplexity": math.exp(min(loss, 700)), "loss": loss}


def _perplexity_of(sums: np.ndarray) -> dict[str, float]:
    """Return the same figures with perplexity first. It is per token: compare it only under one tokenizer."""
    found = _bits_of(sums)
    return {"perplexity": found.pop("perplexity"), **found}


LIKELIHOOD = {"bits_per_byte": _bits_of, "perplexity": _perplexity_of}


def accuracy_of(sums: np.ndarray) -> dict[str, float]:
    """Return the accuracy from sums of (correct, total)."""
    return _share("accuracy", sums)


def score_of(sums: np.ndarray) -> dict[str, float]:
    """Return the mean score from sums of (a suite's score of a row, total)."""
    return _share("score", sums)


def tool_calls_of(sums: np.ndarray) -> dict[str, float]:
    """Return the shares of answers with exactly the calls of the data, with the right tools, with valid arguments, and with a
    call."""
    names = ("exact_calls", "right_tools", "valid_arguments", "called")
    return {name: float(count / max(sums[-1], 1)) for name, count in zip(names, sums, strict=False)}


TEXT = {
    "exact_match": Metric(_is_same, partial(_share, "exact_match")),
    "bleu": Metric(_bleu_counts, _bleu_of),
    "rouge": Metric(partial(_rouge_counts, False), _rouge_of),
    "rouge_words": Metric(partial(_rouge_counts, True), _rouge_of),
    "entity_f1": Metric(
        lambda row: entities.match(row.answer, row.wanted), entities.f1_of, entities.check
    ),
    "spans": Metric(
        lambda row: entities.match_spans(row.question, row.answer, row.wanted), entities.f1_of, entities.check
    ),
}  # fmt: skip
