"""The stages of a recipe by name. Each is a module of this package with `settings`, `check_ahead` and `run`."""

from __future__ import annotations

from tongwen.stages import evaluate, export, merge, prefer, prepare, pretrain, sft, synthesize, vocab
from tongwen.workflows.pipeline import Stages

STAGES: Stages = {
    "synthesize": synthesize,
    "prepare": prepare,
    "vocab": vocab,
    "pretrain": pretrain,
    "sft": sft,
    "prefer": prefer,
    "merge": merge,
    "evaluate": evaluate,
    "export": export,
}
