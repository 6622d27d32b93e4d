"""A merged adapter matches the live adapter, on the base that it was trained on and on no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import disturb, logits, make_adapter, merged
from tests.conftest import tensors, tiny_llama
from tongwen.core import safetensors_io
from tongwen.core.errors import ArtifactError
from tongwen.core.model_families import FAMILIES
from tongwen.model.loading.fingerprint import fingerprint_model, fingerprint_state
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tensors import from_fp32, to_fp32

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "token rows": {"trainable_token_indices": {"embed_tokens": [1, 5]}},
    "untied": {"modules_to_save": ["embed_tokens"]},
    "head alone": {"modules_to_save": ["lm_head"]},
    "head lora": {"target_modules": ["lm_head", "v_proj"]},
    "dora stacked on patterns": {"use_dora": True, "rank_pattern": {"o_proj": 3}},
    "embedding lora": {"target_modules": ["embed_tokens", "q_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.*up_proj": 3}},
    "head rows": {"trainable_token_indices": {"lm_head": [1, 5]}},
    "rows apart": {"trainable_token_indices": {"lm_head": [1, 5], "embed_tokens": [1, 7]}},
    "whole layers": {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "norm"]},
    "one layer": {"target_modules": ["q_proj", "k_proj", "v_proj"], "layers_to_transform": [1]},
}
UNTIED = ("untied", "head alone", "head lora", "embedding lora", "head rows", "rows apart")


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_matches_the_live_adapter(kind: str, chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    from transformers import AutoModelForCausalLM

    live = make_adapter(chat_model, tmp_path / "adapter", **KINDS[kind])
    out = merged(tongwen, chat_model, [tmp_path / "adapter"], tmp_path / "out")
    assert json.loads((out / "manifest.json").read_text())["counts"]["changed"] >= 3
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(logits(model), logits(live), atol=2e-6)
    tied = kind not in UNTIED
    assert model.config.tie_word_embeddings is tied and ("lm_head.weight" not in tensors(out)) is tied


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}, {}])
def test_biases_and_token_rows_of_an_untied_model_are_merged(
    options: dict[str, Any], tmp_path: Path, tongwen: Any
) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    tiny_llama(base, 90, tie_word_embeddings=False, attention_bias=True)
    rows = {} if options else {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [3, 9]}}
    live = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"], **options, **rows)
    out = merged(tongwen, base, [tmp_path / "adapter"], tmp_path / "out")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(live), atol=2e-6)


def test_tying_default_of_the_family_is_used(tmp_path: Path, tongwen: Any) -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

    base = tmp_path / "base"
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(vocab_size=90, num_key_value_heads=2, **shape)).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    for kind in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}):
        live = make_adapter(base, tmp_path / "adapter", **kind)
        out = merged(tongwen, base, [tmp_path / "adapter"], tmp_path / "out", "--again")
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(live), atol=2e-6)


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_weight_orientation_comes_from_the_layers(fan_in_fan_out: bool, tmp_path: Path, tongwen: Any) -> None:
    """fan_in_fan_out is the opposite of what each base does; both adapt square matrices, which fit either way."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    base = tmp_path / "base"
    if fan_in_fan_out:
        tiny_llama(base, 64)
    else:
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)).save_pretrained(base)
    live = make_adapter(base, tmp_path / "adapter", target_modules=["o_proj" if fan_in_fan_out else "attn.c_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": fan_in_fan_out}))
    out = merged(tongwen, base, [tmp_path / "adapter"], tmp_path / "out")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(live), atol=1e-5)


def test_bf16_is_rounded_once(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    make_adapter(chat_model, tmp_path / "adapter")
    full = tensors(merged(tongwen, chat_model, [tmp_path / "adapter"], tmp_path / "a"))
    half = tensors(merged(tongwen, chat_model, [tmp_path / "adapter"], tmp_path / "b", "--dtype", "bf16"))
    assert all(torch.equal(half[name], full[name].to(torch.bfloat16)) for name in full)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def test_bf16_rounding_matches_torch() -> None:
    """Every upper half of a finite fp32 number, with lower halves around the tie."""
    halves = np.array(
        [half for half in range(1 << 16) if half & 0x7F80 < 0x7F80 and half & 0x7FFF != 0x7F7F], np.uint32
    )
    numbers = np.concatenate([halves << 16 | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)
    raw = from_fp32(numbers, "BF16")
    rounded = torch.from_numpy(numbers).bfloat16()
    assert torch.equal(torch.from_numpy(raw).view(torch.bfloat16), rounded)
    assert np.array_equal(to_fp32(raw, "BF16"), rounded.float().numpy())


@pytest.mark.parametrize("rank", [4, 32])
def test_blockwise_merge_gives_the_same_matrix(
    rank: int, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(chat_model, tmp_path / "adapter", r=rank)
    whole = tensors(merged(tongwen, chat_model, [tmp_path / "adapter"], tmp_path / "whole"))
    monkeypatch.setattr(safetensors_io, "BLOCK", 200)
    assert len(list(safetensors_io.blocks((70, 50)))) == 18 and list(safetensors_io.blocks((70, 50), 32))[-1] == (
        64,
        70,
    )
    parts = tensors(merged(tongwen, chat_model, [tmp_path / "adapter"], tmp_path / "parts"))
    assert all(torch.allclose(parts[name], whole[name], rtol=0, atol=1e-6) for name in whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_adapters_merge_in_order_like_peft_fp32(dtype: torch.dtype, tmp_path: Path, tongwen: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    model = tiny_llama(tmp_path / "fp32", 90, tie_word_embeddings=False)
    model.to(dtype).save_pretrained(base, max_shard_size="30KB")
    for number in (1, 2):
        make_adapter(base, tmp_path / f"a{number}", seed=number, use_rslora=number == 2, r=3 + number)
    out = merged(tongwen, base, [tmp_path / "a1", tmp_path / "a2"], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for number in (1, 2):
        model = PeftModel.from_pretrained(model, tmp_path / f"a{number}").merge_and_unload()
    found, expected = tensors(out), model.to(dtype).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert fingerprint_model(ModelRef("", str(out))) == json.loads((out / "manifest.json").read_text())["fingerprint"]


def test_bin_files_merge_like_safetensors(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    make_adapter(chat_model, tmp_path / "adapter")
    old = tmp_path / "old"
    shutil.copytree(chat_model, old)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    adapter = shutil.copytree(tmp_path / "adapter", tmp_path / "old adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    one = tensors(merged(tongwen, chat_model, [tmp_path / "adapter"], tmp_path / "one"))
    other = tensors(merged(tongwen, old, [adapter], tmp_path / "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def grown_adapters(base: Path, folder: Path) -> tuple[Path, Path]:
    """Chinese-LLaMA's shape: one adapter brings more rows for embedding and head, the next one row more."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model, out = AutoModelForCausalLM.from_pretrained(base), []
    for number, more in enumerate((7, 1), 1):
        rows = model.get_input_embeddings().weight.shape[0] + more
        model.resize_token_embeddings(rows, mean_resizing=False)
        options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
        disturb(adapted, number)
        adapted.save_pretrained(str(folder / f"grown-{number}"))
        out.append(folder / f"grown-{number}")
        model = adapted.merge_and_unload()
    model.save_pretrained(str(folder / "expected"))
    return out[0], out[1]


def test_extended_vocabularies_merge_only_in_order(tmp_path: Path, tongwen: Any) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tiny_llama(base, 100, tie_word_embeddings=False)
    first, second = grown_adapters(base, tmp_path)
    out = merged(tongwen, base, [first, second], tmp_path / "out", "--parity", "full")
    found, expected = tensors(out), tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 108
    code, _, err = tongwen("merge", "--base", base, "--adapter", second, "--adapter", first, "--out", tmp_path / "no")
    assert code == 4 and "107 rows" in err and "108" in err and "first" in err and "[PAD]" not in err
    vocabulary = {f"t{index}": index for index in range(107)} | {"[PAD]": 107}
    (second / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    code, _, err = tongwen("merge", "--base", base, "--adapter", second, "--adapter", first, "--out", tmp_path / "no")
    assert code == 4 and f"has 108 ([PAD], {second})" in " ".join(err.split())


def test_unstreamable_adapter_is_merged_by_peft(tmp_path: Path, tongwen: Any) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)).save_pretrained(base)
    for kind, options in {
        "columns": {"fan_in_fan_out": True},
        "dora": {"fan_in_fan_out": True, "use_dora": True},
    }.items():
        live = make_adapter(base, tmp_path / kind, target_modules=["c_attn"], **options)
        code, text, err = tongwen(
            "merge", "--base", base, "--adapter", tmp_path / kind, "--out", tmp_path / f"{kind} out", "--parity", "full"
        )
        assert code == 0, err
        assert ("whole model in memory" in text) is (kind == "dora")
        assert torch.allclose(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind} out")), logits(live), atol=1e-5
        )


def test_streamed_parity_matches_the_model(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tongwen.model.loading.tensors import open_tensors
    from tongwen.model.merging import parity

    for family in (name for name, facts in FAMILIES.items() if facts.like_llama):
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = AutoConfig.for_model(family, vocab_size=90, num_key_value_heads=2, head_dim=8, **shape)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        for part in model.parameters():
            part.data += torch.randn_like(part) * 0.1
        model.save_pretrained(tmp_path / family)
        ids = parity.fixed_ids(90)
        safetensors_io = parity.MergedWeights(open_tensors(tmp_path / family, ""))
        found = parity.logits(safetensors_io, json.loads((tmp_path / family / "config.json").read_text()), ids)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        assert abs(found - expected).max() < 1e-4, family


def _edit(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def test_parity_detects_one_wrong_matrix(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tongwen.model.merging import merge

    make_adapter(chat_model, tmp_path / "adapter")
    step, apply = merge.ChangeStep, merge.ChangeStep.apply
    spoiled = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"

    def wrong(self: Any, block: Any, begin: int, end: int) -> Any:
        if self.change.parts.get("a") == spoiled and block.dtype == "float32":
            self.change.scale *= -1
            out = apply(self, block, begin, end)
            self.change.scale *= -1
            return out
        return apply(self, block, begin, end)

    argv = ("merge", "--base", chat_model, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(step, "apply", wrong)
        code, _, err = tongwen(*argv)
        assert code == 6 and "layers.1.mlp.up_proj" in err and "read back" in err
        patch.setattr("tongwen.workflows.merging.check_rows", lambda base, folded: 0.0)
        code, _, err = tongwen(*argv)
        assert code == 6 and "logits" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert tongwen(*argv)[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [tensor.zero_() for name, tensor in state.items() if "lora_B" in name], "never trained"),
        (lambda state: state.clear(), "empty"),
        (lambda state: state.pop(next(name for name in state if "lora_A" in name)), "one matrix of an A/B pair"),
        (
            lambda state: state.update(
                {
                    "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 32),
                    "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(32, 4),
                }
            ),
            "layers.9",
        ),
        (lambda state: state.update({"base_model.model.model.prompt": torch.ones(3)}), "cannot be merged"),
        (
            lambda state: state.update({next(iter(state)): torch.full_like(state[next(iter(state))], float("nan"))}),
            "NaN",
        ),
        (
            lambda state: state.update(
                {
                    name: torch.ones(tensor.shape[0], 9)
                    for name, tensor in state.items()
                    if name.endswith("0.mlp.up_proj.lora_A.weight")
                }
            ),
            "shape",
        ),
    ],
)
def test_mismatched_adapter_is_refused(
    change: Any, message: str, chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    make_adapter(chat_model, tmp_path / "adapter")
    _edit(tmp_path / "adapter", change)
    code, _, err = tongwen("merge", "--base", chat_model, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert code in (4, 6) and message in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "lost", "changes", "message"),
    [
        ({"use_dora": True}, "1.self_attn.v_proj.lora_magnitude", {}, "use_dora is set, but"),
        ({"use_dora": True}, "", {"use_dora": False}, "tensor of use_dora"),
        ({}, "", {"use_dora": True}, "use_dora is set, but"),
        ({"lora_bias": True}, "lora_B.bias", {}, "lora_bias is set, but"),
        ({"lora_bias": True}, "", {"lora_bias": False}, "tensor of lora_bias"),
        ({"bias": "all"}, "1.self_attn.q_proj.base_layer.bias", {}, "1.self_attn.q_proj.bias"),
        ({"bias": "lora_only"}, "1.self_attn.q_proj.base_layer.bias", {}, "1.self_attn.q_proj.bias"),
        ({}, "", {"target_modules": ["v_proj"]}, "does not list (target_modules)"),
        ({}, "", {"exclude_modules": ["1.self_attn.q_proj"]}, "does not list (target_modules)"),
        ({}, "", {"layers_to_transform": [0]}, "does not list (target_modules)"),
        ({"layers_to_transform": [0, 1]}, "layers.1", {}, "listed as trained are not in its file"),
        ({"modules_to_save": ["mlp"]}, "mlp", {}, "listed as trained are not in its file"),
        ({"trainable_token_indices": [3, 4]}, "embed_tokens", {}, "listed as trained are not in its file"),
        ({}, "", {"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    ],
)
def test_config_and_tensors_must_agree(
    options: dict[str, Any], lost: str, changes: dict[str, Any], message: str, tmp_path: Path, tongwen: Any
) -> None:
    """What peft passes over in silence, or replaces by the base's own."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(base, 90, tie_word_embeddings=False, attention_bias=True)
    make_adapter(base, adapter, **{"target_modules": ["q_proj", "v_proj"], **options})
    assert tongwen("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "right")[0] == 0
    held = len(load_file(adapter / "adapter_model.safetensors"))
    _edit(adapter, lambda state: [state.pop(name) for name in list(state) if lost and lost in name])
    assert (len(load_file(adapter / "adapter_model.safetensors")) < held) is bool(lost)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    code, _, err = tongwen("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert code == 4 and message in " ".join(err.split()), err
    assert not (tmp_path / "out").exists()


def test_merge_refuses_wrong_bases(chat_model: Path, other_model: Path, tmp_path: Path, tongwen: Any) -> None:
    from tests.conftest import write_recipe

    recipe = write_recipe(tmp_path, chat_model, sft=", stop_after: 2 steps")
    assert tongwen("run", recipe)[0] == 0
    adapter = tmp_path / "out" / "sft"
    code, _, err = tongwen("merge", "--base", other_model, "--adapter", adapter, "--out", tmp_path / "wrong")
    assert code == 4
    for folder in (chat_model, other_model):
        assert str(fingerprint_model(ModelRef("", str(folder))))[:12] in err, "both fingerprints are named"
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ArtifactError, match="another base"):
        __import__("tongwen").open(str(other_model), adapters=[str(adapter)])
    assert (
        tongwen("merge", "--base", other_model, "--adapter", adapter, "--out", tmp_path / "forced", "--force")[0] == 0
    )
    assert json.loads((tmp_path / "forced" / "manifest.json").read_text())["forced"] is True
    moved = tmp_path / "a copy of the base"
    shutil.copytree(chat_model, moved)
    assert tongwen("merge", "--base", moved, "--adapter", adapter, "--out", tmp_path / "right")[0] == 0
    assert all(
        torch.equal(tensor, tensors(tmp_path / "out" / "merge")[name])
        for name, tensor in tensors(tmp_path / "right").items()
    )
    code, _, err = tongwen("merge", "--base", chat_model, "--adapter", adapter, "--out", tmp_path / "right")
    assert code == 2 and "--again" in err


def test_fingerprint_depends_on_tensors_not_files(chat_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chat_model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one = fingerprint_model(ModelRef("", str(chat_model)))
    assert fingerprint_model(ModelRef("", str(tmp_path / "sharded"))) == one
    state = load_file(chat_model / "model.safetensors")
    assert fingerprint_state(state) == one
    state["model.norm.weight"][0] += 1e-7
    assert fingerprint_state(state) != one


def test_other_adapter_type_is_refused(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    make_adapter(chat_model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "PREFIX_TUNING"}))
    code, _, err = tongwen("merge", "--base", chat_model, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert code == 4 and "PREFIX_TUNING" in err
