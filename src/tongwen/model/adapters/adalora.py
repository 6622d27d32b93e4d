"""AdaLoRA: distribute a rank budget over the modules. peft has the layers and the rank allocator, the rest is here.

peft leaves three things to the training loop: a second loss, a call after each optimizer step, and allocator state that
its checkpoints do not contain. The trained adapter is saved as an equivalent ordinary LoRA.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tongwen.model.adapters.config import adapter_type

ALLOCATOR_STATE = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # the allocator's dicts: tensor -> its statistics
ADAPTER_MARKERS = ("lora_", "modules_to_save", "trainable_tokens")  # in the names of tensors that peft adds


def configure(rank: int, steps: int, settings: dict[str, Any]) -> Any:
    """Return peft's configuration: start with 1.5 times the rank, and prune it from 10% to 70% of the steps."""
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        **settings,
        init_r=rank + max(1, rank // 2),  # peft cannot prune if init_r equals target_r
        target_r=rank,
        tinit=steps // 10,
        tfinal=max(1, 3 * steps // 10),
        deltaT=max(1, steps // 100),
        total_step=max(steps, 3),
    )


class AdaLoraAllocator:
    """The parts of AdaLoRA that peft leaves to the training loop."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def penalty(self) -> torch.Tensor:
        """Return AdaLoRA's second loss (): how far A and B are from orthogonal.

        peft adds it only when the model computes its own loss.
        """
        far = [
            torch.linalg.norm(
                (part @ part.T if "lora_A" in name else part.T @ part) - torch.eye(min(part.shape)).to(part)
            )
            for name, part in self.model.named_parameters()
            if ("lora_A" in name or "lora_B" in name) and part.requires_grad
        ]
        return torch.stack(far).mean() * self.model.active_peft_config.orth_reg_weight

    def update_ranks(self, step: int) -> None:
        """Mask the least important ranks. Call after the optimizer's step, while the gradients still exist."""
        self.model.base_model.update_and_allocate(step)

    def reach_target_rank(self) -> int:
        """Prune to the recipe's rank, also after a run that ended early. Returns how many ranks were removed."""
        allocator, config = self.model.base_model.rankallocator, self.model.active_peft_config
        left = sum(map(sum, config.rank_pattern.values())) if config.rank_pattern else allocator.init_bgt
        if left <= allocator.target_bgt:
            return 0
        config.rank_pattern = allocator.mask_to_budget(self.model.base_model.model, allocator.target_bgt)
        return int(left - allocator.target_bgt)

    def save(self, folder: Path) -> None:
        """Save the masked ranks and the allocator's state, which peft's own file does not contain."""
        allocator, pattern = self.model.base_model.rankallocator, self.model.active_peft_config.rank_pattern
        state = {f"{kind}/{name}": part for kind in ALLOCATOR_STATE for name, part in getattr(allocator, kind).items()}
        state |= {f"weight/{name}": part.detach().clone() for name, part in self._weights().items()}
        save_file({name: part.contiguous() for name, part in state.items()}, str(folder / "budget.safetensors"))
        (folder / "budget.json").write_text(json.dumps(pattern), encoding="utf-8")

    def load(self, folder: Path) -> None:
        allocator, device = self.model.base_model.rankallocator, str(next(self.model.parameters()).device)
        for kind in ALLOCATOR_STATE:
            getattr(allocator, kind).clear()
        with torch.no_grad():
            for key, tensor in load_file(str(folder / "budget.safetensors"), device).items():
                kind, name = key.split("/", 1)
                if kind == "weight":
                    self._weights()[name].copy_(tensor)
                else:
                    getattr(allocator, kind)[name] = tensor
        self.model.active_peft_config.rank_pattern = json.loads((folder / "budget.json").read_text(encoding="utf-8"))

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        """Return the adapter's parameters, also those that are frozen in this phase."""
        return {
            name: part
            for name, part in self.model.named_parameters()
            if any(marker in name for marker in ADAPTER_MARKERS)
        }


def write_as_lora(folder: Path) -> None:
    """Rewrite a saved AdaLoRA adapter as an equivalent ordinary LoRA with a rank for each module.

    B (E A) x alpha / (initial rank) becomes (scaled B) (E A), which any program that reads LoRA can load.
    """
    from peft import LoraConfig

    file = folder / "adapter_model.safetensors"
    config, old = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")), load_file(str(file))
    scale = config["lora_alpha"] / (config["init_r"] + 1e-5)  # as peft computes it
    new, ranks = {name: part for name, part in old.items() if ".lora_" not in name}, dict[str, int]()
    for name in (name.removesuffix(".lora_A") for name in old if name.endswith(".lora_A")):
        importance = old[f"{name}.lora_E"]
        if rank := len(importance):
            ranks[name.removeprefix("base_model.model.")] = rank
            new[f"{name}.lora_A.weight"] = old[f"{name}.lora_A"] * importance
            new[f"{name}.lora_B.weight"] = old[f"{name}.lora_B"] * scale
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config["base_model_name_or_path"],
        r=1,
        lora_alpha=1,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(ranks),
        modules_to_save=config["modules_to_save"],
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file({name: part.contiguous() for name, part in new.items()}, str(file), metadata={"format": "pt"})


def rank_allocator(model: Any) -> AdaLoraAllocator | None:
    return AdaLoraAllocator(model) if adapter_type(model) == "ADALORA" else None
