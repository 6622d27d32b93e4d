"""Encode exactly as the training scripts of 2023 did, defects included, only to reproduce their results.

Their differences: `<s>` twice; prompt and answer tokenised together, so that the mask misses their boundary; a SentencePiece
blank before the answer; a mask that lets the model learn ChatGLM's `<sop>`; truncation from the right that may remove the
end of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.core.records import Span
from tongwen.data.encoder import Encoder, Piece, join_spans


@dataclass(frozen=True)
class LegacyRules:
    """together:  prompt and answer are tokenised as one text; the mask has the length of the prompt alone
    begun:     the tokenizer puts `<s>` before the text
    doubled:   the text itself contains another `<s>`
    opened:    the prompt's last id, which begins the answer, is learned too
    halves:    prompt and answer are truncated separately, each to half of max_length
    ends:      the last id of a truncated sample is replaced by the end token
    """

    together: bool = False
    begun: bool = True
    doubled: bool = False
    opened: bool = False
    halves: bool = False
    ends: bool = False


RULES = {
    "belle": LegacyRules(together=True, doubled=True, ends=True),
    "alpaca-cla": LegacyRules(),
    "chatglm": LegacyRules(begun=False, opened=True),
    "guanaco": LegacyRules(halves=True),
    "guanaco-v1": LegacyRules(halves=True),
    "vicuna": LegacyRules(halves=True),
}


class LegacyEncoder(Encoder):
    """An encoder for the samples of one old template, each with one answer, its last."""

    def __init__(self, tokenizer: Any, template: str, max_length: int) -> None:
        super().__init__(tokenizer)
        if template not in RULES:
            raise RecipeError(
                _("template {template!r} belongs to none of the old scripts").format(template=template),
                place="sft.legacy",
                remedy=f"template: {' | '.join(RULES)}",
            )
        self.rules, self.max_length = RULES[template], max_length
        self.begin, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.begin_text = tokenizer.decode(self.prefix) if self.prefix else ""

    def encode(self, samples: Sequence[Sequence[Span]]) -> list[list[Piece]]:
        return [self._sample(join_spans(spans)) for spans in samples]

    def keeps_stop(self, pieces: Sequence[Piece]) -> bool:
        return len(pieces[-1].ids) > 0 and pieces[-1].ids[-1] == self.end

    def _sample(self, spans: list[Span]) -> list[Piece]:
        *before, last = spans
        if not before:
            return super().encode([spans])[0]
        source = "".join(span.text for span in before).removeprefix(self.begin_text)
        start = [*(self.prefix if self.rules.doubled else ()), self.begin] if self.rules.begun else []
        prompt, answer = map(list, self._slow_ids([source, last.text]))
        if self.rules.together:
            whole = list(self._slow_ids([source + last.text])[0])
            prompt, answer = whole[: len(prompt)], whole[len(prompt) :]
        prompt = [*start, *prompt]
        if self.rules.halves:
            prompt, answer = prompt[: self.max_length // 2], answer[: self.max_length // 2]
        if self.rules.opened:
            answer.insert(0, prompt.pop())
        answer = answer[: max(self.max_length - len(prompt), 0)]
        prompt = prompt[: self.max_length]
        if self.rules.ends and len(prompt) + len(answer) == self.max_length:
            (answer or prompt)[-1] = self.end
        return [Piece(prompt, learn=False), Piece(answer, last.learn, answer=True)]
