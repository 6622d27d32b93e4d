"""Every command refuses an incomplete adapter, and a complete one of each type matches the live layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import disturb, live_logits, logits, make_adapter
from tests.conftest import dialogues, tiny_llama, write_recipe, write_rows
from tongwen.core.errors import ModelError
from tongwen.model.adapters.chain import open_adapter, open_adapter_chain
from tongwen.model.loading.load import load_model
from tongwen.model.loading.model_ref import ModelRef

TensorSource = dict[str, torch.Tensor]
LOST: dict[str, Callable[[TensorSource], TensorSource]] = {
    "empty": lambda tensors: {},
    "half": lambda tensors: {name: one for name, one in tensors.items() if "lora_A" in name},
    "half of one": lambda tensors: {
        name: one for name, one in tensors.items() if "0.self_attn.q_proj.lora_B" not in name
    },
    "a target": lambda tensors: {name: one for name, one in tensors.items() if "v_proj" not in name},
    "a layer": lambda tensors: {name: one for name, one in tensors.items() if ".layers.1." not in name},
    "unknown layer": lambda tensors: {name.replace(".layers.1.", ".layers.9."): one for name, one in tensors.items()},
    "further layer": lambda tensors: tensors | {n.replace(".layers.1.", ".layers.9."): t for n, t in tensors.items()},
    "further target": lambda tensors: tensors | {n.replace("v_proj", "o_proj"): t for n, t in tensors.items()},
    "integers": lambda tensors: {name: one.to(torch.int32) for name, one in tensors.items()},
    "one of integers": lambda tensors: tensors | {(name := min(tensors)): tensors[name].to(torch.int8)},
    "magnitudes": lambda tensors: {name: one for name, one in tensors.items() if "magnitude" not in name},
    "a rank": lambda tensors: {
        name: one[:2] if "lora_A" in name else one[:, :2] if one.dim() > 1 else one for name, one in tensors.items()
    },
}


def damage(folder: Path, change: Callable[[TensorSource], TensorSource]) -> None:
    file = folder / "adapter_model.safetensors"
    left = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
    save_file(left, file, metadata={"format": "pt"})


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("dora", [False, True])
def test_incomplete_adapter_is_refused_everywhere(lost: str, dora: bool, tmp_path: Path, tongwen: Any) -> None:
    if lost == "magnitudes" and not dora:
        pytest.skip("only DoRA has magnitudes")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(base, 90)
    make_adapter(base, adapter, target_modules=["q_proj", "v_proj"], use_dora=dora)
    damage(adapter, LOST[lost])
    ref = ModelRef("", str(base))
    with pytest.raises(ModelError):
        open_adapter_chain(ModelRef("", str(base), adapters=(str(adapter),)), torch.float32)
    for trainable in (False, True):
        with pytest.raises(ModelError):
            open_adapter(load_model(ref, torch.float32), str(adapter), None, trainable=trainable)
    code, _, err = tongwen("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert code == 4, err


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)


def other_type(kind: str, **options: Any) -> Any:
    import peft

    return getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **options)


WHOLE = {
    "lora": lambda: lora(target_modules="all-linear"),
    "dora": lambda: lora(target_modules=["q_proj"], use_dora=True),
    "modules": lambda: lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "rows": lambda: lora(target_modules=["q_proj"], trainable_token_indices=[1, 5]),
    "patterns": lambda: lora(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
    "layers": lambda: lora(target_modules=["q_proj"], layers_to_transform=[1]),
    "parameters": lambda: lora(target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight"]),
    "pissa": lambda: lora(target_modules=["q_proj"], init_lora_weights="pissa"),
    "adalora": lambda: other_type("AdaLora", init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]),
    "ia3": lambda: other_type("IA3", target_modules=["k_proj"], feedforward_modules=[]),
    "prefix": lambda: other_type("PrefixTuning", num_virtual_tokens=3),
    "prompt": lambda: other_type("PromptTuning", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_complete_adapter_matches_live_layers(kind: str, tmp_path: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(base, 90)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), WHOLE[kind]())
    if kind != "pissa":
        disturb(adapted, 3)
    adapted.save_pretrained(str(adapter))
    model, _unused = open_adapter_chain(ModelRef("", str(base), adapters=(str(adapter),)), torch.float32)
    assert torch.allclose(logits(model), live_logits(base, adapter), atol=1e-5)


def test_empty_file_of_another_type_is_refused(tmp_path: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(base, 90)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), WHOLE["prefix"]()).save_pretrained(str(adapter))
    damage(adapter, LOST["empty"])
    with pytest.raises(ModelError, match="the adapter is empty"):
        open_adapter_chain(ModelRef("", str(base), adapters=(str(adapter),)), torch.float32)


@pytest.fixture(scope="module")
def trained(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an adapter of ours."""
    from tongwen.cli.main import main

    folder = tmp_path_factory.mktemp("trained")
    assert main(["run", str(write_recipe(folder, chat_model, sft=", stop_after: 1 steps", merge=False))]) == 0
    return folder


def flip(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40
    file.write_bytes(content)


@pytest.mark.parametrize(
    "change", [flip, lambda folder: damage(folder, LOST["half"]), lambda folder: damage(folder, LOST["empty"])]
)
@pytest.mark.parametrize(
    "command", ["chat", "generate", "evaluate", "serve", "merge", "continue_from", "base", "stage"]
)
def test_each_command_refuses_a_changed_adapter(
    command: str, change: Callable[[Path], None], trained: Path, chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    """The manifest records its bytes, so that one flipped bit is seen."""
    adapter = tmp_path / "sft"
    shutil.copytree(trained / "out" / "sft", adapter)
    change(adapter)
    rows = write_rows(tmp_path / "d.jsonl", dialogues(3))
    write_rows(tmp_path / "p.jsonl", [{"prompt": "你好"}])
    recipe = ""
    if command in ("continue_from", "base"):
        base, extra = (adapter, "") if command == "base" else (chat_model, f", continue_from: {adapter}")
        recipe = str(write_recipe(tmp_path / "next", base, sft=", stop_after: 1 steps", merge=False))
        text = Path(recipe).read_text().replace("adapter: {rank: 4}", f"adapter: {{rank: 4{extra}}}")
        Path(recipe).write_text(text)
    words = {
        "chat": ("chat", chat_model, "--adapter", adapter),
        "stage": ("chat", adapter),
        "generate": (
            "generate",
            "--model",
            chat_model,
            "--adapter",
            adapter,
            "--prompts",
            tmp_path / "p.jsonl",
            "--out",
            tmp_path / "o",
        ),
        "evaluate": (
            "evaluate",
            "--model",
            chat_model,
            "--adapter",
            adapter,
            "--task",
            "bits_per_byte",
            "--data",
            rows,
        ),
        "serve": ("serve", chat_model, "--adapter", adapter, "--port", "0"),
        "merge": ("merge", "--base", chat_model, "--adapter", adapter, "--out", tmp_path / "m"),
    }.get(command, ("run", recipe))
    code, out, err = tongwen(*words)
    assert code == 4 and "Traceback" not in err, (code, out, err)
    assert not (tmp_path / "o").exists() and not (tmp_path / "m").exists()


def test_downloaded_adapter_has_a_manifest_of_its_files(tmp_path: Path) -> None:
    """`fetch` records hashes of files: they say nothing about tensors, and forbid nothing here."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(base, 90)
    make_adapter(base, adapter, target_modules=["q_proj"])
    (adapter / "manifest.json").write_text(
        json.dumps({"kind": "fetch", "fingerprint": "0" * 64, "parents": {}, "settings": {}})
    )
    open_adapter_chain(ModelRef("", str(base), adapters=(str(adapter),)), torch.float32)
