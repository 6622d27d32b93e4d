"""Audit every run, so that one that would learn nothing, or the wrong thing, stops before it costs hours.

Before the run it checks that documents of a pack do not see each other and that every trainable tensor gets a gradient.
(LoRA's A starts without one because B is zero, so B is disturbed in a throw-away backward.) During the run it checks that
every gradient is finite and that no frozen tensor has one.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from tongwen.core.errors import NumbersError
from tongwen.core.i18n import _
from tongwen.train.packing import Loss, pack, pad, to_device
from tongwen.train.parallel import local, true_on_any_rank


def check_isolation(model: Any, samples: list[Any], loss: Loss) -> float:
    """Score two samples in one pack and each alone, with the run's attention; raise NumbersError when the scores differ.

    samples: two (ids, learn) pairs; only their first 64 tokens are used. Returns the largest difference in nats.
    """
    short = _shortened(samples)
    together = score(model, pack(short), loss)
    alone = torch.cat([score(model, pack([one]), loss) for one in short])
    worst = float((together - alone).abs().max())
    limit = limit_of(model)
    if not worst <= limit:
        raise NumbersError(
            _("documents in one pack can see each other: a score changes by {worst:.3g} nats (limit {limit:g})").format(
                worst=worst, limit=limit
            ),
            place=f"attention {getattr(model.config, '_attn_implementation', '?')}",
            remedy="packing: false",
        )
    return worst


def check_no_state_passes(model: Any, samples: list[Any], loss: Loss) -> float:
    """Raise NumbersError when another first document changes the scores of a pack's second one.

    Both packs have the same shape, so that kernels compute the same numbers: the limit can be far below that of
    `check_isolation`, as a short convolution may let a little of only three tokens through. Returns the largest
    difference in nats.
    """
    (ids, learn), second = _shortened(samples)
    vocabulary = model.config.get_text_config().vocab_size
    other = ((ids.astype(np.int64) + 1) % vocabulary, learn)
    before, after = (
        score(model, pack([first, second]), loss)[-(len(second[0]) - 1) :] for first in ((ids, learn), other)
    )
    worst = float((before - after).abs().max())
    limit = limit_of(model) / 20
    if not worst <= limit:
        raise NumbersError(
            _("documents in one pack can see each other: a score changes by {worst:.3g} nats (limit {limit:g})").format(
                worst=worst, limit=limit
            ),
            place=type(model).__name__,
            remedy="packing: false",
        )
    return worst


def check_own_attention(model: Any, sample: Any, loss: Loss, own: AbstractContextManager[None]) -> None:
    """Raise NumbersError unless a sample scores the same in packed attention and, inside `own`, in the model's own."""
    one = _shortened([sample])
    packed = score(model, pack(one), loss)
    with own:
        padded = score(model, pad(one), loss)
    worst = float((packed - padded).abs().max())
    if not worst <= limit_of(model):
        raise NumbersError(
            _("packed attention changes a score by {worst:.3g} nats").format(worst=worst),
            place="packing",
            remedy="packing: false",
        )


def check_causal(model: Any, batch: dict[str, Any], loss: Loss) -> None:
    """Raise NumbersError when the score of a token depends on later ones, which the model would learn to copy.

    batch: one sample, of which all tokens behind the first learned one, then behind the middle of the learned ones, are
    replaced. Models that fill gaps in a text (BERT) can be opened as language models, but see the whole text.
    """
    expected, rows = score(model, batch, loss), batch["rows"]
    for place in {0, len(rows) // 2}:
        changed = batch | {"input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, rows[place] + 1 :] = changed["input_ids"][0, rows[place]]
        apart = (expected - score(model, changed, loss))[: place + 1].abs()
        if not float(apart.max()) <= limit_of(model):
            raise NumbersError(
                _("the score of a token depends on a later token: this model is no causal language model"),
                place="audit",
                remedy=_("use a model for text generation, such as Qwen/Qwen3-0.6B"),
            )


def score(model: Any, batch: dict[str, Any], loss: Loss) -> torch.Tensor:
    """Return the nats of each learned token of a batch, without training."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        _unused, nats = loss(model, to_device(batch, model))
    model.train(was_training)
    return nats


def limit_of(model: Any) -> float:
    """Return how far two ways of computing the same scores may be apart, in nats."""
    return 2e-3 if next(model.parameters()).dtype == torch.float32 else 0.3


def _shortened(samples: list[Any]) -> list[Any]:
    """Return the first 64 tokens of (ids, learn) pairs, all of them learned."""
    short = [(ids[:64], learn[:64].copy()) for ids, learn in samples]
    for _unused, learn in short:
        learn[1:] = True
    return short


def probe_gradients(model: Any, batch: dict[str, Any], loss: Loss) -> list[str]:
    """Run one throw-away backward with every all-zero trainable matrix disturbed; restore weights and random state.

    Returns the names of trainable tensors that no token reached (experts that were not chosen).
    Raises NumbersError when nothing is trainable, the loss is not sane, a trainable tensor has no gradient, or
    a gradient is not finite or belongs to a frozen tensor.
    """
    trainable = {name: part for name, part in model.named_parameters() if part.requires_grad}
    if not trainable:
        raise NumbersError(_("no parameter is trainable"), place="audit")
    generator = torch.Generator().manual_seed(0)
    filled = true_on_any_rank((part.detach() for part in trainable.values()), torch.any)
    zeros = [local(part) for part, some in zip(trainable.values(), filled, strict=True) if not some]
    was_training = model.training
    model.train()
    with torch.random.fork_rng():
        with torch.no_grad():
            for part in zeros:
                part.copy_((torch.randn(part.shape, generator=generator) * 0.02).to(part))
        try:
            total, nats = loss(model, to_device(batch, model))
            mean = check_loss(float(total.detach()), len(nats), model)
            if not total.requires_grad:
                raise NumbersError(_("the loss does not depend on any trainable tensor"), place="audit (F-01)")
            (total / max(len(nats), 1)).backward()
            unreached = _check_gradients(model, trainable, mean)
        finally:
            with torch.no_grad():
                for part in zeros:
                    part.zero_()
            model.zero_grad(set_to_none=True)
    model.train(was_training)
    return unreached


def _check_gradients(model: Any, trainable: dict[str, torch.nn.Parameter], loss: float) -> list[str]:
    check_frozen(model, "audit")
    reached = {name: part.grad for name, part in trainable.items() if part.grad is not None}
    some = dict(zip(reached, true_on_any_rank(reached.values(), torch.any), strict=True))
    none = [name for name in trainable if not some.get(name)]
    broken = [name for name, one in zip(reached, true_on_any_rank(reached.values(), is_broken), strict=True) if one]
    if broken:
        raise NumbersError(
            _("{count} gradients are not finite (loss {loss:.4g})").format(count=len(broken), loss=loss),
            place=f"audit · {broken[0]}",
            remedy="precision: fp32",
        )
    # Experts that the router did not choose, and rows of tokens that this batch does not contain, may learn later.
    routed = [name for name in none if "expert" in name or "trainable_tokens_" in name]
    dead = [name for name in none if name not in routed and not name.endswith(".bias")]
    if dead:
        raise NumbersError(
            _("{dead_count} of {trainable_count} trainable tensors get no gradient and would never learn").format(
                dead_count=len(dead), trainable_count=len(trainable)
            ),
            place=f"audit (F-02) · {dead[0]}",
            remedy=_("remove it from the targets, or check that the layer is used"),
        )
    return none


def check_frozen(model: Any, when: str) -> None:
    """Raise NumbersError when a frozen tensor has a gradient."""
    for name, part in model.named_parameters():
        if not part.requires_grad and part.grad is not None:
            raise NumbersError(_("a frozen tensor has a gradient"), place=f"{when} · {name}")


def check_loss(total: float, learned: int, model: Any) -> float:
    """Return the mean nats per learned token. Raise NumbersError when not finite, or far above random guessing."""
    mean = total / max(learned, 1)
    limit = 3 * math.log(model.config.get_text_config().vocab_size)
    if not math.isfinite(mean) or mean > limit:
        raise NumbersError(
            _("the first loss is {mean:.4g} nats per token; random guessing would give {limit:.3g}").format(
                mean=mean, limit=limit / 3
            ),
            place="audit",
            remedy=_("the weights do not match this architecture or tokenizer"),
        )
    return mean


def first_not_finite(model: Any, optimizer: Any = None, *, frozen: bool = False) -> str | None:
    """Return the name of a trained tensor, or of its optimizer state, with NaN or infinity in this process's part, else None.

    frozen: check frozen tensors as well.
    """
    names = {part: name for name, part in model.named_parameters() if frozen or part.requires_grad}
    # bitsandbytes may store packed 4-bit weights in a bf16 tensor; its values are no numbers.
    held = [(name, part.detach()) for part, name in names.items() if getattr(part, "quant_state", None) is None]
    for part, kept in optimizer.state.items() if optimizer else ():
        held += [
            (f"{names.get(part, 'sharded')} · {key}", value)
            for key, value in kept.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]
    return next((name for name, part in held if bool(is_broken(local(part)))), None)


def is_broken(part: torch.Tensor) -> torch.Tensor:
    """Return a () bool tensor: whether any element is NaN or infinite."""
    return ~torch.isfinite(part).all()


def check_finite_base(model: Any) -> None:
    """Raise NumbersError with the name of a tensor that contains NaN or infinity before training."""
    if (name := first_not_finite(model, frozen=True)) is not None:
        raise NumbersError(
            _("this tensor of the base contains NaN or infinity"),
            place=name,
            remedy=_("get the base again: tongwen verify BASE"),
        )


class FirstStepsAudit(TrainerCallback):
    """Check at the first optimizer step of a run or a resume that exactly the trainable tensors have gradients."""

    def __init__(self) -> None:
        self.done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.done:
            return
        self.done = True
        check_frozen(model, "step 1")
        for name, part in model.named_parameters():
            if part.requires_grad and part.grad is None:
                raise NumbersError(_("a trainable tensor has no gradient"), place=f"step 1 · {name}")
