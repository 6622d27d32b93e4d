"""Encode preferences: both answers of a pair with the same prompt, or neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice

from tongwen.core.chat_template import Template
from tongwen.core.errors import RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Preference
from tongwen.data.encoded_samples import BATCH, EncodedSample, make_batch, reason_unfit
from tongwen.data.encoder import Encoder
from tongwen.data.ledger import Ledger, RejectedRow
from tongwen.data.token_store import Batch
from tongwen.recipe.training import Sft


def encode_preferences(
    preferences: Iterable[Preference],
    template: Template,
    encoder: Encoder,
    section: Sft,
    paired: bool,
    ledger: Ledger,
    reject: Callable[[RejectedRow], None],
) -> Iterator[Batch]:
    """Yield the samples of the preferences, in batches: of a pair the chosen one, then the rejected one. Both are kept, or
    neither is. paired: reject answers with a label, which have no partner."""
    stream = iter(preferences)
    while chunk := list(islice(stream, BATCH)):
        dialogues = [dialogue for preference in chunk for dialogue in preference.dialogues]
        rendered = template.samples_of_each(dialogues, section.learn, section.thinking)
        encoded = iter(encoder.encode([each.spans for found in rendered if isinstance(found, list) for each in found]))
        kept: list[EncodedSample] = []
        number = 0
        for preference in chunk:
            samples, reason, rule = list[EncodedSample](), "", ""
            for place in range(number, number + len(preference.dialogues)):
                found = rendered[place]
                if isinstance(found, RowRejected):
                    reason, rule = found.reason, found.rule
                    continue
                for each in found:
                    pieces = next(encoded)
                    if any(piece.learn for piece in pieces):
                        size = sum(len(piece.ids) for piece in pieces)
                        samples.append(EncodedSample(place, pieces, each.learns_to_stop, size))
            number += len(preference.dialogues)
            size = sum(sample.size for sample in samples)
            ledger.enter(size)
            if not reason:
                reason, rule = _reason_unfit_preference(preference, samples, section.max_length, paired)
            if reason:
                ledger.lose(reason, size)
                reject(RejectedRow(preference.origin, reason, rule, preference.to_dict()))
            else:
                ledger.keep(size)
                kept += samples
        yield replace(make_batch(kept, dialogues), rows=len(chunk))


def _reason_unfit_preference(
    preference: Preference, samples: list[EncodedSample], max_length: int, paired: bool
) -> tuple[str, str]:
    """Return (reason, rule) why a preference cannot be trained on: "" if it can."""
    if paired and not preference.is_pair:
        return "unpaired", _("this answer has a label and no partner; only `method: kto` learns from it")
    for sample in samples:
        if (unfit := reason_unfit(sample, max_length))[0]:
            return unfit
    if len(samples) != len(preference.dialogues):
        return "answer_split", _("the template renders the turns of this answer apart from each other")
    if len({tuple(int(index) for index in _prompt_ids(sample)) for sample in samples}) > 1:
        return "prompts_differ", _("the template renders the prompt differently for the two answers")
    if preference.is_pair and _all_ids(samples[0]) == _all_ids(samples[1]):
        return "equal_answers", _("both answers have the same tokens")
    return "", ""


def _prompt_ids(sample: EncodedSample) -> list[int]:
    """Return the ids ahead of the first learned one."""
    ids: list[int] = []
    for piece in sample.pieces:
        if piece.learn:
            break
        ids += piece.ids
    return ids


def _all_ids(sample: EncodedSample) -> list[int]:
    return [int(index) for piece in sample.pieces for index in piece.ids]
