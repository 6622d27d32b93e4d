"""The base's own greedy answers to fixed prompts: how far a model in training has moved from its base on them.

Bits per byte of other text can improve while a model answers less and less like its base. The divergence on what the
base itself says shows it, and needs forward passes only.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tongwen.core import artifact, console, distributed
from tongwen.core.control_tokens import separate_control_tokens
from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Message
from tongwen.data.token_store import SAMPLE, TokenStore
from tongwen.model.kernels.divergence import Likeliest
from tongwen.model.kernels.loss import learned_logits
from tongwen.model.loading import chat_setup
from tongwen.train.packing import MicroBatches, fill, to_device
from tongwen.train.parallel import broadcast_from_rank0
from tongwen.workflows.training.model import generate
from tongwen.workflows.training.own_prompts import MAX_NEW_TOKENS, own_prompts
from tongwen.workflows.training.types import PreparedModel, TrainingJob

FORMAT = 1  # part of the cache's key: raise it when the same base would answer otherwise


@dataclass(frozen=True)
class OwnAnswers:
    """The answers as samples whose learned positions are the answers, and the base's likeliest tokens of each micro-batch."""

    store: TokenStore
    batches: list[tuple[int, ...]]
    likeliest: list[Likeliest]

    def divergence(self, model: PreparedModel) -> dict[str, float]:
        """Return the mean KL(base || model) per answered token in nats, and the share of tokens on which both agree."""
        total, agreed, count = 0.0, 0, 0
        for batch, base in zip(_micro_batches(model, self.store, self.batches), self.likeliest, strict=True):
            nats, same = base.divergence(_logits(model, batch))
            total, agreed, count = total + float(nats.double().sum()), agreed + int(same.sum()), count + len(nats)
        return {"divergence": total / count, "agreement": agreed / count}


def make_own_answers(job: TrainingJob, model: PreparedModel, budget: int) -> OwnAnswers:
    """Return the base's own answers, from the cache if this base has answered before. Call it before the first step.

    budget: tokens of a micro-batch. Raises ModelError if there is no room for any.
    """
    rows = _answers(job, model)
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in rows], dtype=np.int64)
    ends = np.cumsum(lengths)
    begins = ends - [len(answer) for _unused, answer in rows]
    store = TokenStore(
        np.concatenate([[*prompt, *answer] for prompt, answer in rows]).astype(np.uint32),
        np.concatenate([[0], ends]),
        np.stack([begins, ends], axis=1),
        np.zeros(len(rows), SAMPLE),
        ("",),
    )
    batches = fill(store.lengths, budget)
    likeliest = [Likeliest.of(_logits(model, batch)) for batch in _micro_batches(model, store, batches)]
    return OwnAnswers(store, batches, likeliest)


def _micro_batches(model: PreparedModel, store: TokenStore, batches: list[tuple[int, ...]]) -> Any:
    micro = MicroBatches(store, batches, packed=model.packed)
    return (to_device(micro[index], model.model) for index in range(len(micro)))


def _logits(model: PreparedModel, batch: dict[str, Any]) -> torch.Tensor:
    was_training = model.model.training
    model.model.eval()
    with torch.no_grad(), model.computing():
        logits = learned_logits(model.model, batch)
    model.model.train(was_training)
    return logits


def _answers(job: TrainingJob, model: PreparedModel) -> list[tuple[list[int], list[int]]]:
    """Return pairs of ids, (prompt, answer). An answer is never empty: it holds at least its end."""
    prompts = _prompts(job, model)
    if not prompts:
        raise ModelError(
            _(
                "the model has no room for a prompt and {tokens} tokens of an answer, so nothing of the base can be kept"
            ).format(tokens=MAX_NEW_TOKENS),
            place=job.base,
            remedy=_("leave out `keep` and `forgetting.divergence_stop`"),
        )
    facts = {"base": model.base_fingerprint or job.base, "prompts": prompts, "made by": [FORMAT, str(model.dtype)]}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    file = artifact.cache_folder() / "own_answers" / f"{key}.json"
    answers = broadcast_from_rank0(_read(file, len(prompts)))
    if answers is None:
        began = time.process_time()
        with torch.random.fork_rng(), console.waiting(_("generating the base's own answers")):
            answers = generate(model, job.record_encoder.tokenizer, prompts, MAX_NEW_TOKENS)
            answers = [answer if len(answer) == MAX_NEW_TOKENS else [*answer, model.stops[0]] for answer in answers]
        console.info(
            _("{count} own answers of the base: {seconds:.0f} CPU seconds, kept for other runs of this base").format(
                count=len(answers), seconds=time.process_time() - began
            )
        )
        if distributed.is_main_process():
            file.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_json(file, answers)
    return list(zip(prompts, answers, strict=True))


def _prompts(job: TrainingJob, model: PreparedModel) -> list[list[int]]:
    """Return the ids of the prompts that the model has room to answer: in the base's own chat template if it has a usable
    one, else as plain text."""
    texts = own_prompts()
    tokenizer, encoder = job.record_encoder.tokenizer, job.record_encoder.encoder
    try:
        template = chat_setup.bind_template("own", tokenizer, encoder.prefix)
        texts = [template.prompt([Message("user", text)]) for text in texts]
    except (ModelError, RowRejected):
        texts = [separate_control_tokens(text, tuple(chat_setup.special_texts(tokenizer))) for text in texts]
    fitting = chat_setup.context_length(model.model.config) - MAX_NEW_TOKENS
    return [ids for text in texts if len(ids := encoder.encode_prompt(text)) <= fitting]


def _read(file: Path, count: int) -> list[list[int]] | None:
    """Return the answers in a file of the cache; None if there is none, or if it is damaged."""
    try:
        answers = [[int(index) for index in answer] for answer in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None
    return answers if len(answers) == count else None
