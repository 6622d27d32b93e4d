"""Make the training job of the `sft` stage: dialogues are rendered by a template and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue
from tongwen.model.adapters import attach
from tongwen.model.loading import chat_setup
from tongwen.model.loading.fingerprint import fingerprint_text
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Sft
from tongwen.workflows.new_rows import are_rows_untrained, new_rows_of
from tongwen.workflows.record_encoders import DialogueEncoder, make_dialogue_encoder
from tongwen.workflows.stage_inputs import base_of_stage
from tongwen.workflows.tokenized_data import encode_prepared
from tongwen.workflows.training.types import SamplePrompt, TrainingJob


def make_dialogue_job(recipe: Recipe, prepared: artifact.Artifact, tokens: Path) -> TrainingJob:
    """Encode the dialogues for the `sft` stage. tokens: the folder for the encoded data."""
    section, base = recipe.sft, base_of_stage(recipe, "sft")
    assert section
    record_encoder = make_dialogue_encoder(base, section)
    data = encode_prepared(prepared, record_encoder, recipe.seed, tokens)
    return TrainingJob(
        recipe=recipe,
        stage="sft",
        prepared=prepared,
        record_encoder=record_encoder,
        data=data,
        prompts=make_prompts(data.held_out, record_encoder, section.samples),
        find_rows=lambda model: sorted({*_control_rows(model, record_encoder, section), *_new_pieces(base, section)}),
        new_rows=new_rows_of(base) if section.adapter.method == "new_rows" else (),
        template=record_encoder.template,
        parents={
            "template": {"name": section.template, "fingerprint": fingerprint_text(record_encoder.template.texts)}
        },
        facts={"template_name": section.template},
    )


def _control_rows(model: Any, record_encoder: DialogueEncoder, section: Sft) -> list[int]:
    """Return rows of the template's control tokens that are untrained, and would stay so under an adapter."""
    if section.adapter.method == "full":
        return []
    tokenizer = record_encoder.tokenizer
    control = chat_setup.control_ids(tokenizer, record_encoder.template)
    rows = attach.find_untrained_rows(model, control, {*tokenizer.get_vocab().values()})
    if not rows:
        return []
    names = ", ".join(tokenizer.convert_ids_to_tokens(rows))
    if not section.train_new_control_tokens:
        raise ModelError(
            _("the base never trained the rows of {names}: if they stay frozen, the model never stops").format(
                names=names
            ),
            place="sft.train_new_control_tokens",
            remedy=_("train_new_control_tokens: true, or a template with tokens that the base knows"),
        )
    console.notice(_("the base never trained {names}; this stage trains their rows").format(names=names))
    return rows


def _new_pieces(base: str, section: Sft) -> list[int]:
    """Return rows that a vocabulary stage added and no stage trained since; an adapter alone would not train them."""
    if section.adapter.method in ("full", "new_rows") or not are_rows_untrained(base):
        return []
    console.notice(_("no `pretrain` has trained the new pieces' rows; this stage trains them with the adapter"))
    return new_rows_of(base)


def make_prompts(held_out: Sequence[Dialogue], record_encoder: DialogueEncoder, count: int) -> list[SamplePrompt]:
    """Return prompts from the first held-out dialogues that end with an answer; the report shows answers to them."""
    prompts: list[SamplePrompt] = []
    for one in held_out:
        if len(prompts) < count and len(one.messages) > 1 and one.messages[-1].role == "assistant":
            with suppress(RowRejected):  # a row that is not scored either
                asked = record_encoder.template.prompt(one.messages[:-1], one.tools)
                if answer := one.messages[-1].content:
                    prompts.append(SamplePrompt(one.messages[-2].content, asked, answer))
    return prompts
