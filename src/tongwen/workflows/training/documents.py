"""Make the training job of the `pretrain` stage: documents are encoded in the recipe's arrangement."""

from __future__ import annotations

from pathlib import Path

from tongwen.core import artifact
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.core.model_families import family_of
from tongwen.core.records import Document
from tongwen.model.loading.architecture import load_config
from tongwen.model.loading.locate import locate
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Pretrain
from tongwen.workflows.new_rows import are_rows_untrained, new_rows_of
from tongwen.workflows.record_encoders import DocumentEncoder, make_document_encoder
from tongwen.workflows.stage_inputs import advise_keep, base_of_stage
from tongwen.workflows.tokenized_data import encode_prepared
from tongwen.workflows.training.types import SamplePrompt, TrainingJob

OPENING = 24  # characters of a held-out document that the model continues, for the report


def make_document_job(recipe: Recipe, prepared: artifact.Artifact, tokens: Path) -> TrainingJob:
    """Encode the documents for the `pretrain` stage. tokens: the folder for the encoded data.

    Raises RecipeError if the base or the phases cannot learn from plain text.
    """
    section, base = recipe.pretrain, base_of_stage(recipe, "pretrain")
    assert section
    _check_new_rows(base, section)
    _check_learns_text(base)
    record_encoder = make_document_encoder(base, section)
    advise_keep(base, str(record_encoder.tokenizer.chat_template or ""), section)
    data = encode_prepared(prepared, record_encoder, recipe.seed, tokens)
    trains_rows = "new_rows" in section.trained_parts
    return TrainingJob(
        recipe=recipe,
        stage="pretrain",
        prepared=prepared,
        record_encoder=record_encoder,
        data=data,
        prompts=_completion_prompts(data.held_out, record_encoder, section.samples),
        new_rows=new_rows_of(base) if trains_rows else (),
        end=record_encoder.end,
    )


def _check_new_rows(base: str, section: Pretrain) -> None:
    """Raise RecipeError if the base has new rows that no phase trains: their pieces would never be learned."""
    trained = section.trained_parts
    if are_rows_untrained(base) and not trained & {"new_rows", "embeddings", "full"}:
        raise RecipeError(
            _("the new pieces' rows would never be trained: no phase trains new_rows, embeddings or full"),
            place=f"pretrain · {base}",
            remedy="phases: [{train: new_rows, stop_after: 100 steps}, {train: lora+embeddings}]",
        )


def _check_learns_text(base: str) -> None:
    """Raise RecipeError for a family that can be trained only on dialogues."""
    kind = load_config(locate(base)).model_type
    family = family_of(kind)
    if family and family.dialogues_only:
        raise RecipeError(
            _("{kind} cannot be trained on plain text here: {reason}").format(
                kind=kind, reason=_(family.dialogues_only)
            ),
            place=f"pretrain · {base}",
            remedy=_("leave out `pretrain` and train on dialogues instead: sft"),
        )


def _completion_prompts(held_out: list[Document], record_encoder: DocumentEncoder, count: int) -> list[SamplePrompt]:
    """Return prompts from the first held-out documents that are long enough: beginning and continuation."""
    texts = [one.text for one in held_out if len(one.text) > 2 * OPENING]
    return [SamplePrompt(text[:OPENING], text[:OPENING], text[OPENING : 4 * OPENING]) for text in texts[:count]]
