"""What is trained: the whole model, or low-rank adapters on it. Placed by peft; what peft leaves out is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tongwen.errors import ModelError
from tongwen.families import family_of
from tongwen.language import say
from tongwen.model.blocks import fuse_blocks
from tongwen.model.load import quiet
from tongwen.model.lora import fuse
from tongwen.recipe.schema import Adapter


@dataclass
class Adapted:
    """A model ready to train, and what was decided on the way."""

    model: Any
    notices: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, Any]:
        trainable = sum(part.numel() for part in self.model.parameters() if part.requires_grad)
        total = sum(part.numel() for part in self.model.parameters())
        return {"parameters": trainable, "of": total, "share": trainable / total}


def adapt(model: Any, choice: Adapter, token_rows: list[int]) -> Adapted:
    """Freeze what is not trained and add what is. token_rows: ids whose embedding rows are trained as well.

    Raises ModelError when a target names no module, or nothing would be trained.
    """
    if choice.method == "full":
        model.requires_grad_(True)
        return Adapted(model)
    from peft import LoraConfig, get_peft_model

    targets = find_targets(model, choice)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=choice.rank,
        lora_alpha=choice.scale,
        lora_dropout=choice.dropout,
        use_rslora=choice.rslora,
        use_dora=choice.dora,
        target_modules=targets,
        modules_to_save=list(choice.also_train) or None,
        ensure_weight_tying=bool(
            getattr(model.config, "tie_word_embeddings", False)
        ),  # peft's default unties in silence
        trainable_token_indices=_token_rows(model, token_rows),
    )
    for name in choice.also_train:
        if not any(
            module_name.split(".")[-1] == name or module_name == name for module_name, _ in model.named_modules()
        ):
            raise _no_module("also_train", name, model)
    with quiet():
        adapted = Adapted(get_peft_model(model, config))
    fuse(adapted.model)
    fuse_blocks(adapted.model)
    if token_rows:
        adapted.notices.append(
            say(
                f"{len(token_rows)} token rows are trained beside the adapter",
                f"除适配器外还训练 {len(token_rows)} 个词向量行",
            )
        )
    adapted.notices += _left_out(model, choice)
    if not adapted.counts["parameters"]:
        raise ModelError(say("nothing would be trained", "没有任何可训练的参数"), place="sft.adapter")
    return adapted


def find_targets(model: Any, choice: Adapter) -> list[str] | str:
    """Module names for peft: the family's usual few, all linear layers but the head, or the user's list (checked)."""
    if choice.targets == "all-linear":
        return "all-linear"
    if choice.targets == "family":
        family = family_of(model.config.model_type)
        if family is None:
            raise ModelError(
                say(
                    f"no usual targets are known for {model.config.model_type!r}",
                    f"未知系列 {model.config.model_type!r} 的惯用目标",
                ),
                place="adapter.targets",
                remedy="targets: all-linear",
            )
        return list(family.targets)
    ends = {name.split(".")[-1] for name, _ in model.named_modules()}
    for name in choice.targets:
        if name not in ends and not any(module_name.endswith(name) for module_name, _ in model.named_modules()):
            raise _no_module("targets", name, model)
    return list(choice.targets)


def find_untrained_rows(model: Any, ids: list[int]) -> list[int]:
    """Those of the ids whose output rows the base was never trained on.

    A row counts as untrained when it is all but zero, when another token has exactly the same row (reserved tokens that
    were initialised together), or when it is as small as the rows that no token owns (padding of the vocabulary).
    """
    head = model.get_output_embeddings()
    weight = (head if head is not None else model.get_input_embeddings()).weight.detach()
    norms = weight.float().norm(dim=1)
    typical = float(norms.median())
    untrained = []
    for index in ids:
        row, norm = weight[index], float(norms[index])
        alike = torch.nonzero((norms - norm).abs() <= 1e-6 * max(norm, 1e-12)).flatten()
        twin = any(int(other) != index and torch.equal(weight[int(other)], row) for other in alike[:64])
        if norm <= 1e-3 * typical or twin:
            untrained.append(index)
    return untrained


def _token_rows(model: Any, ids: list[int]) -> dict[str, list[int]] | list[int] | None:
    """peft's form: rows of the input embedding, and of the head where it is a matrix of its own."""
    if not ids:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    inside = names[id(model.get_input_embeddings())].split(".")[-1]
    if getattr(model.config, "tie_word_embeddings", False):
        return {inside: ids}
    return {inside: ids, names[id(model.get_output_embeddings())].split(".")[-1]: ids}


def _left_out(model: Any, choice: Adapter) -> list[str]:
    """Weights that do a linear layer's work but are no Linear module, so `all-linear` passes them by (fused experts)."""
    if choice.targets != "all-linear":
        return []
    fused = [
        name
        for name, part in model.named_parameters()
        if part.dim() == 3 and "lora_" not in name and not name.endswith(("conv1d.weight", "conv.weight"))
    ]
    if not fused:
        return []
    size = sum(dict(model.named_parameters())[name].numel() for name in fused)
    return [
        say(
            f"all-linear passes by {len(fused)} fused expert weights ({size:,} parameters), the first: {fused[0]}",
            f"all-linear 未覆盖 {len(fused)} 个融合的专家权重（{size:,} 个参数），第一个：{fused[0]}",
        )
    ]


def _no_module(key: str, name: str, model: Any) -> ModelError:
    linear = sorted({full.split(".")[-1] for full, module in model.named_modules() if hasattr(module, "in_features")})
    return ModelError(
        say(f"no module is called {name!r}", f"没有名为 {name!r} 的模块"),
        place=f"sft.adapter.{key}",
        remedy=say(f"this model has: {', '.join(linear)}", f"该模型有：{'、'.join(linear)}"),
    )
