"""Adapters of small models for tests: made, disturbed, merged, and what a model says with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def disturb(adapted: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for part in adapted.parameters():
            if part.requires_grad:
                part.add_(torch.randn_like(part) * 0.05)


def make_adapter(base: Path, folder: Path, seed: int = 3, **options: Any) -> Any:
    """A peft model with disturbed adapter weights, saved; returns it live."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(model, LoraConfig(**options))
    disturb(adapted, seed)
    adapted.save_pretrained(str(folder))
    return adapted


def merged(tongwen: Any, base: Path, adapters: list[Path], out: Path, *flags: str) -> Path:
    """`tongwen merge`, which must succeed."""
    arguments = [word for adapter in adapters for word in ("--adapter", adapter)]
    code, _, err = tongwen("merge", "--base", base, *arguments, "--out", out, *flags)
    assert code == 0, err
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None]).logits


def live_logits(base: Path, *adapters: Path) -> torch.Tensor:
    """Of the last adapter, opened by peft, on a base with the others merged by peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for folder in adapters[:-1]:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return logits(PeftModel.from_pretrained(model, adapters[-1]))
