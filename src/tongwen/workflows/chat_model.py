"""A model, with or without adapters, that answers messages: used from Python, the terminal, the server and `generate`.

The chat template comes with the tokenizer, prompts are encoded as in training, and an answer ends on the stop tokens
that the model learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core.answer_form import THINK, AnswerForm, find_answer_form
from tongwen.core.chat_template import Template
from tongwen.core.control_tokens import separate_control_tokens
from tongwen.core.errors import DataError, ModelError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.model_families import family_of
from tongwen.core.records import Message
from tongwen.core.tool_parser import ToolParser
from tongwen.data.encoder import Encoder
from tongwen.infer import llamacpp, vllm
from tongwen.infer.generation import ROWS, Logprobs, Sampling, TextGenerator, TokenLogprob
from tongwen.model.adapters.chain import open_adapter_chain
from tongwen.model.loading import chat_setup, device_map, devices, load
from tongwen.model.loading.adapter_folder import find_adapter
from tongwen.model.loading.architecture import load_config
from tongwen.model.loading.locate import ensure_local, locate
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.special_tokens import fix_stop_tokens
from tongwen.model.loading.tokenizer import check_tokenizer, load_tokenizer, tokenizer_ref


@dataclass
class ChatModel:
    """An opened model with its tokenizer and chat template. Messages are dictionaries with `role` and `content`."""

    name: str
    generator: TextGenerator
    encoder: Encoder
    template: Template | None
    thinking: bool

    @property
    def context(self) -> int:
        """The context length in tokens: prompt and answer together."""
        return self.generator.context

    def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """Return the answer to a conversation.

        options: max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed.
        """
        answers: dict[int, list[int]] = {}
        self.generator.answer_all([self.prompt_ids(messages)], self._sampling(options), answers.__setitem__)
        return self._text(answers[0])

    def stream(
        self,
        messages: Sequence[dict[str, Any]],
        on_token: Callable[[int], None] = lambda index: None,
        tools: Sequence[dict[str, Any]] = (),
        **options: Any,
    ) -> Iterator[str]:
        """Yield the answer in pieces of whole characters. on_token: called with the id of each new token."""
        return self.continue_ids(self.prompt_ids(messages, tools), on_token, **options)

    def continue_ids(
        self,
        ids: list[int],
        on_token: Callable[[int], None],
        begin: str = "",
        logprobs: Logprobs | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the continuation of these ids in pieces of whole characters, its thinking between `<think>` and `</think>`. If
        the prompt itself opens the thinking, the first piece is `<think>`. begin: the beginning of the answer that these ids
        end with."""
        end = self.encoder.backend.decode(ids[-16:], skip_special_tokens=False).rstrip()
        opening = next((mark for mark in (THINK, self.form.thinking[0]) if not begin and end.endswith(mark)), begin)
        sampling = self._sampling(options)
        left = max(self.context - len(ids), 1)
        sampling = sampling.override(max_new_tokens=min(sampling.max_new_tokens, left))
        with closing(self.generator.stream(ids, sampling, on_token, logprobs)) as pieces:
            yield from self.form.plain(chain([opening] if opening else [], pieces))

    @property
    def form(self) -> AnswerForm:
        """How answers are written: by the chat template."""
        return AnswerForm() if self.template is None else find_answer_form(self.template.for_calls)

    @property
    def tool_parser(self) -> ToolParser:
        """The parser of tool calls. Raises ModelError when the chat template writes none, or none that can be read back."""
        found = self.form.tools or _("a text that is continued has no place for tools")
        if isinstance(found, str):
            raise ModelError(found, place="tools", remedy="--template chatml | plain")
        return found

    def describe(self, token: TokenLogprob) -> dict[str, Any]:
        """Return a token with its log probability in OpenAI's form."""

        def entry(index: int, logprob: float) -> dict[str, Any]:
            text = str(self.generator.tokenizer.decode([index], skip_special_tokens=False))
            whole = "\ufffd" not in text  # part of a character has no text, and its bytes are not known
            return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

        return entry(*token[:2]) | {"top_logprobs": [entry(*one) for one in token.top]}

    def _text(self, ids: list[int]) -> str:
        return "".join(self.form.plain(iter([self.generator.decode(ids)])))

    def ended(self, ids: Sequence[int]) -> bool:
        """Return whether an answer with these tokens ended on a stop token; otherwise it was cut off."""
        return bool(ids) and ids[-1] in self.generator.stop_ids

    def generate(self, prompts: Sequence[str], batch_size: int = ROWS, **options: Any) -> list[str]:
        """Return one answer per prompt: a question, or with `template="completion"` the beginning of a text."""
        answers: dict[int, str] = {}
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        self.answer_each(conversations, answers.__setitem__, batch_size, **options)
        return [answers[index] for index in range(len(prompts))]

    def answer_each(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        on_answer: Callable[[int, str], None],
        batch_size: int = ROWS,
        tools: Sequence[Sequence[dict[str, Any]]] = (),
        **options: Any,
    ) -> None:
        """Call `on_answer(index of the conversation, answer)` for each answer as soon as it is complete. tools: of each
        conversation, if any has some."""
        offered = tools or [()] * len(conversations)
        pairs = zip(conversations, offered, strict=True)
        ids = [self._numbered(number, messages, one) for number, (messages, one) in enumerate(pairs, 1)]
        if ids:
            self.generator.answer_all(
                ids,
                self._sampling(options),
                lambda index, answer: on_answer(index, self._text(answer)),
                batch_size,
            )

    def prompt_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]] = (), begin: str = ""
    ) -> list[int]:
        """Return the ids of the conversation, up to where the model's answer begins. begin: what the answer begins with; it
        has no thinking then."""
        text = self.prompt_text(messages, tools, begin)
        return self.text_ids(text) if self.template is None else self.encoder.encode_prompt(text)

    def prompt_text(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]] = (), begin: str = ""
    ) -> str:
        """Return the conversation as text, up to where the model's answer begins. Raises RowRejected for tools without a
        template."""
        turns = [Message.from_dict(turn) for turn in messages]
        if self.template is not None:
            return self.template.prompt(turns, tools, thinking=self.thinking and not begin) + begin
        if tools:
            raise RowRejected("part_lost", _("a text that is continued has no place for the tools of its row"))
        return "".join(turn.content for turn in turns)

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text to continue without a template; control tokens in it are encoded as plain text."""
        return self.encoder.encode_prompt(
            separate_control_tokens(text, tuple(chat_setup.special_texts(self.generator.tokenizer)))
        )

    def _numbered(
        self, number: int, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[int]:
        try:
            return self.prompt_ids(messages, tools)
        except RowRejected as error:
            raise DataError(error.rule, place=_("prompt {number}").format(number=number)) from None

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        return Sampling().override(**options)


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
    """Open a model: a folder, a hub id, `modelscope:id`, a .gguf file, or a stage folder of a run.

    Args:
        template: own, a shipped name, a .jinja file, `completion` for a base model, or `auto`: own if the
            model has one, else completion.
        weights: full, 8bit, 4bit, or auto: what fits.
        engine: batched or paged (transformers), llama.cpp (a .gguf file), vllm, or auto (see `choose_engine`).
        rows: Most prompts in one batch; llama.cpp allocates memory for them when it starts.
    """
    place = locate(model)
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
        find_adapter(Path(folder))
    tokenizer = load_tokenizer(tokenizer_ref(place))
    encoder = Encoder(tokenizer)
    if template == "auto":
        template = "own" if tokenizer.chat_template else "completion"
        if template == "completion":
            console.notice(_("{model} has no template: it continues texts").format(model=model))
    chat_template = None if template == "completion" else chat_setup.bind_template(template, tokenizer, encoder.prefix)
    if engine in ("llama.cpp", "vllm"):
        generator = _open_with_engine(place, tokenizer, chat_template, engine, rows)
    else:
        network = _open_network(place, tokenizer, precision, weights)
        if chat_template is None:
            _check_continues(network.config.model_type, model)
        stops = _stops(model, tokenizer, chat_template, network.generation_config)
        generator = TextGenerator(
            network, tokenizer, stops, chat_setup.context_length(network.config), engine == "paged"
        )
    if chat_template is not None:
        marks = find_answer_form(chat_template.for_calls).marks
        generator = replace(generator, shown=frozenset(map(int, tokenizer.convert_tokens_to_ids(sorted(marks)))))
    return ChatModel(model, generator, encoder, chat_template, thinking == "on")


def choose_engine(model: str, adapters: Sequence[str]) -> str:
    """Return "llama.cpp" for a .gguf file without adapters if its wheel is installed, else "batched" (transformers).
    For a .gguf file a notice names the choice."""
    place = locate(model)
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


def _open_network(place: ModelRef, tokenizer: Any, precision: str, weights: str) -> Any:
    """Load the network onto its device, or over all GPUs if one is too small."""
    device = devices.compute_device()
    dtype, _unused = devices.compute_dtype(precision, device)
    multi_device, quantize = device_map.choose(place, weights, device, dtype)
    with console.waiting(_("opening {place}").format(place=place.name)):
        network, _unused2 = open_adapter_chain(
            place, dtype, quantize, device_map="auto" if multi_device else None, live=True
        )
    check_tokenizer(tokenizer, network, place)
    fix_stop_tokens(tokenizer, network, place.name)
    return (network if multi_device or quantize else network.to(device)).eval()


def _check_continues(kind: str, model: str) -> None:
    """Raise ModelError for a family that only answers dialogues and cannot continue a text."""
    family = family_of(kind)
    if family and family.dialogues_only:
        raise ModelError(
            _("{kind} can only answer, not continue a text").format(kind=kind),
            place=f"{model} · template: completion",
            remedy=f"--template {kind}",
        )


def _open_with_engine(
    place: ModelRef, tokenizer: Any, chat_template: Template | None, engine: str, rows: int
) -> TextGenerator:
    """Open the model with vLLM or llama.cpp, which read the weights themselves."""
    if place.adapters:
        raise ModelError(
            _("{engine} only reads a whole model, without adapters").format(engine=engine),
            place=place.adapters[0],
            remedy="tongwen merge --base … --adapter … --out …",
        )
    config = load_config(place)
    context = chat_setup.context_length(config)
    if engine == "vllm":
        folder = ensure_local(place).folder
        stops = _stops(place.name, tokenizer, chat_template, load.load_generation_config(folder))
        return vllm.open_model(folder, tokenizer, stops, context)
    if not place.gguf:
        raise ModelError(
            _("llama.cpp only reads .gguf files"),
            place=place.name,
            remedy=f"tongwen convert {place.name} --to gguf --out …",
        )
    file = str(Path(place.folder) / place.gguf)
    with console.waiting(_("opening {place}").format(place=place.name)):
        backend = llamacpp.open_file(
            file, tokenizer, _stops(place.name, tokenizer, chat_template, None), config, context, rows
        )
    if backend.context < context:
        console.notice(
            _(
                "the context is limited to {available:,} of the model's {context:,} tokens: more do not fit in memory"
            ).format(available=backend.context, context=context)
        )
    return backend


def _stops(model: str, tokenizer: Any, chat_template: Template | None, generation_config: Any) -> tuple[int, ...]:
    stops = chat_setup.stop_ids(tokenizer, chat_template, generation_config)
    if not stops:
        raise ModelError(_("this model has no stop token to end an answer"), place=model)
    return stops
