"""A model, with or without adapters, that can be talked to: what Python, the terminal and batch generation share.

The template is the one that stands with the tokenizer, the prompt is encoded as in training, and an answer ends on the
stop tokens that the model learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tongwen import console
from tongwen.data.encode import Encoder
from tongwen.errors import ModelError
from tongwen.families import family_of
from tongwen.infer.decode import Sampling, Voice
from tongwen.language import say
from tongwen.model import dress, load
from tongwen.model.special import mend_ends
from tongwen.model.stack import open_stack
from tongwen.record import Message
from tongwen.template import Template, set_apart

THINK = "<think>"


@dataclass
class Speaker:
    """A model to talk with. Messages are dictionaries with `role` and `content`, as everywhere."""

    name: str
    voice: Voice
    encoder: Encoder
    template: Template | None
    thinking: bool

    @property
    def context(self) -> int:
        """How many tokens the model sees, prompt and answer together."""
        return self.voice.context

    def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The answer to a conversation. options: max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed."""
        return self.voice.decode(self.voice.answer([self.prompt_ids(messages)], self._sampling(options))[0])

    def stream(
        self,
        messages: Sequence[dict[str, Any]],
        heard: Callable[[int], None] = lambda index: None,
        **options: Any,
    ) -> Iterator[str]:
        """The same answer in pieces of whole characters. heard: called with each new token."""
        return self.continue_ids(self.prompt_ids(messages), heard, **options)

    def continue_ids(self, ids: list[int], heard: Callable[[int], None], **options: Any) -> Iterator[str]:
        """What the model says after these ids, in pieces of whole characters. Where the prompt itself opens the thinking,
        the first piece says so."""
        if self.encoder.backend.decode(ids[-8:], skip_special_tokens=False).rstrip().endswith(THINK):
            yield THINK
        sampling = self._sampling(options)
        left = max(self.context - len(ids), 1)
        yield from self.voice.stream(ids, sampling.with_(max_new_tokens=min(sampling.max_new_tokens, left)), heard)

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether an answer of these tokens came to its own end, and was not cut off."""
        return bool(ids) and ids[-1] in self.voice.stop_ids

    def generate(self, prompts: Sequence[str], batch_size: int = 8, **options: Any) -> list[str]:
        """One answer per prompt. Prompts are questions for a chat model, beginnings for `template="completion"`."""
        return self.answer_all([[{"role": "user", "content": prompt}] for prompt in prompts], batch_size, **options)

    def answer_all(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        batch_size: int,
        progress: Callable[[int], None] = lambda done: None,
        **options: Any,
    ) -> list[str]:
        """One answer per conversation, in their order; batches are made of prompts of like length, the longest first."""
        ids = [self.prompt_ids(messages) for messages in conversations]
        out = [""] * len(ids)
        longest_first = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
        for begin in range(0, len(ids), batch_size):
            chosen = longest_first[begin : begin + batch_size]
            answers = self.voice.answer([ids[index] for index in chosen], self._sampling(options))
            for index, answer in zip(chosen, answers, strict=True):
                out[index] = self.voice.decode(answer)
            progress(begin + len(chosen))
        return out

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The conversation as ids, up to where the model answers."""
        turns = [
            Message(
                str(turn["role"]),
                str(turn["content"]),
                turn.get("reasoning_content"),
                tuple(turn.get("tool_calls", ())),
            )
            for turn in messages
        ]
        if self.template is None:
            return self.text_ids("".join(turn.content for turn in turns))
        return self.encoder.encode_prompt(self.template.prompt(turns, thinking=self.thinking))

    def text_ids(self, text: str) -> list[int]:
        """A text as ids, to be continued without any template; a control token in it is only text."""
        return self.encoder.encode_prompt(set_apart(text, tuple(dress.special_texts(self.voice.tokenizer))))

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        return Sampling().with_(**options)


def open_speaker(
    model: str, adapters: Sequence[str] = (), template: str = "own", thinking: str = "off", precision: str = "auto"
) -> Speaker:
    """Open a model by any of its names. template: own, a shipped name, a .jinja file, `completion` for a base model, or
    `auto`: own where the model has one, else completion."""
    place = load.locate(model)
    place = replace(place, adapters=(*place.adapters, *adapters))
    dressed = next((folder for folder in reversed(place.adapters) if _has_tokenizer(folder)), place.folder)
    tokenizer = load.load_tokenizer(load.Place(dressed, dressed) if dressed != place.folder else place)
    device = load.compute_device()
    dtype, _ = load.compute_dtype(precision, device)
    with console.waiting(say(f"opening {model}", f"打开 {model}")):
        network, _ = open_stack(place, dtype)
    load.check_tokenizer(tokenizer, network, place)
    mend_ends(tokenizer, network, model)
    network = network.to(device).eval()
    encoder = Encoder(tokenizer)
    if template == "auto":
        template = "own" if tokenizer.chat_template else "completion"
        if template == "completion":
            console.notice(say(f"{model} has no template: texts are continued", f"{model} 没有模板：按续写处理"))
    bound = None if template == "completion" else dress.bind_template(template, tokenizer, encoder.prefix)
    family = family_of(network.config.model_type)
    if bound is None and family and family.dialogues_only:
        raise ModelError(
            say(
                f"{network.config.model_type} answers, it does not continue a text",
                f"{network.config.model_type} 只能回答，不能续写",
            ),
            place=f"{model} · template: completion",
            remedy=f"--template {network.config.model_type}",
        )
    stops = dress.stop_ids(tokenizer, bound, network.generation_config)
    if not stops:
        raise ModelError(say("no token ends an answer in this model", "该模型没有结束回答的停止符"), place=model)
    voice = Voice(network, tokenizer, stops, dress.context_length(network.config))
    return Speaker(model, voice, encoder, bound, thinking == "on")


def _has_tokenizer(folder: str) -> bool:
    return (Path(folder) / "tokenizer_config.json").is_file()
