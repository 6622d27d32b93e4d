"""Generate with vLLM in this process, if it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tongwen.core.errors import MissingPackage, ModelError
from tongwen.core.i18n import _
from tongwen.infer.generation import ROWS, OnAnswer, Sampling, TextGenerator

CHUNK_PROMPTS = 1024  # prompts per call: vLLM batches them itself, and answers are saved after each call


@dataclass(frozen=True)
class VllmBackend(TextGenerator):
    """A generator whose model is vLLM's `LLM`."""

    def answer_all(
        self, prompts: Sequence[list[int]], sampling: Sampling, on_answer: OnAnswer, rows: int = ROWS
    ) -> None:
        """As in the base class, but vLLM itself decides how many prompts it answers at a time; `rows` has no effect."""
        from vllm import SamplingParams

        if sampling.beams > 1:
            raise ModelError(_("this engine does not support beam search"), remedy="--engine batched")
        for prompt in prompts:
            self._check_fits(prompt, sampling)
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed,
            stop_token_ids=list(self.stop_ids),
            detokenize=False,
        )
        for begin in range(0, len(prompts), CHUNK_PROMPTS):
            requests = [{"prompt_token_ids": prompt} for prompt in prompts[begin : begin + CHUNK_PROMPTS]]
            for index, answer in enumerate(self.model.generate(requests, params, use_tqdm=False), begin):
                on_answer(index, self._until_stop(list(answer.outputs[0].token_ids)))


def open_model(folder: str, tokenizer: Any, stop_ids: tuple[int, ...], context: int) -> VllmBackend:
    """Open a model folder with vLLM. Raises MissingPackage."""
    try:
        from vllm import LLM
    except ImportError:
        raise MissingPackage("vllm", "vLLM", "vllm") from None
    return VllmBackend(LLM(model=folder), tokenizer, stop_ids, context)
