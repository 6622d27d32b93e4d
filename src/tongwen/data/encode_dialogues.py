"""Encode dialogues: each sample with its loss mask, shortened or rejected when it is too long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from tongwen.core.chat_template import Template
from tongwen.core.errors import RowRejected
from tongwen.core.records import Dialogue, Message
from tongwen.core.rendered_sample import RenderedSample
from tongwen.data.encoded_samples import BATCH, EncodedSample, make_batch, reason_unfit, without_gc
from tongwen.data.encoder import Encoder
from tongwen.data.ledger import Ledger, RejectedRow
from tongwen.data.token_store import Batch
from tongwen.recipe.training import Sft


def encode_dialogues(
    dialogues: Iterable[Dialogue],
    template: Template,
    encoder: Encoder,
    section: Sft,
    ledger: Ledger,
    reject: Callable[[RejectedRow], None],
) -> Iterator[Batch]:
    """Yield the samples of the dialogues, in batches. `sft.too_long` decides about samples that are too long; `reject` gets
    the samples that cannot be trained, and the ledger counts them. A row counts as kept when at least one of its samples
    is kept; tokens are counted per sample. The stop token is never cut off."""
    stream = iter(dialogues)
    while True:
        with without_gc():
            chunk = list(islice(stream, BATCH))
            if not chunk:
                return
            batch = make_batch(_trainable_samples(chunk, template, encoder, section, ledger, reject), chunk)
        yield batch


def _trainable_samples(
    chunk: list[Dialogue],
    template: Template,
    encoder: Encoder,
    section: Sft,
    ledger: Ledger,
    reject: Callable[[RejectedRow], None],
) -> list[EncodedSample]:
    """Return the trainable samples of some dialogues; reject the others."""
    rendered: list[tuple[int, RenderedSample]] = []
    for number, found in enumerate(template.samples_of_each(chunk, section.learn, section.thinking)):
        if isinstance(found, RowRejected):
            dialogue = chunk[number]
            ledger.enter(0)
            ledger.lose(found.reason, 0)
            reject(RejectedRow(dialogue.origin, found.reason, found.rule, dialogue.to_dict()))
        else:
            rendered += [(number, sample) for sample in found]
    encoded = encoder.encode([sample.spans for _, sample in rendered])
    samples = [
        EncodedSample(
            number,
            pieces,
            sample.learns_to_stop and encoder.keeps_stop(pieces),
            sum([len(piece.ids) for piece in pieces]),
        )
        for (number, sample), pieces in zip(rendered, encoded, strict=True)
    ]
    shares = np.bincount([sample.dialogue for sample in samples], minlength=len(chunk)).tolist()
    ledger.enter(sum(sample.size for sample in samples), items=sum(map(bool, shares)))
    kept, reasons = [], {}
    for sample in samples:
        reason, rule = reason_unfit(sample, section.max_length)
        if reason == "too_long" and section.too_long != "reject" and shares[sample.dialogue] == 1:
            shorter, lost = _shorten(chunk[sample.dialogue], sample, template, encoder, section)
            ledger.lose(lost, sample.size - shorter.size, items=0)
            sample = shorter
            reason, rule = reason_unfit(sample, section.max_length)
        if reason:
            dialogue = chunk[sample.dialogue]
            reasons[sample.dialogue] = reason
            ledger.lose(reason, sample.size, items=0)
            reject(RejectedRow(dialogue.origin, reason, rule, dialogue.to_dict()))
        else:
            kept.append(sample)
    taken = {sample.dialogue for sample in kept}
    ledger.keep(sum(sample.size for sample in kept), items=len(taken))
    for number, reason in reasons.items():
        if number not in taken:
            ledger.lose(reason, 0)
    return kept


def _shorten(
    dialogue: Dialogue, sample: EncodedSample, template: Template, encoder: Encoder, section: Sft
) -> tuple[EncodedSample, str]:
    """Shorten a dialogue to max_length: drop its oldest turns, or cut the end of its longest question; its answer and stop
    token stay whole. Return (sample, the ledger's reason for the loss); the sample is unchanged if that is impossible."""

    def fitting(messages: Sequence[Message]) -> EncodedSample | None:
        try:
            samples = template.samples(replace(dialogue, messages=tuple(messages)), section.learn, section.thinking)
        except RowRejected:
            return None
        pieces = encoder.encode([samples[0].spans])[0]
        size = sum(len(piece.ids) for piece in pieces)
        return sample._replace(pieces=pieces, size=size) if size <= section.max_length and len(samples) == 1 else None

    head = [message for message in dialogue.messages if message.role == "system"]
    turns = list(dialogue.messages[len(head) :])
    asks = [place for place, message in enumerate(turns) if message.role == "user"]
    for place in asks[1:]:
        if found := fitting([*head, *turns[place:]]):
            return found, "turns_dropped"
    if section.too_long != "cut_prompt" or not asks:
        return sample, "too_long"
    turns = turns[asks[-1] :]
    longest = max(range(len(turns)), key=lambda place: len(turns[place].content) * (turns[place].role != "assistant"))
    whole = turns[longest].content
    least, most = 0, len(whole)  # the longest beginning that fits lies in [least, most)
    best = None
    while most - least > 1:
        middle = (least + most) // 2
        turns[longest] = replace(turns[longest], content=whole[:middle])
        if found := fitting([*head, *turns]):
            best, least = found, middle
        else:
            most = middle
    return best or sample, "prompt_cut"
