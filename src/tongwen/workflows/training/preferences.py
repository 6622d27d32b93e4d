"""Make the training job of the `prefer` stage, and measure what it does to held-out preferences."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tongwen.core import artifact, console
from tongwen.core.errors import DataError, ModelError
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Preference
from tongwen.data.preference_store import PreferenceStore
from tongwen.model.adapters import attach
from tongwen.model.kernels.loss import learned_loss
from tongwen.model.loading import chat_setup
from tongwen.model.loading.fingerprint import fingerprint_text
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Prefer
from tongwen.train.packing import MicroBatches, fill, to_device
from tongwen.workflows.record_encoders import PreferenceEncoder, make_preference_encoder
from tongwen.workflows.stage_inputs import base_of_stage
from tongwen.workflows.tokenized_data import encode_prepared
from tongwen.workflows.training.dialogues import make_prompts
from tongwen.workflows.training.types import PreparedModel, TrainingJob

MOSTLY_LONGER = 0.7  # share of the pairs whose preferred answer is the longer one, from which a notice says so


def make_preference_job(recipe: Recipe, prepared: artifact.Artifact, tokens: Path) -> TrainingJob:
    """Encode the preferences for the `prefer` stage. tokens: the folder for the encoded data."""
    from tongwen.train.preference import TRAINERS

    section, base = recipe.prefer, base_of_stage(recipe, "prefer")
    assert section
    encoder = make_preference_encoder(base, section)
    data = encode_prepared(prepared, encoder, recipe.seed, tokens)
    store = data.store
    assert isinstance(store, PreferenceStore)
    held_out: PreferenceStore | None = data.held_out_stores.get("")
    preferred = held_out.preferred() if held_out else None
    _check_labels(store)
    lengths = compare_lengths(store)
    notices = _notices(encoder, section, data.rejected, lengths)
    for notice in notices:
        console.notice(notice)
    return TrainingJob(
        recipe=recipe,
        stage="prefer",
        prepared=prepared,
        record_encoder=encoder,
        data=replace(data, held_out_stores={"": preferred} if preferred else {}, notices=data.notices + notices),
        prompts=make_prompts(_preferred_dialogues(data.held_out), encoder, section.samples),
        find_rows=partial(_refuse_untrained_rows, encoder),
        template=encoder.template,
        parents={"template": {"name": section.template, "fingerprint": fingerprint_text(encoder.template.texts)}},
        facts={"template_name": section.template, "preference": section.method},
        trainer=TRAINERS[section.method],
        measure=partial(_measure, held_out, section) if held_out else lambda model, budget, before: {},
        describe=partial(_describe, held_out, lengths),
    )


def _check_labels(store: PreferenceStore) -> None:
    if not store.is_paired and (store.labels.all() or not store.labels.any()):
        raise DataError(
            _("all labels are the same, but kto needs answers to prefer and answers to avoid"),
            place=str(store.origin(0)),
            remedy=_("add rows with the other label"),
        )


def _refuse_untrained_rows(encoder: PreferenceEncoder, model: Any) -> list[int]:
    """Return no rows: preferences compare answers, and teach no token that the base does not know. Raises ModelError."""
    control = chat_setup.control_ids(encoder.tokenizer, encoder.template)
    rows = attach.find_untrained_rows(model, control, {*encoder.tokenizer.get_vocab().values()})
    if rows:
        names = ", ".join(encoder.tokenizer.convert_ids_to_tokens(rows))
        raise ModelError(
            _("the base never trained the rows of {names}, with which the template marks turns").format(names=names),
            place="prefer.template",
            remedy=_(
                "an `sft` section before `prefer`, which trains them; or a template with tokens that the base knows"
            ),
        )
    return []


def _preferred_dialogues(held_out: list[Preference]) -> list[Dialogue]:
    return [one.dialogues[0] for one in held_out if one.chosen]


def compare_lengths(store: PreferenceStore) -> dict[str, Any]:
    """Return the mean tokens of the answers, and the share of pairs whose chosen answer is the longer one."""
    chosen, rejected = store.answer_lengths
    means = {"chosen": round(float(chosen.mean()), 2), "rejected": round(float(rejected.mean()), 2)}
    return {**means, **({"chosen_longer": round(float(np.mean(chosen > rejected)), 4)} if store.is_paired else {})}


def _notices(
    encoder: PreferenceEncoder, section: Prefer, rejected: list[dict[str, Any]], lengths: dict[str, Any]
) -> list[str]:
    notices = []
    if unpaired := sum(one["reason"] == "unpaired" for one in rejected):
        notices.append(
            _("{count} answers have a label and no partner, and are left out; `method: kto` learns from them").format(
                count=unpaired
            )
        )
    means = _("mean tokens of the answers: {chosen:g} chosen, {rejected:g} rejected").format(**lengths)
    console.info(means)
    if lengths.get("chosen_longer", 0) >= MOSTLY_LONGER:
        notices.append(
            _(
                "in {share:.0%} of the pairs the chosen answer is the longer one: the model may learn length instead of quality"
            ).format(share=lengths["chosen_longer"])
        )
    return notices


def score_answers(model: PreparedModel, store: PreferenceStore, budget: int) -> tuple[list[float], list[int]]:
    """Return (log probability, learned tokens) of each sample of the store, in nats."""
    samples = store.store
    batches = MicroBatches(samples, fill(samples.lengths, budget), packed=False)
    sums: list[float] = []
    counts = [int(np.count_nonzero(learn)) for _unused, learn in samples.take(range(len(samples)))]
    was_training = model.model.training
    model.model.eval()
    with torch.no_grad(), model.computing():
        for index, micro in enumerate(batches.micro):
            _unused, nats = learned_loss(model.model, to_device(batches[index], model.model))
            sums += [-float(part.double().sum()) for part in nats.cpu().split([counts[sample] for sample in micro])]
    model.model.train(was_training)
    return sums, counts


def _measure(
    held_out: PreferenceStore, section: Prefer, model: PreparedModel, budget: int, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Return how far the model prefers the chosen answers of the held-out data.

    The reward of an answer is beta x the change of its log probability since before training. The accuracy is the share of
    pairs with a higher reward for the chosen answer; equal rewards, as before training, count half. Single answers (KTO) form
    all pairs of one to prefer and one to avoid.
    """
    found, counts = score_answers(model, held_out, budget)
    rewards = section.strength * (np.array(found) - np.array(before["log_probabilities"] if before else found))
    each = np.array(found) / np.array(counts)
    margins, likelier = (_margins(held_out, values) for values in (rewards, each))
    if not len(margins):
        return {"log_probabilities": found}
    return {
        "log_probabilities": found,
        "preference_accuracy": float(np.mean((margins > 0) + (margins == 0) / 2)),
        "preference_margin": float(margins.mean()),
        "likelier": float(np.mean(likelier > 0)),
    }


def _margins(store: PreferenceStore, values: np.ndarray) -> np.ndarray:
    """Return by how much the value of the preferred answer is higher, for each pair."""
    if store.is_paired:
        return np.asarray(values[store.answers] - values[store.rejected])
    good, bad = values[store.answers[store.labels]], values[store.answers[~store.labels]]
    return np.asarray(np.subtract.outer(good, bad)).reshape(-1)


def _describe(
    held_out: PreferenceStore | None, lengths: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    """Return the report's entry about the preferences."""
    names = {"accuracy": "preference_accuracy", "margin": "preference_margin", "likelier": "likelier"}
    scores = {ours: {"before": before[name], "after": after[name]} for ours, name in names.items() if name in after}
    return {"preferences": {**scores, "held_out": len(held_out) if held_out else 0, "answer_tokens": lengths}}
