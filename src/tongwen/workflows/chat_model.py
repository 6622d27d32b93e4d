"""A model, with or without adapters, that can be talked to: what Python, the terminal and batch generation share.

The template is the one that stands with the tokenizer, the prompt is encoded as in training, and an answer ends on the
stop tokens that the model learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core.chat_template import Template, set_apart
from tongwen.core.errors import DataError, ModelError, RowRefused
from tongwen.core.i18n import _
from tongwen.core.model_families import family_of
from tongwen.core.records import Message
from tongwen.data.encode import Encoder
from tongwen.infer import llamacpp, vllm
from tongwen.infer.generation import ROWS, Sampling, TextGenerator
from tongwen.model.adapters.chain import open_adapter_chain
from tongwen.model.loading import chat_setup, device_map, load
from tongwen.model.loading.special_tokens import fix_stop_tokens

THINK = "<think>"


@dataclass
class ChatModel:
    """A model to talk with. Messages are dictionaries with `role` and `content`, as everywhere."""

    name: str
    voice: TextGenerator
    encoder: Encoder
    template: Template | None
    thinking: bool

    @property
    def context(self) -> int:
        """How many tokens the model sees, prompt and answer together."""
        return self.voice.context

    def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The answer to a conversation. options: max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed."""
        said: dict[int, list[int]] = {}
        self.voice.answer_all([self.prompt_ids(messages)], self._sampling(options), said.__setitem__)
        return self.voice.decode(said[0])

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

    def generate(self, prompts: Sequence[str], batch_size: int = ROWS, **options: Any) -> list[str]:
        """One answer per prompt. Prompts are questions for a chat model, beginnings for `template="completion"`."""
        answers: dict[int, str] = {}
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        self.answer_each(asked, answers.__setitem__, batch_size, **options)
        return [answers[place] for place in range(len(prompts))]

    def answer_each(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        take: Callable[[int, str], None],
        batch_size: int = ROWS,
        **options: Any,
    ) -> None:
        """Hand each answer to `take` with the place of its conversation, as soon as it is there."""
        ids = [self._numbered(number, messages) for number, messages in enumerate(conversations, 1)]
        if ids:
            self.voice.answer_all(
                ids,
                self._sampling(options),
                lambda place, answer: take(place, self.voice.decode(answer)),
                batch_size,
            )

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The conversation as ids, up to where the model answers."""
        text = self.prompt_text(messages)
        return self.text_ids(text) if self.template is None else self.encoder.encode_prompt(text)

    def prompt_text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The same as text."""
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
            return "".join(turn.content for turn in turns)
        return self.template.prompt(turns, thinking=self.thinking)

    def text_ids(self, text: str) -> list[int]:
        """A text as ids, to be continued without any template; a control token in it is only text."""
        return self.encoder.encode_prompt(set_apart(text, tuple(chat_setup.special_texts(self.voice.tokenizer))))

    def _numbered(self, number: int, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        try:
            return self.prompt_ids(messages)
        except RowRefused as error:
            raise DataError(error.rule, place=_("prompt {number}").format(number=number)) from None

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        return Sampling().with_(**options)


def open_chat_model(
    model: str,
    adapters: Sequence[str] = (),
    template: str = "own",
    thinking: str = "off",
    precision: str = "auto",
    weights: str = "full",
    engine: str = "auto",
    rows: int = ROWS,
) -> ChatModel:
    """Open a model by any of its names.

    template: own, a shipped name, a .jinja file, `completion` for a base model, or `auto`: own where the model has one,
    else completion; weights: full, 8bit, 4bit, or auto: what fits; engine: batched or paged (transformers), llama.cpp (a
    .gguf file), vllm, or auto (see `choose_engine`); rows: prompts side by side, at most, for which llama.cpp makes room now.
    """
    place = load.locate(model)
    place = replace(place, adapters=(*place.adapters, *adapters))
    if place.gguf and weights in device_map.BITS:
        raise ModelError(
            _("a .gguf file determines its own number of bits"),
            place=f"{model} · --load {weights}",
            remedy="--load full",
        )
    if engine == "auto":
        engine = choose_engine(model, adapters)
    for folder in place.adapters:
        load.find_adapter(Path(folder))
    tokenizer = load.load_tokenizer(load.tokenizer_ref(place))
    encoder = Encoder(tokenizer)
    if template == "auto":
        template = "own" if tokenizer.chat_template else "completion"
        if template == "completion":
            console.notice(_("{model} has no template: it continues texts").format(model=model))
    bound = None if template == "completion" else chat_setup.bind_template(template, tokenizer, encoder.prefix)
    if engine in ("llama.cpp", "vllm"):
        voice = _open_elsewhere(place, tokenizer, bound, engine, rows)
    else:
        network = _open_network(place, tokenizer, precision, weights)
        if bound is None:
            _check_continues(network.config.model_type, model)
        stops = _stops(model, tokenizer, bound, network.generation_config)
        voice = TextGenerator(network, tokenizer, stops, chat_setup.context_length(network.config), engine == "paged")
    return ChatModel(model, voice, encoder, bound, thinking == "on")


def choose_engine(model: str, adapters: Sequence[str]) -> str:
    """llama.cpp for a .gguf file without adapters where its wheel is installed, which is said; else transformers in
    batches."""
    place = load.locate(model)
    if not place.gguf or place.adapters or adapters:
        return "batched"
    if llamacpp.is_installed():
        console.notice(_("{gguf}: llama.cpp answers").format(gguf=place.gguf))
        return "llama.cpp"
    console.notice(
        _("{gguf}: transformers unpacks it and answers; to use llama.cpp: pip install 'tongwen[llamacpp]'").format(
            gguf=place.gguf
        )
    )
    return "batched"


def _open_network(place: load.ModelRef, tokenizer: Any, precision: str, weights: str) -> Any:
    """The network on its device, or over all GPUs when one is too small for it."""
    device = load.compute_device()
    dtype, _unused = load.compute_dtype(precision, device)
    spread, quantize = device_map.choose(place, weights, device, dtype)
    with console.waiting(_("opening {place}").format(place=place.name)):
        network, _unused2 = open_adapter_chain(place, dtype, quantize, device_map="auto" if spread else None, live=True)
    load.check_tokenizer(tokenizer, network, place)
    fix_stop_tokens(tokenizer, network, place.name)
    return (network if spread or quantize else network.to(device)).eval()


def _check_continues(kind: str, model: str) -> None:
    """Raise ModelError for a family that answers, and does not continue a text."""
    family = family_of(kind)
    if family and family.dialogues_only:
        raise ModelError(
            _("{kind} can only answer, not continue a text").format(kind=kind),
            place=f"{model} · template: completion",
            remedy=f"--template {kind}",
        )


def _open_elsewhere(
    place: load.ModelRef, tokenizer: Any, bound: Template | None, engine: str, rows: int
) -> TextGenerator:
    """The voice of another engine, which reads the weights itself."""
    if place.adapters:
        raise ModelError(
            _("{engine} only reads a whole model, without adapters").format(engine=engine),
            place=place.adapters[0],
            remedy="tongwen merge --base … --adapter … --out …",
        )
    config = load.load_config(place)
    context = chat_setup.context_length(config)
    if engine == "vllm":
        folder = load.ensure_local(place).folder
        stops = _stops(place.name, tokenizer, bound, load.load_generation_config(folder))
        return vllm.open_model(folder, tokenizer, stops, context)
    if not place.gguf:
        raise ModelError(
            _("llama.cpp only reads .gguf files"),
            place=place.name,
            remedy=f"tongwen convert {place.name} --to gguf --out …",
        )
    file = str(Path(place.folder) / place.gguf)
    with console.waiting(_("opening {place}").format(place=place.name)):
        voice = llamacpp.open_file(file, tokenizer, _stops(place.name, tokenizer, bound, None), config, context, rows)
    if voice.context < context:
        console.notice(
            _(
                "it sees at most {voice_context:,} tokens here, of the model's {context:,}: more need too much memory"
            ).format(voice_context=voice.context, context=context)
        )
    return voice


def _stops(model: str, tokenizer: Any, bound: Template | None, generation_config: Any) -> tuple[int, ...]:
    stops = chat_setup.stop_ids(tokenizer, bound, generation_config)
    if not stops:
        raise ModelError(_("this model has no stop token to end an answer"), place=model)
    return stops
