"""Generate answers: greedy or sampled, one or a batch, streamed in whole characters."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from queue import Queue
from typing import Any, ClassVar, NamedTuple

import torch

from tongwen.core.errors import ModelError, NumbersError, RecipeError
from tongwen.core.i18n import _

# option: (low, high)
RANGES = {
    "max_new_tokens": (1, 1 << 20),
    "temperature": (0, 2),
    "top_p": (1e-6, 1),
    "top_k": (0, 1 << 20),
    "repetition_penalty": (0.01, 10),
    "beams": (1, 64),
    "min_new_tokens": (0, 1 << 20),
    "seed": (-(1 << 63), (1 << 63) - 1),  # of torch
}
SHARES = ("temperature", "top_p", "repetition_penalty")  # the options that are no whole numbers


@dataclass(frozen=True)
class Sampling:
    """Sampling options. temperature 0: always the likeliest token, so always the same answer. Raises RecipeError for an
    option outside its range."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    beams: int = 1
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            if not isinstance(value, int) and name not in SHARES:
                raise RecipeError(_("{value} is not a whole number").format(value=value), place=name)
            if not low <= value <= high:
                raise RecipeError(
                    _("{value} is out of range").format(value=value), place=name, remedy=f"{low} … {high}"
                )

    def generation_kwargs(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.repetition_penalty != 1.0:
            options["repetition_penalty"] = self.repetition_penalty
        if self.beams > 1:
            options |= {"num_beams": self.beams, "early_stopping": True}
        if self.min_new_tokens:
            options["min_new_tokens"] = self.min_new_tokens
        return options

    def override(self, **changes: Any) -> Sampling:
        unknown = sorted(set(changes) - set(asdict(self)))
        if unknown:
            raise ModelError(
                _("unknown option: {unknown}").format(unknown=_(", ").join(unknown)),
                remedy=", ".join(asdict(self)),
            )
        return replace(self, **changes)


CACHE = 1 << 30  # bytes for keys and values on a CPU, whose free memory other programs need
ROWS = 32  # prompts per batch: twice as fast as 8 on one core; more is not faster (bench/generate_cpu.py)
PAGE = 32  # tokens per block of the paged cache
OnAnswer = Callable[[int, list[int]], None]
"""called with the index of a prompt and its new ids"""


class TokenLogprob(NamedTuple):
    """A token of an answer, its log probability before temperature and top_p, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Logprobs:
    """A request for log probabilities. top: how many of the likeliest tokens; put: called with every token of the answer."""

    top: int
    put: Callable[[TokenLogprob], None]


@dataclass(frozen=True)
class TextGenerator:
    """A model that generates. stop_ids: end an answer; context: maximum number of tokens; paged: answer many prompts from one
    paged cache, in which the next prompt takes the blocks of a finished answer; shown: control tokens that are part of the
    text of an answer, such as the marks of a tool call."""

    model: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    context: int
    paged: bool = False
    shown: frozenset[int] = frozenset()
    gives_logprobs: ClassVar[bool] = True

    def answer_all(
        self, prompts: Sequence[list[int]], sampling: Sampling, on_answer: OnAnswer, rows: int = ROWS
    ) -> None:
        """Call `on_answer` with the new ids of each prompt as soon as they are complete. A batch has at most `rows`
        prompts, and no more than fit into the cache."""
        for prompt in prompts:
            self._check_fits(prompt, sampling)
        capacity = cache_tokens(self.model)
        if self.paged:
            self._answer_paged(prompts, sampling, on_answer, rows, capacity)
            return
        for indices in make_batches([len(prompt) for prompt in prompts], sampling, rows, capacity):
            answers = self.answer([prompts[index] for index in indices], sampling)
            for index, answer in zip(indices, answers, strict=True):
                on_answer(index, answer)

    def _answer_paged(
        self, prompts: Sequence[list[int]], sampling: Sampling, on_answer: OnAnswer, rows: int, capacity: int
    ) -> None:
        """Use transformers' continuous batching with a limited cache: by default it takes most of the free memory."""
        from transformers import ContinuousBatchingConfig

        if sampling.beams > 1:
            raise ModelError(_("the paged cache does not support beam search"), remedy="--engine batched")
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=max(capacity // PAGE, math.ceil((max(map(len, prompts)) + sampling.max_new_tokens) / PAGE) + 1),
            max_batch_tokens=max(4 * rows, 256),
            max_requests_per_batch=rows,
            return_logprobs=True,
            seed=sampling.seed,
        )
        with self.model.continuous_batching_context_manager(
            generation_config=self._config(sampling), continuous_batching_config=config, block=True, timeout=5
        ) as manager:
            waiting = {
                manager.add_request(
                    prompt, max_new_tokens=self._limit_new_tokens(len(prompt), sampling).max_new_tokens
                ): index
                for index, prompt in enumerate(prompts)
            }
            while waiting:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise ModelError(_("continuous batching ended early"), remedy="--engine batched")
                if result is None or not result.is_finished():
                    continue
                if result.error:
                    raise ModelError(str(result.error), place="continuous batching", remedy="--engine batched")
                if any(map(math.isnan, result.logprobs)):
                    raise _nan()
                on_answer(waiting.pop(result.request_id), self._until_stop(list(result.generated_tokens)))

    @property
    def postprocess(self) -> Callable[[str], str] | None:
        """The tokenizer's repair of decoded text, character for character (ChatGLM's full-width punctuation), or None."""
        return getattr(self.tokenizer, "fix_punctuation", None)

    def answer(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[int]]:
        """Return the new token ids of each prompt, without the stop token. Prompts are padded on the left."""
        for prompt in prompts:
            self._check_fits(prompt, sampling)
        longest = max(map(len, prompts))
        device = self.model.device
        ids = torch.zeros((len(prompts), longest), dtype=torch.long, device=device)  # (B, L)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, longest - len(prompt) :] = 1
        out = self._generate(ids, mask, sampling)[:, longest:].tolist()
        return [self._until_stop(row) for row in out]

    def stream(
        self,
        prompt: list[int],
        sampling: Sampling,
        on_token: Callable[[int], None] = lambda index: None,
        logprobs: Logprobs | None = None,
    ) -> Generator[str, None, None]:
        """Yield the answer's text in pieces; together they are exactly the decoded answer. on_token: called with every new
        token, including the stop token; an exception that it raises ends the answer."""
        self._check_fits(prompt, sampling)
        if logprobs and not self.gives_logprobs:
            raise ModelError(_("this engine gives no log probabilities"), remedy="--engine batched")
        if sampling.beams > 1:
            raise ModelError(_("beam search cannot stream its output"), remedy="--beams 1")
        with closing(self._new_ids(prompt, sampling, *([logprobs] if logprobs else []))) as ids:
            yield from self._postprocessed(self._pieces(ids, on_token))

    def _new_ids(
        self, prompt: list[int], sampling: Sampling, logprobs: Logprobs | None = None
    ) -> Generator[int, None, None]:
        """Yield the answer's tokens one by one, including the stop token; closing the generator ends the answer."""
        ids = torch.tensor([prompt], device=self.model.device)
        queue: Queue[Any] = Queue()
        cancel = threading.Event()

        def work() -> None:
            try:
                likelihoods = _Likelihoods(logprobs, self.stop_ids) if logprobs else None
                streamer = _ToQueue(queue, len(prompt), likelihoods)
                self._generate(ids, torch.ones_like(ids), sampling, streamer=streamer, cancel=cancel)
                queue.put(None)
            except BaseException as error:  # passed to the reader, which raises it
                queue.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            cancel.set()
            thread.join()

    def _pieces(self, ids: Iterator[int], on_token: Callable[[int], None]) -> Iterator[str]:
        text = StreamDecoder(self.tokenizer, self.shown)
        for index in ids:
            on_token(index)
            if index in self.stop_ids:
                continue
            if piece := text.add(index):
                yield piece
        if piece := text.rest().rstrip("\ufffd"):  # drop an incomplete character, as `decode` does
            yield piece

    def _postprocessed(self, pieces: Iterator[str]) -> Iterator[str]:
        """Repair the text as `decode` does. A character's repair may depend on the next one, so the last is held back."""
        if self.postprocess is None:
            yield from pieces
            return
        text, emitted = "", 0
        for piece in pieces:
            text += piece
            if emitted < len(text) - 1:
                yield self.postprocess(text)[emitted : len(text) - 1]
                emitted = len(text) - 1
        yield self.postprocess(text)[emitted:]

    def decode(self, ids: list[int]) -> str:
        """Return the text of an answer, without a last character that max_new_tokens cut in the middle."""
        text = decode(self.tokenizer, ids, self.shown)
        return self.postprocess(text.rstrip("\ufffd")) if self.postprocess else text.rstrip("\ufffd")

    def _generate(
        self, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling, streamer: Any = None, cancel: Any = None
    ) -> torch.Tensor:
        from transformers import StoppingCriteriaList

        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        sampling = self._limit_new_tokens(ids.shape[1], sampling)
        with torch.inference_mode():
            return self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._config(sampling),
                streamer=streamer,
                logits_processor=[_finite, *([streamer.likelihoods] if streamer and streamer.likelihoods else [])],
                stopping_criteria=StoppingCriteriaList([_Cancelled(cancel)]) if cancel else None,
            )

    def _config(self, sampling: Sampling) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            eos_token_id=list(self.stop_ids),
            pad_token_id=self.stop_ids[0],
            use_cache=True,
            **sampling.generation_kwargs(),
        )

    def _until_stop(self, row: list[int]) -> list[int]:
        stops = [position for position, index in enumerate(row) if index in self.stop_ids]
        return row[: stops[0]] if stops else row

    def _limit_new_tokens(self, prompt: int, sampling: Sampling) -> Sampling:
        """Limit max_new_tokens to the context left after a prompt of this many tokens."""
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self.context - prompt))

    def _check_fits(self, prompt: list[int], sampling: Sampling) -> None:
        if len(prompt) + min(sampling.max_new_tokens, 1) > self.context:
            raise ModelError(
                _("the prompt has {count} tokens, but the model sees at most {context}").format(
                    count=len(prompt), context=self.context
                ),
                remedy=_("shorten it, or clear the history"),
            )


def make_batches(lengths: Sequence[int], sampling: Sampling, rows: int, capacity: int) -> Iterator[list[int]]:
    """Yield batches of prompt indices, the longest first. A batch has at most `rows` prompts, and their tokens, with the new
    ones and for every beam, fit into `capacity`. A prompt that needs more is a batch of its own."""
    remaining = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while remaining:
        needed_tokens = (lengths[remaining[0]] + sampling.max_new_tokens) * sampling.beams
        count = max(min(rows, capacity // needed_tokens), 1)
        yield remaining[:count]
        remaining = remaining[count:]


def cache_tokens(model: Any) -> int:
    """Return how many tokens the cache may hold: CACHE bytes on a CPU, half of the free memory on a GPU."""
    free_bytes = torch.cuda.mem_get_info()[0] // 2 if model.device.type == "cuda" else CACHE
    return int(free_bytes // cache_bytes(model.config, model.dtype.itemsize))


def cache_bytes(config: Any, item_size: int) -> int:
    """Return the cache's bytes per token for numbers of `item_size` bytes; 1 for a model without attention, whose state
    does not grow."""
    config = config.get_text_config()
    if getattr(config, "is_heterogeneous", False):  # layers with heads of different widths: Gemma 4
        return max(sum(_layer_bytes(layer, item_size) for layer in config.per_layer_config), 1)
    return max(int(config.num_hidden_layers) * _layer_bytes(config, item_size), 1)


def _layer_bytes(config: Any, item_size: int) -> int:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * groups * width * item_size)


class StreamDecoder:
    """Decodes token ids one at a time; returns a piece of text only when its last character is complete.

    The text of a token depends on its neighbours (bytes of one character, SentencePiece's spaces), so a short tail is decoded
    again with each new token, and the difference is returned.
    """

    def __init__(self, tokenizer: Any, shown: frozenset[int] = frozenset()) -> None:
        self.tokenizer, self.shown = tokenizer, shown
        self.ids: list[int] = []
        self.emitted = 0  # number of ids whose text has been returned
        self.tail = 0  # start of the ids before `emitted` that give the decoder its context
        # A run of SentencePiece's byte tokens is decoded as a whole: only its end shows whether the first byte is a
        # character of its own.
        self.bytes = _byte_ids(tokenizer)

    def add(self, index: int) -> str:
        self.ids.append(index)
        if index in self.bytes:
            return ""
        text = self._difference()
        if text.endswith("\ufffd"):
            return ""
        self.tail, self.emitted = self.emitted, len(self.ids)
        return text

    def rest(self) -> str:
        """Return the rest at the end; bytes that form no character appear as U+FFFD, as in `decode`."""
        text = self._difference()
        self.tail, self.emitted = self.emitted, len(self.ids)
        return text

    def _difference(self) -> str:
        before = self._decode(self.ids[self.tail : self.emitted])
        return self._decode(self.ids[self.tail :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self.tokenizer, ids, self.shown)


def decode(tokenizer: Any, ids: Sequence[int], shown: frozenset[int]) -> str:
    """Return the text of these ids without control tokens, except those that are shown."""
    if shown:
        hidden = _control_ids(tokenizer) - shown
        ids = [index for index in ids if index not in hidden]
    return str(tokenizer.decode(ids, skip_special_tokens=not shown, clean_up_tokenization_spaces=False))


@lru_cache(maxsize=8)
def _control_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(index for index, token in added.items() if token.special) | frozenset(tokenizer.all_special_ids)


@lru_cache(maxsize=8)
def _byte_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of `<0xNN>`. Cached, because finding them copies the whole vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return frozenset(vocabulary[piece] for byte in range(256) if (piece := f"<0x{byte:02X}>") in vocabulary)


class _Likelihoods:
    """transformers' processor interface: keeps the log probabilities of a step until its token is chosen."""

    def __init__(self, wanted: Logprobs, stop_ids: tuple[int, ...]) -> None:
        self.wanted, self.stop_ids = wanted, stop_ids
        self.last = torch.empty(0)  # (V)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.last = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def choose(self, index: int) -> None:
        if index in self.stop_ids:
            return
        values, ids = self.last.topk(min(self.wanted.top, len(self.last)))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        self.wanted.put(TokenLogprob(index, float(self.last[index]), top))


class _ToQueue:
    """transformers' streamer interface: the prompt comes first, then one token at a time."""

    def __init__(self, queue: Queue[Any], skip: int, likelihoods: _Likelihoods | None = None) -> None:
        self.queue, self.skip, self.likelihoods = queue, skip, likelihoods

    def put(self, value: torch.Tensor) -> None:
        for index in value.flatten().tolist():
            if self.skip:
                self.skip -= 1
            else:
                if self.likelihoods:
                    self.likelihoods.choose(index)
                self.queue.put(index)

    def end(self) -> None:
        pass


class _Cancelled:
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def _finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Raise NumbersError for NaN logits, from which `generate` would draw a random token."""
    if bool(torch.isnan(scores).any()):
        raise _nan()
    return scores


def _nan() -> NumbersError:
    return NumbersError(_("the model gives NaN logits"), place="generate", remedy="precision: fp32 / bf16")
