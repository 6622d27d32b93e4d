"""An adapter as the scripts of 2023 left it becomes an ordinary one: a bare file of tensors gets the config that it lacks.

Rank and targets are read from names and shapes, and so is what was trained in full beside the adapter. The scale is in no
tensor: it is asked for, because a guess would give another model and no error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tongwen.core import artifact
from tongwen.core.errors import ArtifactError, ModelError
from tongwen.core.i18n import _
from tongwen.model.loading.chat_setup import copy_chat_setup
from tongwen.model.loading.fingerprint import combine, lines_of
from tongwen.model.loading.load import adapter_folder
from tongwen.model.loading.tensors import TorchTensors, load_bin

FILES = ("adapter_model.bin", "pytorch_model.bin")


def modernise(folder: Path, out: Path, alpha: float | None) -> artifact.Artifact:
    """Write an ordinary adapter folder. alpha: the scale, when no adapter_config.json says it.

    Raises ArtifactError when the folder holds no LoRA tensors, or when nobody knows the scale.
    """
    import torch
    from safetensors.torch import save_file

    folder = adapter_folder(folder)
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise ArtifactError(_("this folder has none of {files}").format(files=_(", ").join(FILES)), place=str(folder))
    state = _adapter_tensors(load_bin(file))
    if not any(".lora_A." in name for name in state):
        raise ArtifactError(
            _("it has no LoRA tensors"),
            place=str(file),
            remedy=_("a 443-byte file was saved wrongly and its content is lost: train again"),
        )
    config = _config_of(folder, state, alpha)
    with artifact.create(out, "adapter", {"source": {"path": str(file)}}, {"alpha": alpha}, swept=True) as draft:
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()}, draft.path / "adapter_model.safetensors"
        )
        artifact.write_json(draft.path / "adapter_config.json", config)
        copy_chat_setup(folder, draft.path)
        draft.fingerprint = combine(lines_of(TorchTensors({name: torch.as_tensor(one) for name, one in state.items()})))
    assert draft.artifact
    return draft.artifact


def _adapter_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors that the adapter brings, under peft's names. Where the base's own lie beside them, these are left out."""
    plain = {name.replace(".default.", ".").replace(".modules_to_save.", "."): name for name in state}
    adapted = {name.rpartition(".lora_")[0] for name in plain if ".lora_A." in name}
    whole_model = any(f"{module}.weight" in plain for module in adapted)
    return {
        name: state[old]
        for name, old in plain.items()
        if ".original_module." not in name and (".lora_" in name or ".modules_to_save." in old or not whole_model)
    }


def _config_of(folder: Path, state: dict[str, Any], alpha: float | None) -> dict[str, Any]:
    """adapter_config.json: the folder's own, or what names and shapes say, with the scale."""
    file = folder / "adapter_config.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    ranks = {int(tensor.shape[0]) for name, tensor in state.items() if ".lora_A." in name}
    targets = sorted({name.partition(".lora_A.")[0].split(".")[-1] for name in state if ".lora_A." in name})
    whole = sorted({name.split(".")[-2] for name in state if ".lora_" not in name})
    found = f"r: {', '.join(map(str, ranks))}; target_modules: {', '.join(targets)}"
    if len(ranks) > 1:
        raise ModelError(_("it has more than one rank: {found}").format(found=found), place=str(folder))
    if alpha is None:
        raise ArtifactError(
            _("the tensors do not contain its scale (lora_alpha); {found}").format(found=found),
            place=str(folder),
            remedy="--alpha N: " + _("Chinese-LLaMA-Alpaca and chinese_llm_sft used 32, BELLE and Chinese-LLM-Chat 16"),
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": targets,
        "modules_to_save": whole or None,
        "inference_mode": True,
    }
