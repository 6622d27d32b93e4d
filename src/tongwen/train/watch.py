"""What a run tells while it goes: metrics.jsonl, one object a line, and the bar in the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tongwen.console import Bar, human_count


class Watch(TrainerCallback):
    """Writes metrics.jsonl and moves the bar. tokens: cumulative tokens after each step, known from the plan."""

    def __init__(self, file: Path, tokens: list[int], steps_per_epoch: int, bar: Bar) -> None:
        self.file, self.tokens, self.steps_per_epoch, self.bar = file, tokens, steps_per_epoch, bar
        self.started, self.first, self.before = time.monotonic(), 0, 0.0
        self.scores: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run drops the lines beyond its checkpoint: they will be written again."""
        self.started, self.first = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        lines = read_metrics(self.file)
        kept = [line for line in lines if line["step"] <= state.global_step]
        self.before = kept[-1]["seconds"] if kept else 0.0
        self.file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        step = state.global_step
        seconds = time.monotonic() - self.started
        speed = (self.tokens[step - 1] - (self.tokens[self.first - 1] if self.first else 0)) / max(seconds, 1e-9)
        line = {
            "step": step,
            "epoch": round(step / self.steps_per_epoch, 4),
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens": self.tokens[step - 1],
            "tokens_per_second": round(speed, 2),
            "seconds": round(self.before + seconds, 3),
            "cpu_seconds": round(time.process_time(), 3),
            **self.scores,
        }
        self.scores = {}
        self._append(line)
        self.bar.update(step, f"loss {logs['loss']:.3f} · {human_count(round(speed))} tok/s")

    def on_scores(self, scores: dict[str, float]) -> None:
        """A held-out evaluation in the middle of the run: it stands in the next line that is logged."""
        self.scores = {"held_out_loss": scores["loss"], "bits_per_byte": scores["bits_per_byte"]}

    def _append(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a line that a crash cut short is left out."""
    if not file.is_file():
        return []
    out = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def peak_memory_bytes() -> int:
    """Peak memory: of the GPU where there is one, else the resident set of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:  # getrusage's figure is inherited from a larger parent through exec; this one is not
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import psutil

        facts = psutil.Process().memory_info()
        return int(getattr(facts, "peak_wset", facts.rss))
