"""Check each step before it is taken, on all processes together, so that either all of them stop or none.

A NaN does not stop a plain transformers run: it finishes and reports a loss of 0.0. The guard checks the losses of a
step's micro-batches and the norm of its gradient before the weights move, so that the last checkpoint stays good. In the
same exchange the processes agree whether to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from tongwen.core.errors import NumbersError
from tongwen.core.i18n import _
from tongwen.train.packing import BatchPlan
from tongwen.train.parallel import local

SKIPS = 20  # fp16 overflows in a row; halving the scale more often does not help: the loss itself does not fit
ABSURD = 10  # steps in a row with a loss above that of random guessing
MARGIN = 2.0  # nats


@dataclass
class StepLosses:
    """Losses of the step that this process is computing.

    nats:    summed loss of each micro-batch, 0-dimensional tensors that stay on the device
    learned: learned tokens of the step over all processes
    """

    nats: list[torch.Tensor] = field(default_factory=list)
    learned: Any = 1


class NanGuard(TrainerCallback):
    """Raise NumbersError on every process when a loss or the gradient is not finite, or the loss is absurdly high.

    origin:          where a sample came from: file and row
    gather:          takes this process's (1, N) row, returns the (W, N) rows of all processes
    stop_requested:  whether this process was asked to stop
    last_checkpoint: names the last checkpoint, for messages
    """

    def __init__(
        self,
        plan: BatchPlan,
        origin: Callable[[int], Any],
        gather: Callable[[torch.Tensor], torch.Tensor],
        stop_requested: Callable[[], bool],
        last_checkpoint: Callable[[], str],
        before_steps: int,
        vocabulary: int,
    ) -> None:
        self.plan, self.origin, self.gather, self.stop_requested, self.last_checkpoint = (
            plan,
            origin,
            gather,
            stop_requested,
            last_checkpoint,
        )
        self.before_steps, self.absurd = before_steps, math.log(vocabulary) + MARGIN
        self.step, self.stopping = StepLosses(), False
        self.high = self.skipped = self.skipped_in_a_row = 0

    def note(self, nats: torch.Tensor, learned: Any) -> None:
        """Record the loss of a micro-batch and the learned tokens of its step."""
        self.step.nats.append(nats.detach().float())
        self.step.learned = learned

    def check(self, index: int, norm: Any, model: Any, *, scaled: bool) -> None:
        """Check step `index` of the phase before it is taken.

        norm: of the whole gradient; scaled: whether a gradient scaler skips steps that overflow
        """
        step, self.step = self.step, StepLosses()
        flags = (torch.as_tensor(value).to(step.nats[0]) for value in (norm, self.stop_requested()))
        row = torch.stack([*step.nats, *flags])
        ranks = self.gather(row[None]).tolist()  # (W, accumulate + 2)
        self.stopping = any(rank[-1] for rank in ranks)
        losses, norms = [rank[:-2] for rank in ranks], [rank[-2] for rank in ranks]
        self._check_finite(index, losses, [] if scaled else norms, model)  # recorded losses are unscaled
        if scaled:
            self._count_skip(index, not all(map(math.isfinite, norms)))
        self._check_sane(index, sum(map(sum, losses)) / max(float(step.learned), 1.0))

    def should_stop(self, device: torch.device) -> bool:
        """Return, after the last step, whether any process was asked to stop, even since the last check."""
        flag = torch.tensor([float(self.stopping or self.stop_requested())], device=device)
        return bool(self.gather(flag).any())

    def _check_finite(self, index: int, losses: list[list[float]], norms: list[float], model: Any) -> None:
        bad = [
            slot * len(losses) + rank
            for rank, row in enumerate(losses)
            for slot, loss in enumerate(row)
            if not math.isfinite(loss)
        ]
        samples = [sample for place in bad for sample in self.plan.micro[index][place]]
        if bad:
            first, count = bad[0] + 1, len(self.plan.micro[index])
            problem = _("the loss is NaN or infinite in micro-batch {first} of {count}").format(
                first=first, count=count
            )
        elif not all(map(math.isfinite, norms)):
            names = [
                name
                for name, part in model.named_parameters()
                if part.grad is not None and not bool(torch.isfinite(local(part.grad)).all())
            ]
            problem = _("the gradient is NaN or infinite ({count} tensors, first {names})").format(
                count=len(names), names=names[:1]
            )
        else:
            return
        rows = self._rows(samples or self.plan.steps[index])
        self._stop(
            index,
            _("{problem}; rows {rows}").format(problem=problem, rows=rows),
            _("lower learning_rate, or precision: fp32"),
        )

    def _check_sane(self, index: int, loss: float) -> None:
        self.high = self.high + 1 if loss > self.absurd else 0
        if self.high == ABSURD:
            self._stop(
                index,
                _(
                    "the loss is {loss:.2f} and was above {limit:.2f} for {steps} steps; random guessing gives {chance:.2f}"
                ).format(loss=loss, limit=self.absurd, steps=ABSURD, chance=self.absurd - MARGIN),
                _("lower learning_rate"),
            )

    def _count_skip(self, index: int, skipped: bool) -> None:
        """Count skipped steps by the norm: a fused optimizer skips inside its step, which accelerate counts as taken."""
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row > SKIPS:
            self._stop(
                index,
                _("fp16 overflowed in {skipped_in_a_row} steps in a row; none of them updated the weights").format(
                    skipped_in_a_row=self.skipped_in_a_row
                ),
                _("precision: bf16 (or fp32 if the device has no bf16)"),
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def _rows(self, samples: Any) -> str:
        shown = ", ".join(str(self.origin(sample)) for sample in samples[:8])
        return shown + (f" … ({len(samples)})" if len(samples) > 8 else "")

    def _stop(self, index: int, problem: str, remedy: str) -> None:
        raise NumbersError(
            problem,
            place=_("step {before_steps}").format(before_steps=self.before_steps + index + 1),
            remedy=f"{remedy}; {self.last_checkpoint()}",
        )
