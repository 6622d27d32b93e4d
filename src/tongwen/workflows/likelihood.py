"""The likelihood of texts under a model: whole documents, the answers of dialogues, and the options of a question.

Texts are encoded as in training, and the loss is the training loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document, Message, Origin, Span
from tongwen.data.encoder import Piece
from tongwen.data.token_bytes import token_bytes
from tongwen.model.kernels.loss import bits_per_byte, learned_loss
from tongwen.model.loading import chat_setup
from tongwen.workflows.chat_model import ChatModel

WINDOW = 2048  # tokens that a document is scored in at once, at most


class Likelihood:
    """Scores texts by their likelihood under a chat model."""

    def __init__(self, chat_model: ChatModel) -> None:
        self.chat_model, self.model, self.encoder = chat_model, chat_model.generator.model, chat_model.encoder
        self.sizes = torch.from_numpy(token_bytes(chat_model.generator.tokenizer))
        self.window = min(WINDOW, chat_model.generator.context)

    def score(self, record: Document | Dialogue) -> tuple[float, ...] | None:
        """Return (nats of text, bytes, nats, tokens) of one record; None for a dialogue that exceeds the context length
        or that the template refuses."""
        if isinstance(record, Document):
            batches = list(self._windows(record.text))
        elif not (batches := self._answers(record)):
            return None
        found = bits_per_byte(self.model, batches, self.sizes)
        text = found["bits_per_byte"] * math.log(2) * found["bytes"]
        return text, found["bytes"], found["loss"] * found["tokens"], found["tokens"]

    def nats_of(self, messages: Sequence[dict[str, Any]], options: Sequence[str]) -> np.ndarray:
        """Return the nats of each option as the answer, without its stop token: shape (O,)."""
        pairs = [self._prompt_and_answer(messages, option) for option in options]
        if all(
            prompt == pairs[0][0] and len(answer) == 1 for prompt, answer in pairs
        ):  # one pass over the prompt scores all options
            prompt, last = pairs[0][0], len(pairs[0][0]) - 1
            batch = self._batch(prompt, [last] * len(pairs), [answer[0] for _, answer in pairs])
            return self._nats(batch)
        return np.array([self._nats(self._learned([*prompt, *answer], len(prompt))).sum() for prompt, answer in pairs])

    def _windows(self, text: str) -> Iterator[dict[str, Any]]:
        """Score every token once: all of the first window after the start token, and the new tokens of each later one,
        which have at least half a window of context."""
        start = self.encoder.prefix or [chat_setup.end_of_text(self.chat_model.generator.tokenizer)]
        ids = [*start, *map(int, self.encoder.encode_texts([text])[0])]
        for begin, end, first in windows(len(ids), self.window, len(start)):
            yield self._learned(ids[begin:end], first - begin)

    def _answers(self, dialogue: Dialogue) -> list[dict[str, Any]]:
        if self.chat_model.template is None:
            raise ModelError(
                _("dialogues are scored as a template renders them, and this model has none"),
                remedy=_("give it one: --template chatml; or score documents"),
            )
        try:
            samples = self.chat_model.template.samples(dialogue)
        except RowRejected:
            return []
        encoded = self.encoder.encode([sample.spans for sample in samples])
        if max(sum(len(piece.ids) for piece in pieces) for pieces in encoded) > self.chat_model.generator.context:
            return []
        return [self._of_pieces(pieces) for pieces in encoded]

    def _of_pieces(self, pieces: list[Piece]) -> dict[str, Any]:
        ids = [int(index) for piece in pieces for index in piece.ids]
        positions = np.flatnonzero(np.repeat([piece.learn for piece in pieces], [len(piece.ids) for piece in pieces]))
        return self._batch(ids, (positions - 1).tolist(), [ids[position] for position in positions])

    def _prompt_and_answer(self, messages: Sequence[dict[str, Any]], option: str) -> tuple[list[int], list[int]]:
        """Return the ids of (prompt, answer) as the template renders them; without a template, simply concatenated."""
        if self.chat_model.template is None:
            text = "".join(str(turn["content"]) for turn in messages)
            spans = [Span(text, False), Span(option, True, answer=True)]
        else:
            turns = [Message(str(turn["role"]), str(turn["content"])) for turn in messages]
            dialogue = Dialogue((*turns, Message("assistant", option)), Origin("", 0))
            sample = self.chat_model.template.samples(dialogue, "last_answer", "off")[-1]
            spans = [span for span in sample.spans if not (span.stop and span.learn)]
        *before, answer = self.encoder.encode([spans])[0]
        return [int(index) for piece in before for index in piece.ids], [int(index) for index in answer.ids]

    def _learned(self, ids: list[int], first: int) -> dict[str, Any]:
        """Return a batch in which all ids from `first` on are scored."""
        return self._batch(ids, range(first - 1, len(ids) - 1), ids[first:])

    def _batch(self, ids: list[int], rows: Sequence[int], targets: list[int]) -> dict[str, Any]:
        device = self.model.device
        return {
            "input_ids": torch.tensor([ids], device=device),  # (1, T)
            "rows": torch.tensor(list(rows), device=device),  # (R,) the row of logits for each target
            "targets": torch.tensor(targets, device=device),  # (R,)
            "learned": len(targets),
        }

    def _nats(self, batch: dict[str, Any]) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(learned_loss(self.model, batch)[1].double().cpu())


def windows(count: int, size: int, first: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first scored) of each window over `count` ids; ids before `first` are not scored."""
    begin = 0
    while first < count:
        end = min(begin + size, count)
        yield begin, end, first
        first, begin = end, end - size // 2
