"""An adapter is folded into its base shard by shard: W + scale x B A in fp32, rounded once.

Every adapter tensor is used exactly once and every target exists, or nothing is written. LoRA, rsLoRA, DoRA, whole
modules (`modules_to_save`) and single token rows are folded here; anything else is refused by name.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tongwen.errors import ArtifactError, ModelError, NumbersError
from tongwen.language import say
from tongwen.model.load import Place, load_model

PREFIX = "base_model.model."
PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".token_adapter.trainable_tokens_delta": "rows",
    ".trainable_tokens_delta": "rows",
    ".weight": "whole",
    ".bias": "whole_bias",
}


@dataclass
class Change:
    """What an adapter does to one tensor of the base: the adapter's tensors by role, and their names there."""

    parts: dict[str, torch.Tensor]
    scale: float
    transposed: bool
    rows: list[int]

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The folded weight in fp32. Raises ArtifactError on a shape that does not fit."""
        base = weight.to(torch.float32)
        if "whole" in self.parts:
            base = self._same_shape(name, base, self.parts["whole"].to(torch.float32))
        if "rows" in self.parts:
            base = base.clone()
            base[self.rows] = self.parts["rows"].to(torch.float32)
        if "a" in self.parts:
            delta = self.parts["b"].to(torch.float32) @ self.parts["a"].to(torch.float32) * self.scale
            delta = delta.T if self.transposed else delta
            self._same_shape(name, base, delta)
            if not bool(delta.any()):
                raise ArtifactError(
                    say(
                        "the adapter changes nothing here: it was never trained", "适配器在此处没有任何改变：从未训练过"
                    ),
                    place=name,
                )
            base = base + delta
            if "magnitude" in self.parts:
                norm = base.norm(dim=1, keepdim=True)
                base = base * (self.parts["magnitude"].to(torch.float32).reshape(-1, 1) / norm)
        if not bool(torch.isfinite(base).all()):
            raise NumbersError(say("the merged weight has NaN or Inf", "合并后的权重含 NaN 或 Inf"), place=name)
        return base

    @staticmethod
    def _same_shape(name: str, base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if base.shape != other.shape:
            raise ArtifactError(
                say(
                    f"the base has shape {tuple(base.shape)}, the adapter needs {tuple(other.shape)}",
                    f"底座形状为 {tuple(base.shape)}，适配器需要 {tuple(other.shape)}",
                ),
                place=name,
                remedy=say("this adapter was trained on another base", "该适配器是在另一个底座上训练的"),
            )
        return other


def fold(
    base: Place, adapter: Path, out: Path, dtype: torch.dtype | None, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Write the merged model's weights and config to `out`. dtype None keeps each tensor's own type.

    Returns counts: tensors, changed, and the adapter tensors used. Raises ArtifactError when the adapter does not fit.
    """
    changes = read_changes(adapter)
    _settle_tied_head(base, adapter, changes)
    done = changed = 0
    used: set[str] = set()
    names: dict[str, str] = {}
    for file_name, shard in _shards(base, out):
        merged = {}
        for name, tensor in shard:
            if change := changes.get(name):
                merged[name] = change.apply(name, tensor).to(dtype or tensor.dtype).contiguous()
                used.add(name)
                changed += 1
            else:
                merged[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            names[name] = file_name
            done += 1
            progress(done)
        save_file(merged, str(out / file_name), metadata={"format": "pt"})
    left = sorted(set(changes) - used)
    if left:
        raise ArtifactError(
            say(
                f"{len(left)} targets of the adapter are not in the base, the first: {left[0]}",
                f"适配器的 {len(left)} 个目标不在底座中，第一个：{left[0]}",
            ),
            place=str(adapter),
            remedy=say("merge onto the base that the adapter was trained on", "请合并到训练该适配器的底座上"),
        )
    if not changed:
        raise ArtifactError(
            say("the adapter is empty: merged would equal base", "适配器为空：合并结果将等于底座"), place=str(adapter)
        )
    _write_index(out, names)
    _write_config(base, out, dtype)
    return {"tensors": done, "changed": changed}


def read_changes(adapter: Path) -> dict[str, Change]:
    """Base tensor name -> what the adapter does to it. Raises ArtifactError on tensors of an unknown kind."""
    config = _read_config(adapter)
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise ArtifactError(
            say("no adapter_model.safetensors in this folder", "文件夹里没有 adapter_model.safetensors"),
            place=str(adapter),
        )
    changes: dict[str, Change] = {}
    rows = config.get("trainable_token_indices") or {}
    with safe_open(str(file), "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            target, role = _role(key)
            if role not in ("a", "b", "magnitude", "rows", "whole", "whole_bias"):
                raise ArtifactError(
                    say(
                        f"the adapter tensor {key!r} is of a kind that cannot be folded",
                        f"无法合并的适配器张量 {key!r}",
                    ),
                    place=str(file),
                )
            name = f"{target}.bias" if role == "whole_bias" else f"{target}.weight"
            role = "whole" if role == "whole_bias" else role
            change = changes.setdefault(
                name, Change({}, _scale(config, target), bool(config.get("fan_in_fan_out")), _rows_of(rows, target))
            )
            change.parts[role] = tensors.get_tensor(key)
    for name, change in changes.items():
        if ("a" in change.parts) != ("b" in change.parts):
            raise ArtifactError(say("half of an A/B pair is missing", "缺少 A/B 矩阵之一"), place=name)
    return changes


def _settle_tied_head(base: Place, adapter: Path, changes: dict[str, Change]) -> None:
    """A base that ties its head to the embedding has one matrix for both, so the adapter must hold one as well.

    peft saves a tied pair twice (`ensure_weight_tying`), and by default unties it: an adapter with a whole new embedding
    beside the old head would be another model once it is folded into one matrix. That is refused.
    """
    config = Path(base.folder) / "config.json"
    if not config.is_file() or not json.loads(config.read_text(encoding="utf-8")).get("tie_word_embeddings"):
        return
    embedding = next((name for name, change in changes.items() if "whole" in change.parts and "embed" in name), None)
    head = changes.get("lm_head.weight")
    if embedding is None and head is None:
        return
    if embedding and head and torch.equal(changes[embedding].parts["whole"], head.parts["whole"]):
        del changes["lm_head.weight"]
        return
    raise ArtifactError(
        say(
            f"{embedding or 'lm_head.weight'} was trained apart from the other half of the pair that the base ties",
            f"{embedding or 'lm_head.weight'} 训练时与底座中与之共享的另一半脱离",
        ),
        place=str(adapter),
        remedy=say(
            "train it again with ensure_weight_tying, as tongwen does",
            "请以 ensure_weight_tying 重新训练（tongwen 默认如此）",
        ),
    )


def _role(key: str) -> tuple[str, str]:
    name = key.removeprefix(PREFIX)
    for ending, role in PARTS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), role
    return name, "unknown"


def _read_config(adapter: Path) -> dict[str, Any]:
    file = adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            say("no adapter_config.json in this folder", "文件夹里没有 adapter_config.json"), place=str(adapter)
        ) from None
    except ValueError as error:
        raise ArtifactError(say(f"not JSON: {error}", f"不是 JSON：{error}"), place=str(file)) from None
    if config.get("peft_type") != "LORA":
        raise ModelError(
            say(
                f"adapters of type {config.get('peft_type')!r} cannot be folded into weights",
                f"{config.get('peft_type')!r} 类型的适配器不能并入权重",
            ),
            place=str(file),
        )
    return dict(config)


def _scale(config: dict[str, Any], target: str) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, with peft's per-module patterns."""

    def patterned(patterns: dict[str, Any], default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", target):
                return value
        return default

    rank = patterned(config.get("rank_pattern", {}), config["r"])
    alpha = patterned(config.get("alpha_pattern", {}), config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _rows_of(rows: Any, target: str) -> list[int]:
    if isinstance(rows, dict):
        return next((list(value) for name, value in rows.items() if target.endswith(name)), [])
    return list(rows)


def _shards(base: Place, out: Path) -> Iterator[tuple[str, Iterator[tuple[str, torch.Tensor]]]]:
    """(file name, its tensors), in the base's own layout. A base that is not safetensors is opened as a model."""
    files = sorted(Path(base.folder).glob("*.safetensors")) if not base.gguf else []
    if files:
        for file in files:
            yield file.name, _tensors(file)
        return
    model = load_model(base, torch.float32)
    model.config.save_pretrained(str(out))
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    yield "model.safetensors", iter(state.items())


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(str(file), "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            yield name, tensors.get_tensor(name)


def _write_index(out: Path, names: dict[str, str]) -> None:
    if len(set(names.values())) < 2:
        return
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _write_config(base: Place, out: Path, dtype: torch.dtype | None) -> None:
    source = Path(base.folder) / "config.json"
    if not (out / "config.json").is_file():
        shutil.copyfile(source, out / "config.json")
    if dtype is not None:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
