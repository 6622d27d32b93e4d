"""`tongwen plan`: the estimate matches a real step, extrapolates from few layers, and each remedy lowers the peak."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests.conftest import byte_level_tokenizer, dialogues, tiny_moe, write_recipe, write_rows
from tongwen.commands import plan
from tongwen.model.adapters.attach import make_trainable
from tongwen.model.kernels import packed_attention
from tongwen.model.kernels.fused_blocks import fuse_blocks
from tongwen.model.kernels.loss import learned_loss, use_blockwise_head
from tongwen.model.loading.architecture import load_config
from tongwen.model.loading.load import load_model
from tongwen.model.loading.model_ref import ModelRef
from tongwen.recipe.training import AdapterConfig, Sft
from tongwen.train.checkpoints import commit
from tongwen.train.memory import ModelShape, ShardingPlan, token_budget
from tongwen.train.memory_trace import ROWS, LiveTensors
from tongwen.train.packing import pack
from tongwen.train.parallel import sharding_plan
from tongwen.workflows.training import memory_estimate
from tongwen.workflows.training.memory_estimate import MicroBatch, TrainingSetup, estimate_memory

LENGTHS = (40, 24)


def setting(method: str, dtype: torch.dtype = torch.float32, **options: Any) -> TrainingSetup:
    parts = frozenset({"full" if method == "full" else "lora"})
    adapter = AdapterConfig(method="full") if method == "full" else AdapterConfig(method=method, rank=4)  # type: ignore[arg-type]
    return TrainingSetup(adapter, parts, dtype, "cpu", **options)


def real_peak(folder: Path, how: TrainingSetup) -> dict[str, int]:
    """The same count over a real step with real tensors."""
    model = load_model(ModelRef("t", str(folder)), torch.float32)
    model.set_attn_implementation(packed_attention.register())
    model = make_trainable(model, how.adapter, []).model.train()
    batch = pack([(torch.ones(length).numpy(), torch.zeros(length).bool().numpy()) for length in LENGTHS])
    batch |= {"rows": torch.zeros(ROWS, dtype=torch.int64), "targets": torch.zeros(ROWS, dtype=torch.int64)}
    batch["learned"] = ROWS
    use_blockwise_head(model, batch)
    fuse_blocks(model)
    live = LiveTensors()
    with live:
        for part in (*model.parameters(), *model.buffers()):
            live.add(part)
        live.purpose = "activations"
        learned_loss(model, batch)[0].backward()
    return max(live.fullest, key=lambda half: half.total())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_estimated_memory_matches_a_real_step(method: str, chat_model: Path) -> None:
    how = setting(method)
    found = memory_estimate.estimate_memory(
        load_config(ModelRef("t", str(chat_model))), how, MicroBatch(LENGTHS, ROWS, 1)
    )
    rehearsed = sum(found.bytes[name] for name in ("weights", "gradients", "activations", "head"))
    wanted = real_peak(chat_model, how)
    assert found.rehearsed and found.bytes["weights"] == wanted["weights"]
    assert rehearsed == pytest.approx(sum(wanted.values()), rel=0.02)
    assert found.bytes["optimizer"] == 8 * found.shape.trainable


@pytest.mark.sample()
@pytest.mark.parametrize("how", [{}, {"dtype": torch.bfloat16, "checkpointing": True}])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_estimate_extrapolates_from_few_layers(
    method: str, how: dict[str, Any], chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, micro = load_config(ModelRef("t", str(chat_model))), MicroBatch(LENGTHS, 20, 2)
    config.num_hidden_layers = 6
    found = memory_estimate.estimate_memory(config, setting(method, **how), micro).bytes
    monkeypatch.setattr(memory_estimate, "ALIKE", (2, 6))  # all of them
    whole = memory_estimate.estimate_memory(config, setting(method, **how), micro).bytes
    assert found["peak"] == pytest.approx(whole["peak"], rel=1e-3)
    assert found["weights"] == pytest.approx(whole["weights"], rel=1e-3)


def test_checkpointing_and_accumulation_change_the_estimate(chat_model: Path) -> None:
    config, micro = load_config(ModelRef("t", str(chat_model))), MicroBatch((256, 256), 20, 1)

    def parts(how: TrainingSetup, passes: int = 1) -> dict[str, int]:
        return memory_estimate.estimate_memory(config, how, MicroBatch(micro.lengths, micro.rows, passes)).bytes

    assert parts(setting("full", checkpointing=True))["activations"] < 0.8 * parts(setting("full"))["activations"]
    one, two = parts(setting("full")), parts(setting("full"), passes=2)
    assert two["gradients"] == 4 * memory_estimate.shape_of(config, setting("full")).trainable > one["gradients"]
    assert parts(setting("full", optimizer="adamw_8bit"))["optimizer"] == one["optimizer"] / 4


def leave(*_: Any, **__: Any) -> int:
    """In the place of `fuse_blocks`: layers joined with their adapters are rounded up, a half of such small ones."""
    return 0


def test_model_that_cannot_be_simulated_falls_back_to_a_formula(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("its shapes depend on values")

    config, micro = load_config(ModelRef("t", str(chat_model))), MicroBatch((256,), 200, 1)
    monkeypatch.setattr(memory_estimate, "fuse_blocks", leave)
    wanted = memory_estimate.estimate_memory(config, setting("lora"), micro)
    monkeypatch.setattr(memory_estimate, "trace_step", refuse)
    found = memory_estimate.estimate_memory(config, setting("lora"), micro)
    assert wanted.rehearsed and not found.rehearsed
    assert found.bytes["weights"] == pytest.approx(wanted.bytes["weights"], rel=0.05)
    assert found.bytes["peak"] == pytest.approx(wanted.bytes["peak"], rel=0.5)


@pytest.mark.sample()
@pytest.mark.parametrize("method", ["full", "lora"])
def test_plan_suggests_changes_that_fit(
    method: str, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "CUDA_CONTEXT", 0)
    recipe = write_recipe(tmp_path, chat_model, merge=method == "lora", extra="export: {formats: [hf]}\n")
    word = "sft.adapter={method: full}" if method == "full" else f"sft.adapter.method={method}"
    roomy = json.loads(tongwen("plan", recipe, "--gpu", "24GB", "--json", word)[1])
    assert roomy["fits"] is True and roomy["cures"] == []
    limit = 0.8 * roomy["memory_bytes"]["peak"] / 1e6
    code, out, err = tongwen("plan", recipe, "--gpu", f"{limit:.3f}MB", "--json", word)
    found = json.loads(out)
    assert code == 0 and found["activation_checkpointing"]  # the first thing that is tried
    if not found["fits"]:
        peaks = [found["memory_bytes"]["peak"], *(cure["peak"] for cure in found["cures"])]
        assert "does not fit" in err and peaks == sorted(peaks, reverse=True)
        assert [cure["fits"] for cure in found["cures"]] == [peak <= limit * 1e6 for peak in peaks[1:]]
        for cure in found["cures"]:  # each is a word that the recipe knows
            assert tongwen("check", recipe, word, *cure["change"].split())[0] == 0 and cure["change"] in err
    hopeless = json.loads(tongwen("plan", recipe, "--gpu", "0.01MB", "--json", word)[1])
    changes = [cure["change"] for cure in hopeless["cures"]]
    assert len(changes) > 2 and not hopeless["cures"][-1]["fits"]
    assert method == "full" or changes[-1] == "sft.adapter.method=qlora"  # so small a model is smaller than its adapter
    for name, facts in found["stages"].items():
        if name != "sft":
            assert facts["disk_bytes"] > 0
            assert facts["memory_bytes"]["peak"] == memory_estimate.LIBRARIES + plan.STREAMED
    assert sorted(tmp_path.iterdir()) == [tmp_path / "data.jsonl", recipe]  # nothing was written


SHARED_BY = {
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
    "fsdp2": ("weights", "gradients", "optimizer"),
}


@pytest.mark.sample("lora-ddp", "full-fsdp2", "lora-zero3")
@pytest.mark.parametrize("engine", SHARED_BY)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_process_holds_its_shard(
    method: str, engine: str, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "fuse_blocks", leave)
    config, micro = load_config(ModelRef("t", str(chat_model))), MicroBatch(LENGTHS, ROWS, 2)
    how = setting(method)
    alone = memory_estimate.estimate_memory(config, how, micro)
    four = memory_estimate.estimate_memory(config, replace(how, sharding=ShardingPlan(engine, 4)), micro).bytes
    for purpose in ("weights", "gradients", "optimizer", "activations", "head"):
        parts = 4 if purpose in SHARED_BY[engine] else 1
        assert four[purpose] == pytest.approx(alone.bytes[purpose] / parts, abs=4), purpose
    shape, whole = alone.shape, 0
    assert shape.outside + 2 * shape.of_layer == shape.parameters, "two layers, and what belongs to none"
    if engine == "ddp":
        whole = alone.bytes["gradients"]  # in its buckets
    elif "weights" in SHARED_BY[engine]:  # fp32: two layers and the rest, and a layer's gradient twice
        whole = 4 * shape.parameters + 8 * (shape.trainable // 2)
    assert four.get("gathered", 0) == whole
    assert four["peak"] == sum(size for name, size in four.items() if name != "peak")


def test_deepspeed_16_bit_and_offload_memory() -> None:
    shape = ModelShape(1000, 100, 2, 8, 16, 32, of_layer=300, outside=400)
    needs = {"weights": 2 * 900 + 4 * 100, "gradients": 400, "optimizer": 800, "activations": 5, "head": 7}
    zero = ShardingPlan("zero2", 2, bucket=50).of(needs, shape, 2, 2)
    # All in bf16; half of the bf16 gradients, of both moments and of the fp32 originals; a bucket.
    assert zero == {"weights": 2000, "gradients": 100, "optimizer": 600, "activations": 5, "head": 7, "gathered": 100}
    away = ShardingPlan("fsdp2", 2, ("weights", "gradients", "optimizer")).of(needs, shape, 2, 0.5)
    # Embedding and head in bf16, two layers in four bits, one layer's gradient in bf16 and in fp32.
    assert away["gathered"] == 2 * 400 + 300 + 6 * 50 and away["weights"] == away["optimizer"] == 0
    kept = ShardingPlan("fsdp2", 2, reshard=False).of(needs, shape, 2, 2)
    assert kept["gathered"] == 2 * 400 + 2 * 600 + 6 * 50 and kept["weights"] == 1100


def test_sharding_is_read_from_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 10}}))
    assert sharding_plan(Sft(engine=str(file)), 4) == ShardingPlan("zero1", 4, bucket=10)
    assert sharding_plan(Sft(engine="zero2"), 4) == ShardingPlan("zero2", 4, bucket=1_000_000_000)
    away = ("optimizer", "gradients", "weights")
    assert sharding_plan(Sft(engine="zero3", offload=True), 4) == ShardingPlan("zero3", 4, away, bucket=500_000_000)
    assert sharding_plan(Sft(engine="fsdp2"), 4) == ShardingPlan("fsdp2", 4)
    assert sharding_plan(Sft(), 2) == ShardingPlan("ddp", 2) and sharding_plan(Sft(), 1) == ShardingPlan()


@pytest.mark.sample()
def test_plan_for_several_gpus_reports_memory_per_gpu(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, chat_model, merge=False)
    arguments = ("--gpu", "24GB", "--json", "sft.engine=fsdp2", "sft.adapter={method: full}")
    _, out, err = tongwen("plan", recipe, *arguments)
    one = json.loads(out)["memory_bytes"]
    assert "for one GPU; fsdp2 divides among several: --devices N" in err
    _, out, err = tongwen("plan", recipe, *arguments, "--devices", "4")
    four = json.loads(out)
    assert "per GPU: fsdp2 divides weights, gradients, optimizer among 4" in err
    assert four["engine"] == "fsdp2" and four["shared_out"] == ["weights", "gradients", "optimizer"]
    assert four["memory_bytes"]["optimizer"] == pytest.approx(one["optimizer"] / 4, abs=4)
    hopeless = json.loads(tongwen("plan", recipe, "--gpu", "0.01MB", *arguments[2:], "--devices", "4")[1])
    for cure in hopeless["cures"]:  # each goes with the engine
        assert tongwen("check", recipe, *arguments[3:], cure["change"])[0] == 0, cure


@pytest.mark.parametrize("word", ["on", "auto"])
def test_step_time_is_measured_on_request(
    word: str, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, recomputed = memory_estimate.recompute, list[bool]()

    def recompute(model: Any, **how: Any) -> None:
        recomputed.append(bool(how))  # a rehearsal has words of its own
        real(model, **how)

    monkeypatch.setattr(memory_estimate, "recompute", recompute)
    recipe = write_recipe(tmp_path, chat_model, sft=f", activation_checkpointing: {word}")
    code, out, err = tongwen("plan", recipe, "--measure", "--json")
    assert code == 0 and json.loads(out)["seconds"] > 0 and "time, measured" in err
    assert (False in recomputed) == (word == "on")


def test_fp16_and_bf16_are_estimated_separately(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    """All logits exist, in 16 bits and in accelerate's fp32 copy."""
    recipe = write_recipe(tmp_path, chat_model)
    for word, dtype in (("fp16", "float16"), ("auto", "bfloat16"), ("fp32", "float32")):
        _, out, err = tongwen("plan", recipe, "--gpu", "24GB", "--json", f"sft.precision={word}")
        found = json.loads(out)
        assert found["dtype"] == dtype and ("if that GPU supports it" in err) == (word == "auto") and found["rehearsed"]
    config, micro = load_config(ModelRef("t", str(chat_model))), MicroBatch((4096,), 4000, 2)
    half, brain = (
        estimate_memory(config, setting("lora", dtype), micro).bytes for dtype in (torch.float16, torch.bfloat16)
    )
    assert half["head"] == pytest.approx(6 * 4000 * config.vocab_size, rel=0.01) and half["head"] > 4 * brain["head"]


def test_parse_memory_accepts_common_units() -> None:
    assert plan.parse_memory("24GB") == 24_000_000_000 and plan.parse_memory("16 GiB") == 16 * 2**30
    assert plan.parse_memory("1.5tb") == 1_500_000_000_000


@pytest.mark.parametrize("word", ["", "0GB", "0.0000001MB", "24", "much"])
def test_invalid_memory_amount_is_refused(word: str, chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    code, _, err = tongwen("plan", write_recipe(tmp_path, chat_model), "--gpu", word)
    assert code == 2 and f"--gpu: {word!r} is not an amount of memory" in err


def weights_in(folder: Path) -> int:
    """Bytes of weights and of optimizers."""
    files = (file for file in folder.rglob("*") if file.suffix == ".safetensors" or file.name == "optimizer.pt")
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    "settings",
    [
        "save_every: 2, train: full",
        "save_every: 4, train: embeddings",
        "save_every: 2, phases: [{train: embeddings}, {train: lora+embeddings}], keep_checkpoints: 1, adapter: {rank: 4}",
    ],
)
def test_planned_disk_use_matches_the_run(
    settings: str, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the fullest moment, too: a checkpoint is written before an older one goes. Headers are a few percent here."""
    folder, most = tmp_path / "out" / "pretrain.partial", list[int]()

    def watched(*arguments: Any) -> None:
        most.append(weights_in(folder))
        commit(*arguments)

    monkeypatch.setattr("tongwen.train.trainer.commit", watched)
    recipe = write_recipe(tmp_path, chat_model)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["output"] * 2} for row in dialogues(24)])
    recipe.write_text(
        f"name: t\nbase: {chat_model}\nout: {tmp_path / 'out'}\nprepare: {{documents: {texts}, held_out: 4}}\n"
        f"pretrain: {{batch_size: 4, samples: 0, stop_after: 6 steps, precision: fp32, {settings}}}\n"
    )
    found = json.loads(tongwen("plan", recipe, "--json")[1])
    assert tongwen("run", recipe)[0] == 0
    kept, result = (weights_in(tmp_path / "out" / "pretrain" / name) for name in ("checkpoints", ""))
    assert found["disk"]["checkpoints"] == pytest.approx(kept, rel=0.12)
    assert found["disk"]["weights"] == pytest.approx(result - kept, rel=0.05)
    assert found["disk_bytes"] == pytest.approx(max(*most, result), rel=0.12)


def test_plan_counts_prepared_rows(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, chat_model, rows=dialogues(24) + dialogues(10))

    def samples(*overrides: str) -> tuple[int, bool]:
        _, out, err = tongwen("plan", recipe, "--json", *overrides)
        return json.loads(out)["samples"], "prepare has not run" in err

    assert samples() == (30, True)
    assert tongwen("run", recipe, "--only", "prepare")[0] == 0
    assert samples() == (20, False)
    assert samples("prepare.held_out=8") == (26, True), "that is another preparation"
    write_rows(tmp_path / "data.jsonl", dialogues(23))
    assert samples() == (19, True)


def test_plan_counts_future_vocabulary_rows(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    recipe, overrides = (
        write_recipe(tmp_path, chat_model),
        ("--json", "sft.adapter.method=new_rows", "sft.precision=fp32"),
    )
    _, out, err = tongwen(
        "plan", recipe, *overrides, "vocab={pieces: 90, words: [天气], pad_to_multiple: 8}", "merge=null"
    )
    found, config = json.loads(out), load_config(ModelRef("t", str(chat_model)))
    assert "vocab has not run yet: the plan counts at most 91 new rows" in err
    assert found["trainable"] == 91 * config.hidden_size
    larger = -(-(config.vocab_size + 91) // 8) * 8 * config.hidden_size * 4  # tied
    assert found["memory_bytes"]["weights"] > larger
    _, out, err = tongwen("plan", recipe, "--json", "sft.adapter.rank=1", "vocab={pieces: 90}", "merge=null")
    assert json.loads(out)["trainable"] > 90 * config.hidden_size, "beside an adapter, where no pretrain comes before"


def test_fused_weights_are_merged_in_memory(tmp_path: Path, tongwen: Any) -> None:
    base = tmp_path / "base"
    model = tiny_moe(vocab_size=len(byte_level_tokenizer(base)))
    model.save_pretrained(str(base))
    adapter = "sft.adapter={rank: 2, target_parameters: [mlp.experts.gate_up_proj]}"
    _, out, _ = tongwen("plan", write_recipe(tmp_path, base), "--json", adapter)
    found = json.loads(out)["stages"]["merge"]["memory_bytes"]
    assert found["weights"] == 4 * sum(part.numel() for part in model.parameters()) and "blocks" not in found
    assert found["merging"] == 8 * model.model.layers[0].mlp.experts.gate_up_proj.numel()


def test_token_budget_grows_with_gpu_memory() -> None:
    def tokens(memory: int, full: bool = False, **widths: int) -> int:
        return token_budget("cuda", LlamaConfig(vocab_size=128256, **widths), memory << 30, full=full)

    one: dict[str, int] = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    eight: dict[str, int] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    assert [tokens(memory, **one) for memory in (0, 24, 80, 141)] == [8192, 8192, 16384, 32768]
    assert tokens(80, **eight) == 8192 and tokens(80, full=True, **one) < tokens(141, full=True, **one)
    assert tokens(10_000, **one) == 65536 and token_budget("cpu", LlamaConfig()) == 4096


def test_plan_for_another_gpu_uses_its_token_budget(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, chat_model)
    for arguments, tokens in (((), 65536), (("--devices", "2"), 8192)):
        code, out, _ = tongwen("plan", recipe, "--gpu", "80GB", "--json", *arguments)
        assert code == 0 and json.loads(out)["micro_batch_tokens"] == tokens


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "adalora"])
def test_each_method_is_simulated(method: str, chat_model: Path) -> None:
    config = load_config(ModelRef("t", str(chat_model)))
    needs = estimate_memory(config, setting(method), MicroBatch(LENGTHS, ROWS, 2))
    assert needs.rehearsed and needs.bytes["activations"] > 0
