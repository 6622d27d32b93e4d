"""Encoders of dialogues, preferences and documents: each with its tokenizer, its template and its section of the recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tongwen.core.chat_template import Template
from tongwen.core.errors import DataError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Preference, Span
from tongwen.data.encode_dialogues import encode_dialogues
from tongwen.data.encode_documents import encode_documents
from tongwen.data.encode_preferences import encode_preferences
from tongwen.data.encoder import Encoder
from tongwen.data.ledger import Ledger, RejectedRow
from tongwen.data.legacy_encoder import LegacyEncoder
from tongwen.data.mask_checks import check_round_trip, check_store, describe
from tongwen.data.preference_store import PreferenceStore, arrange
from tongwen.data.token_store import Batch, TokenStore
from tongwen.model.loading import chat_setup
from tongwen.model.loading.fingerprint import fingerprint_text
from tongwen.model.loading.locate import locate
from tongwen.model.loading.tokenizer import load_tokenizer, tokenizer_ref
from tongwen.recipe.training import Prefer, Pretrain, Sft, Training


@dataclass(frozen=True)
class RecordEncoder(ABC):
    """Encodes records of one kind as tokens."""

    tokenizer: Any
    encoder: Encoder
    kind: ClassVar[str]

    @property
    @abstractmethod
    def decides(self) -> dict[str, Any]:
        """The settings that decide the tokens, besides content and tokenizer."""

    @abstractmethod
    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        """Yield the samples to train on."""

    @abstractmethod
    def held_out(self, records: list[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        """Yield the held-out samples to score."""

    @abstractmethod
    def check(self, store: TokenStore, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        """Return statistics of the loss mask. Raises DataError if there is nothing to learn."""

    def arrange(self, store: TokenStore, records: Iterable[Any]) -> Any:
        """Return the store with the items that training draws. records: those that it was made of."""
        return store

    @abstractmethod
    def round_trip(self, records: Iterator[Any], count: int) -> dict[str, int]:
        """Count the records that do not decode to their own text."""


@dataclass(frozen=True)
class DialogueEncoder(RecordEncoder):
    """Encodes dialogues, rendered by a template."""

    template: Template
    section: Sft
    kind: ClassVar[str] = "dialogues"

    @property
    def decides(self) -> dict[str, Any]:
        return {
            "template": fingerprint_text(self.template.texts),
            "settings": self.section.model_dump(
                mode="json", include={"learn", "thinking", "max_length", "too_long", "legacy"}
            ),
        }

    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        return encode_dialogues(records, self.template, self.encoder, self.section, ledger, reject)

    def held_out(self, records: list[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        return self.batches(iter(records), ledger, reject)

    def check(self, store: TokenStore, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        return check_store(store, self.section, rejected)

    def round_trip(self, records: Iterator[Any], count: int) -> dict[str, int]:
        def render(record: Any) -> list[tuple[Span, ...]]:
            found: list[tuple[Span, ...]] = []
            for dialogue in record.dialogues if isinstance(record, Preference) else [record]:
                with suppress(RowRejected):
                    samples = self.template.samples(dialogue, self.section.learn, self.section.thinking)
                    found += [sample.spans for sample in samples]
            return found

        return check_round_trip(records, count, render, self.encoder)


@dataclass(frozen=True)
class PreferenceEncoder(DialogueEncoder):
    """Encodes preferences: each answer with its prompt, rendered by a template. paired: only pairs are of use."""

    paired: bool = True
    kind: ClassVar[str] = "preferences"

    @property
    def decides(self) -> dict[str, Any]:
        return {**super().decides, "paired": self.paired}

    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        return encode_preferences(records, self.template, self.encoder, self.section, self.paired, ledger, reject)

    def check(self, store: TokenStore, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        if not len(store) and rejected and all(bad["reason"] == "unpaired" for bad in rejected):
            raise DataError(
                _("none of the {count} preferences is a pair: they are answers with a label").format(
                    count=len(rejected)
                ),
                place=f"{rejected[0]['file']}:{rejected[0]['row']}",
                remedy="prefer: {method: kto}",
            )
        return check_store(store, self.section, rejected)

    def arrange(self, store: TokenStore, records: Iterable[Any]) -> PreferenceStore:
        if self.paired:
            return arrange(store, None)
        return arrange(store, {record.origin: bool(record.chosen) for record in records if not record.is_pair})


@dataclass(frozen=True)
class DocumentEncoder(RecordEncoder):
    """Encodes plain text. end: the id that ends a document."""

    end: int
    section: Pretrain
    kind: ClassVar[str] = "documents"

    @property
    def decides(self) -> dict[str, Any]:
        settings = self.section.model_dump(mode="json", include={"max_length", "documents"})
        return {"end": self.end, "settings": settings}

    def batches(self, records: Iterator[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        return encode_documents(
            records, self.encoder, self.end, self.section.max_length, ledger, arrangement=self.section.documents
        )

    def held_out(self, records: list[Any], ledger: Ledger, reject: Callable[[RejectedRow], None]) -> Iterator[Batch]:
        """Encode documents apart, even if training concatenates them, so that scores of both can be compared."""
        return encode_documents(records, self.encoder, self.end, self.section.max_length, ledger)

    def check(self, store: TokenStore, rejected: list[dict[str, Any]]) -> dict[str, Any]:
        if not len(store):
            raise DataError(
                _("the text is shorter than one block of {max_length} tokens").format(
                    max_length=self.section.max_length
                ),
                place="pretrain.max_length",
                remedy=_("a smaller max_length, or documents: apart"),
            )
        text = {"tokens": len(store.ids), "learned": store.learned_tokens}
        return {**describe(store), "roles": {"text": text}}

    def round_trip(self, records: Iterator[Any], count: int) -> dict[str, int]:
        return check_round_trip(records, count, lambda document: [[Span(document.text, True)]], self.encoder)


def make_dialogue_encoder(base: str, section: Sft) -> DialogueEncoder:
    tokenizer = _tokenizer_for(base, section)
    legacy = section.legacy
    encoder = LegacyEncoder(tokenizer, section.template, section.max_length) if legacy else Encoder(tokenizer)
    return DialogueEncoder(
        tokenizer, encoder, chat_setup.bind_template(section.template, tokenizer, encoder.prefix), section
    )


def make_preference_encoder(base: str, section: Prefer) -> PreferenceEncoder:
    tokenizer = load_tokenizer(tokenizer_ref(locate(base)))  # of the stage before, with its template
    encoder = Encoder(tokenizer)
    rendering = Sft(template=section.template, thinking=section.thinking, max_length=section.max_length)
    template = chat_setup.bind_template(section.template, tokenizer, encoder.prefix)
    return PreferenceEncoder(tokenizer, encoder, template, rendering, section.method != "kto")


def make_document_encoder(base: str, section: Pretrain) -> DocumentEncoder:
    tokenizer = _tokenizer_for(base, section)
    return DocumentEncoder(tokenizer, Encoder(tokenizer), chat_setup.end_of_text(tokenizer), section)


def _tokenizer_for(base: str, section: Training) -> Any:
    """Return the base's tokenizer, or that of the adapter whose training continues."""
    further = section.adapter.continue_from
    place = locate(base)
    return load_tokenizer(tokenizer_ref(replace(place, adapters=(further,))) if further else place)
