"""Adapters as the scripts of 2023 left them: bare files, folders in folders, and the one of 443 bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import byte_level_tokenizer, tensors, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder, len(byte_level_tokenizer(folder)), tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """peft's own, with the embedding trained in full, as in Chinese-LLaMA-Alpaca."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, part in model.named_parameters():
        if part.requires_grad:
            part.data += torch.randn_like(part, generator=None) * 0.01 * (1 + ("lora_B" in name))
    model.save_pretrained(folder)
    return folder


def bare(adapter: Path, folder: Path, name: str, rename: Any = lambda key: key) -> Path:
    """The tensors alone, in a torch file of that name."""
    folder.mkdir(parents=True)
    state = load_file(adapter / "adapter_model.safetensors")
    torch.save({rename(key): tensor for key, tensor in state.items()}, folder / name)
    return folder


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_bare_file_is_identified_by_its_shapes(
    base: Path, adapter: Path, name: str, tongwen: Any, tmp_path: Path
) -> None:
    old = bare(adapter, tmp_path / "old", name)
    code, _, err = tongwen("merge", "--base", base, "--adapter", old, "--out", tmp_path / "m")
    assert code == 4 and f"tongwen migrate {old} --alpha" in err
    code, _, err = tongwen("migrate", old)
    assert code == 4 and "lora_alpha" in err and "r: 4" in err and "q_proj, v_proj" in err
    assert tongwen("migrate", old, "--alpha", "32", "--out", tmp_path / "new")[0] == 0
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 32, ["embed_tokens"])
    for out, one in (("a", adapter), ("b", tmp_path / "new")):
        code, _, err = tongwen("merge", "--base", base, "--adapter", one, "--out", tmp_path / out)
        assert code == 0, err
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(one[key], other[key]) for key in one) and one.keys() == other.keys()
    assert not (old / "adapter_config.json").exists()


def test_trainer_saved_names_and_base_tensors_are_handled(
    base: Path, adapter: Path, tongwen: Any, tmp_path: Path
) -> None:
    """What `trainer.save_model()` wrote of a whole peft model."""
    state = {
        key.replace(".weight", ".default.weight") if "lora_" in key else key.replace("tokens.", "tokens.modules_to_save.default."): one
        for key, one in load_file(adapter / "adapter_model.safetensors").items()
    }  # fmt: skip
    state |= {f"base_model.model.{key}": one for key, one in tensors(base).items() if "embed" not in key}
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    assert tongwen("migrate", tmp_path / "old", "--alpha", 32, "--out", tmp_path / "new")[0] == 0
    made, wanted = (
        load_file(tmp_path / "new" / "adapter_model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    assert made.keys() == wanted.keys()


def test_nested_adapter_folder_is_found(base: Path, adapter: Path, tongwen: Any, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "checkpoint-final" / "adapter_model")
    place = tmp_path / "checkpoint-final"
    code, _, err = tongwen("merge", "--base", base, "--adapter", place, "--out", tmp_path / "m")
    assert code == 0, err
    (tmp_path / "prompts.txt").write_text("你好\n", encoding="utf-8")
    asking = ["--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out.jsonl", "--template", "plain"]
    code, _, err = tongwen("generate", "--model", base, "--adapter", place, "--max-new-tokens", 4, *asking)
    assert code == 0, err


def test_443_byte_adapter_is_refused(base: Path, adapter: Path, tongwen: Any, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    torch.save({}, tmp_path / "old" / "adapter_model.bin")
    for config in (False, True):
        if config:
            shutil.copy(adapter / "adapter_config.json", tmp_path / "old")
        code, _, err = tongwen("migrate", tmp_path / "old", "--alpha", 32)
        assert code == 4 and "443" in err
    code, _, err = tongwen("merge", "--base", base, "--adapter", tmp_path / "old", "--out", tmp_path / "m")
    assert code == 4 and "empty" in err and not (tmp_path / "m").exists()
