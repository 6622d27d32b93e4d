"""Record a run's progress: metrics.jsonl, one object per line, and the progress bar in the terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tongwen.core import console
from tongwen.core.console import Bar, human_count
from tongwen.core.distributed import is_main_process
from tongwen.core.errors import NumbersError
from tongwen.core.i18n import _
from tongwen.recipe.training import Forgetting
from tongwen.train.metrics_file import read_metrics
from tongwen.train.phase import Phase

# TRL's names of what a preference's step says, and ours
OF_TRL = {"rewards/margins": "reward_margin", "rewards/accuracies": "reward_accuracy"}
FURTHER = ("divergence", "agreement", "preference_accuracy", "preference_margin")  # scores of some evaluations
FLAT_AFTER = 100  # steps after which a loss should have fallen


class MetricsCallback(TrainerCallback):
    """Write metrics.jsonl and update the progress bar.

    tokens:  cumulative tokens after each step of the whole stage, known from the plans
    to_beat: held-out bits per byte before the phase's first step
    """

    def __init__(self, file: Path, tokens: list[int], phase: Phase, bar: Bar, to_beat: float = math.inf) -> None:
        self.file, self.tokens, self.bar, self.to_beat = file, tokens, bar, to_beat
        self.before_steps, self.before_epochs = phase.steps_before, phase.epochs_before
        self.steps_per_epoch = phase.plan.steps_per_epoch
        self.started, self.first, self.before = time.monotonic(), phase.steps_before, 0.0
        self.scores: dict[str, float] = {}
        self.history: list[tuple[int, float]] = []
        self.losses: list[float] = []
        self.flat_from = 0  # the step of the last line
        self.rates: list[float] = []  # learning rates of the current step, by parameter group

    def begin(self, step: int, evaluations: Iterable[Sequence[float]] = ()) -> None:
        """Start at a step of this phase; drop the lines beyond it, which a resumed run writes again.

        evaluations: (step, bits per byte) from the checkpoint's manifest
        """
        self.started, self.first = time.monotonic(), self.before_steps + step
        kept = [line for line in read_metrics(self.file) if line["step"] <= self.first]
        self.before = kept[-1]["seconds"] if kept else 0.0
        found = {int(at): score for at, score in evaluations}
        self.to_beat = found.pop(0, self.to_beat)
        self.history = list(found.items())
        self.losses = [line["loss"] for line in kept if line["step"] > self.before_steps]
        self.flat_from = step
        if is_main_process():
            partial = self.file.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            partial.replace(self.file)  # atomic: the other processes read it too

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """(step, bits per byte) of all evaluations of this phase; step 0: before its first step, if it was evaluated."""
        return [*([(0, self.to_beat)] if math.isfinite(self.to_beat) else []), *self.history]

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, bits per byte) of the best held-out evaluation of this phase; ties: the first."""
        return min(self.history, key=lambda one: one[1]) if self.history else None

    def out_of_patience(self, patience: int | None) -> bool:
        """Return whether `patience` evaluations have passed since the best, which may be the one before the first step."""
        scores = [score for _, score in self.evaluations]
        return bool(patience and scores and len(scores) - 1 - scores.index(min(scores)) >= patience)

    @property
    def no_improvement(self) -> str:
        """A message when no evaluation beat the one before the first step, else empty."""
        if not self.best or self.best[1] < self.to_beat:
            return ""
        step, score = self.before_steps + self.best[0], self.best[1]
        return _(
            "no evaluation beat the one before training: held-out bits per byte {to_beat:.4f}, at best {score:.4f} at step {step}; is learning_rate right?"
        ).format(to_beat=self.to_beat, score=score, step=step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates = kwargs["lr_scheduler"].get_last_lr()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        step = self.before_steps + state.global_step
        seconds = time.monotonic() - self.started
        speed = (self.tokens[step - 1] - (self.tokens[self.first - 1] if self.first else 0)) / max(seconds, 1e-9)
        line = {
            "step": step,
            "epoch": round(self.before_epochs + state.global_step / self.steps_per_epoch, 4),
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens": self.tokens[step - 1],
            "tokens_per_second": round(speed, 2),
            "seconds": round(self.before + seconds, 3),
            "cpu_seconds": round(time.process_time(), 3),
            **{ours: logs[trls] for trls, ours in OF_TRL.items() if trls in logs},
            **self.scores,
        }
        if len(set(self.rates)) > 1:  # the embeddings' own group is the last
            line["embedding_learning_rate"] = self.rates[-1]
        self.scores = {}
        self.losses.append(logs["loss"])
        if self.flat_from < FLAT_AFTER <= state.global_step and (flat := describe_flat_loss(self.losses)):
            console.notice(flat)
        self.flat_from = state.global_step
        self._append(line)
        self.bar.update(step, f"loss {logs['loss']:.3f} · {human_count(round(speed))} tok/s")

    def on_scores(self, step: int, scores: dict[str, Any]) -> None:
        """Keep the scores of a held-out evaluation for the metrics line of its step."""
        self.history.append((step, scores["bits_per_byte"]))
        self.scores = {"held_out_loss": scores["loss"], "bits_per_byte": scores["bits_per_byte"]}
        self.scores |= {name: scores[name] for name in FURTHER if name in scores}
        self.scores |= {f"bits_per_byte_{name}": one["bits_per_byte"] for name, one in scores["groups"].items()}

    def _append(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def describe_flat_loss(losses: list[float]) -> str:
    """Return a message when the first FLAT_AFTER losses of a phase do not fall, else an empty text.

    The usual cause is a learning rate that is far off.
    """
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    if last <= 0.99 * first:
        return ""
    return _("the loss has not fallen in {flat_after} steps: {first:.3f} → {last:.3f}; is learning_rate right?").format(
        flat_after=FLAT_AFTER, first=first, last=last
    )


def flat_loss_in_phase(lines: list[dict[str, Any]], before_steps: int, last: int) -> str:
    """Return the same message from lines of metrics.jsonl, for the phase between two steps of the stage."""
    steps = [line["step"] for line in lines if before_steps + FLAT_AFTER <= line["step"] <= last]
    return (
        describe_flat_loss([line["loss"] for line in lines if before_steps < line["step"] <= steps[0]]) if steps else ""
    )


def check_forgetting(before: dict[str, Any], now: dict[str, Any], limits: Forgetting) -> None:
    """Report what has been forgotten beyond the recipe's limits; raise NumbersError at a limit that stops.

    before: scores by group; now: all scores. Each group's bits per byte is compared with what it was, and the divergence
    on the base's own answers with 0.
    """
    lower = _("lower learning_rate, or add text in that language (share: 0.3); --fork continues with another limit")
    for name, one in now["groups"].items():
        old, new = before[name]["bits_per_byte"], one["bits_per_byte"]
        rise = new / old - 1 if old else 0.0
        message = _("held-out bits per byte of {name} rose from {old:.4f} to {new:.4f} ({rise:+.1%})").format(
            name=name, old=old, new=new, rise=rise
        )
        _check_limit(rise, message, limits.warn, limits.stop, "forgetting.stop", lower)
    if (divergence := now.get("divergence")) is not None:
        message = _("divergence from the base's own answers: {divergence:.4f} nats per token").format(
            divergence=divergence
        )
        lower = _("lower learning_rate, or set `keep: 0.5`; --fork continues with another limit")
        warn, stop = limits.divergence_warn, limits.divergence_stop
        _check_limit(divergence, message, warn, stop, "forgetting.divergence_stop", lower)


def _check_limit(value: float, message: str, warn: float | None, stop: float | None, key: str, remedy: str) -> None:
    if stop is not None and value >= stop:
        raise NumbersError(message, place=f"{key}: {stop:g}", remedy=remedy)
    if warn is not None and value >= warn:
        console.notice(message)


def peak_memory_bytes() -> int | None:
    """Return the peak memory of the GPU (None if it keeps no statistics, as mps), or without a GPU of this process."""
    import torch

    if device := torch.accelerator.current_accelerator(check_available=True):
        max_memory_allocated = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return int(max_memory_allocated()) if max_memory_allocated else None
    try:  # getrusage's figure is inherited from a larger parent through exec; this one is not
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import psutil

        facts = psutil.Process().memory_info()
        return int(getattr(facts, "peak_wset", facts.rss))
