"""Convert an adapter from the scripts of 2023, a bare file of tensors, into an ordinary one with a config.

Rank, targets and fully trained modules are read from the tensors' names and shapes. The scale is in no tensor, so the
user must give it: a wrong guess would silently give another model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact
from tongwen.core.errors import ArtifactError, ModelError
from tongwen.core.i18n import _
from tongwen.model.loading.adapter_folder import adapter_folder
from tongwen.model.loading.chat_setup import copy_chat_setup
from tongwen.model.loading.fingerprint import combine, digests_of
from tongwen.model.loading.tensors import TorchTensors, load_bin

FILES = ("adapter_model.bin", "pytorch_model.bin")


def convert_legacy_adapter(folder: Path, out: Path, alpha: float | None) -> artifact.Artifact:
    """Write an ordinary adapter folder. alpha: the scale, needed when there is no adapter_config.json.

    Raises ArtifactError when the folder has no LoRA tensors, or when the scale is unknown.
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
    with artifact.create(
        out, "adapter", {"source": {"path": str(file)}}, {"alpha": alpha}, remove_on_error=True
    ) as draft:
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()}, draft.path / "adapter_model.safetensors"
        )
        artifact.write_json(draft.path / "adapter_config.json", config)
        copy_chat_setup(folder, draft.path)
        draft.fingerprint = combine(
            digests_of(TorchTensors({name: torch.as_tensor(one) for name, one in state.items()}))
        )
    assert draft.artifact
    return draft.artifact


def _adapter_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return the adapter's tensors under peft's names, without those of the base that the same file may contain."""
    plain = {name.replace(".default.", ".").replace(".modules_to_save.", "."): name for name in state}
    adapted = {name.rpartition(".lora_")[0] for name in plain if ".lora_A." in name}
    whole_model = any(f"{module}.weight" in plain for module in adapted)
    return {
        name: state[old]
        for name, old in plain.items()
        if ".original_module." not in name and (".lora_" in name or ".modules_to_save." in old or not whole_model)
    }


def _config_of(folder: Path, state: dict[str, Any], alpha: float | None) -> dict[str, Any]:
    """Return the folder's adapter_config.json, or one derived from names and shapes, with the given scale."""
    file = folder / "adapter_config.json"
    if file.is_file():
        return artifact.read_json(file)
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
