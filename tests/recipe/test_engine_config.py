"""Engine settings of a recipe and of a user's engine file: translated to recipe settings, or refused with both values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipe.engine_files import fsdp, read, recipe, set_launcher_environment, zero
from tongwen.core.errors import TongwenError
from tongwen.recipe.load import load_recipe
from tongwen.train import parallel

# The two files that older projects ship, as they are.
BELLE: dict[str, Any] = {
    "train_batch_size": "auto",
    "optimizer": {
        "type": "Adam",
        "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": "auto", "weight_decay": "auto"},
    },
    "overwrite": True,
    "steps_per_print": 5,
    "fp16": {"enabled": True, "min_loss_scale": 1, "opt_level": "O2"},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "contiguous_gradients": True,
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
}
NO_OFFLOAD: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 100, "initial_scale_power": 16},
    "zero_optimization": {"stage": 2, "allgather_bucket_size": 1e8, "overlap_comm": True, "reduce_scatter": True},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
FSDP1 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_processes: 8
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_offload_params: true
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_use_orig_params: true
"""


def rates(of_optimizer: Any, peak: Any, **settings: Any) -> dict[str, Any]:
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": peak, **settings}}
    return {**NO_OFFLOAD, "optimizer": {"params": {"lr": of_optimizer}}, "scheduler": schedule}


def accelerates(settings: str, beside: str = "") -> str:
    return f"distributed_type: DEEPSPEED\n{beside}deepspeed_config: {{{settings.strip('{}')}}}\n"


def test_deepspeed_files_of_older_projects_load_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher_environment(monkeypatch)
    sft, notices = read(recipe(tmp_path, BELLE))
    assert (
        sft.schedule == "warmup_lr"
        and sft.optimizer == "adamw"
        and sft.trainer == {"adam_beta1": 0.9, "adam_beta2": 0.999}
    )
    assert "schedule: warmup_lr" in notices and "fp16" in notices
    made = parallel.choose_engine(sft)
    config = made.arguments["deepspeed"]
    assert made.name == "zero2" and config["zero_optimization"]["allgather_bucket_size"] == 5e8
    assert config["steps_per_print"] == 5 and config["gradient_clipping"] == "auto"
    assert not {"optimizer", "scheduler", "fp16"} & set(config), "the recipe has them"
    sft, notices = read(recipe(tmp_path, NO_OFFLOAD))
    assert parallel.choose_engine(sft).name == "zero2" and not notices
    sft, _ = read(recipe(tmp_path, {**NO_OFFLOAD, "gradient_clipping": 0.5, "bf16": {"enabled": True}}))
    assert sft.max_grad_norm == 0.5 and sft.precision == "bf16"


def test_batch_size_of_the_file_must_match_the_recipe(tmp_path: Path) -> None:
    assert read(recipe(tmp_path, {**NO_OFFLOAD, "train_batch_size": 32}))[0].batch_size == 32
    per_device = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    file = recipe(tmp_path, {**NO_OFFLOAD, **per_device})
    assert load_recipe(file, ["devices=4"])[0].sft.batch_size == 24  # type: ignore[union-attr]
    with pytest.raises(TongwenError) as refused:
        load_recipe(recipe(tmp_path, {**NO_OFFLOAD, "train_batch_size": 32}, ", batch_size: 16"))
    text = refused.value.text()
    assert "the recipe has 16" in text and "engine.json has 32" in text and '"auto"' in text


def test_fsdp1_file_is_read_as_fsdp2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher_environment(monkeypatch)
    sft, notices = read(recipe(tmp_path, FSDP1))
    assert sft.offload and sft.precision == "bf16"
    assert "backward_prefetch" in notices and "state_dict_type" in notices
    assert parallel.choose_engine(sft).arguments["fsdp_config"] == {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": False,
        "cpu_offload": True,
    }


@pytest.mark.parametrize(
    ("settings", "sft", "message"),
    [
        ({"optimizer": {"type": "Lamb"}}, "", "optimizer.type: 'Lamb' is not supported; supported: Adam, AdamW"),
        ({"optimizer": {"params": {"betas": 0.9}}}, "", "optimizer.params.betas: 0.9 is not supported"),
        ({"optimizer": {"params": {"eps": "x"}}}, "", "optimizer.params.eps: 'x' is not supported"),
        ({"optimizer": []}, "", "optimizer: [] must be a mapping of keys to values"),
        ("engine.json: null", "", "'null' must be a mapping of keys to values"),
        ("engine.json: true", "", "True must be a mapping of keys to values"),
        ("engine.yaml: []", "", "[] must be a mapping of keys to values"),
        ({"zero_optimization": {"stage": 4}}, "", "zero_optimization.stage: 4 is not supported"),
        (zero(offload_optimizer={"device": "gpu"}), "", "offload_optimizer.device: 'gpu' is not supported"),
        (zero(cpu_offload="maybe"), "", "cpu_offload: 'maybe' is not supported; supported: true, false"),
        (zero(reduce_bucket_size="big"), "", "reduce_bucket_size: 'big' is not supported"),
        ({**NO_OFFLOAD, "train_batch_size": "32"}, "", "train_batch_size: '32' is not supported"),
        (
            fsdp("", "mixed_precision: bf16\n"),
            ", precision: fp32",
            "→ in that file, leave it out or write the same value",
        ),
        (
            {**NO_OFFLOAD, "train_batch_size": 32},
            ", batch_tokens: 400",
            "the recipe has 400, but ENGINE has batch_size: 32",
        ),
        (rates(1e-4, 2e-4), "", "warmup_max_lr: 0.0002, but optimizer.params.lr is 0.0001"),
        (BELLE, ", trainer: {adam_beta2: 0.5}", "adam_beta2: the recipe has 0.5, but ENGINE has 0.999"),
        (BELLE, ", trainer: 5", "trainer: 5 must be a valid dictionary"),
        ({"scheduler": {"type": "OneCycle"}}, "", "'OneCycle' is not supported"),
        ({"scheduler": {"type": []}}, "", "scheduler.type: [] is not supported"),
        (
            "distributed_type: MULTI_GPU\n",
            "",
            "'MULTI_GPU' is not supported; supported: FSDP, DEEPSPEED\n  → engine: ddp",
        ),
        (fsdp("fsdp_wonder: 1"), "", "'wonder' is not supported"),
        (fsdp("fsdp_sharding_strategy: NO_SHARD"), "", "HYBRID_SHARD_ZERO2\n  → engine: ddp"),
        (fsdp("fsdp_sharding_strategy: 3"), "", "HYBRID_SHARD_ZERO2\n  → engine: ddp"),
        (fsdp("fsdp_sharding_strategy: 9"), "", "9 is not supported"),
        (fsdp("fsdp_auto_wrap_policy: SIZE_BASED_WRAP"), "", "  → fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        (fsdp("fsdp_transformer_layer_cls_to_wrap: 5"), "", "cls_to_wrap: 5 is not supported"),
        (accelerates("zero_stage: 4"), "", "'4' is not supported; supported: 0, 1, 2, 3\n  → engine: zero2"),
        (accelerates("zero_stage: 3, offload_optimizer_device: cpu"), "", "'cpu, none' is not supported"),
        (accelerates("zero_stage: 3, offload_param_device: cpu"), "", "'none, cpu' is not supported"),
        (accelerates("offload_optimizer_device: nvme"), "", "→ engine: FILE.json"),
        (accelerates("deepspeed_config_file: a.txt"), "", "'a.txt' is not supported"),
        ("nowhere.json", "", "No such file"),
        ("a: [\n", "", "cannot be read"),
    ],
)
def test_unsupported_engine_settings_are_refused(settings: Any, sft: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TongwenError) as refused:
        load_recipe(recipe(tmp_path, settings, sft))
    text = refused.value.text().replace(str(tmp_path / "engine.json"), "ENGINE")
    assert message in text and refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({**NO_OFFLOAD, "gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4"),
        ({**NO_OFFLOAD, "train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu: 4"),
        ({**NO_OFFLOAD, "train_batch_size": 8, "gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4"),
        (rates("auto", "auto", warmup_min_lr=1e-5), "scheduler.params.warmup_min_lr: 1e-05"),
        (rates("auto", "auto", warmup_type="linear", warmup_min_lr=0), "scheduler.params.warmup_type: linear"),
        (rates("auto", "auto", total_num_steps=100), "scheduler.params.total_num_steps: 100"),
        (rates("auto", "auto", warmup_type="log", warmup_min_lr=0), ""),
        ({**NO_OFFLOAD, "optimizer": {"params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode: False"),
        ({**NO_OFFLOAD, "bf16": {"enabled": False}}, "bf16.enabled: false"),
        ({**NO_OFFLOAD, "amp": {"enabled": True}}, "amp"),
        (fsdp("", "num_processes: 8\nmachine_rank: 0\n"), "num_processes: 8"),
        (fsdp("", "mixed_precision: fp8\n"), "mixed_precision: fp8"),
        (fsdp("", "gradient_accumulation_steps: 4\n"), "gradient_accumulation_steps: 4"),
        (fsdp("", "parallelism_config: {tp_size: 2}\n"), "parallelism_config"),
        (
            fsdp("fsdp_sharding_strategy: HYBRID_SHARD"),
            "fsdp_sharding_strategy: HYBRID_SHARD (sharded over all processes)",
        ),
        (fsdp("fsdp_min_num_params: 5"), "min_num_params"),
        (accelerates("zero3_init_flag: true"), "deepspeed_config.zero3_init_flag: True"),
        (accelerates("zero_stage: 1"), "deepspeed_config.zero_stage: 1"),
        (accelerates("offload_param_device: cpu"), "deepspeed_config.offload_param_device: cpu"),
        (fsdp("fsdp_backward_prefetch_policy: BACKWARD_PRE"), "backward_prefetch_policy"),
    ],
)
def test_unused_engine_settings_are_reported(settings: Any, unused: str, tmp_path: Path) -> None:
    _, notices = read(recipe(tmp_path, settings))
    reported = [line.split("decides: ")[1] for line in notices.splitlines() if "not used" in line]
    assert reported == ([unused] if unused else [])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (zero(stage="2", overlap_comm=True), "zero2"),
        (zero(offload_optimizer={"device": "none"}, stage3_gather_fp16_weights_on_model_save=True), zero()),
        (zero(cpu_offload=True, cpu_offload_use_pin_memory=True), zero(offload_optimizer={"device": "cpu"})),
        (zero(stage=3, cpu_offload_params="true"), zero(stage=3, offload_param={"device": "cpu"})),
        (fsdp("fsdp_offload_params: 'false', fsdp_activation_checkpointing: 'False'"), fsdp("")),
        (fsdp("fsdp_offload_params: 'true'"), fsdp("fsdp_offload_params: true")),
        (fsdp("fsdp_reshard_after_forward: 'false'"), fsdp("fsdp_reshard_after_forward: false")),
        (fsdp("fsdp_reshard_after_forward: SHARD_GRAD_OP"), fsdp("fsdp_reshard_after_forward: false")),
        (fsdp("fsdp_sharding_strategy: 2"), fsdp("fsdp_reshard_after_forward: false")),
        (fsdp("fsdp_sharding_strategy: FULL_SHARD, fsdp_ignored_modules: null"), fsdp("")),
        (accelerates("zero_stage: 2, offload_optimizer_device: none"), "zero2"),
        (
            accelerates("zero_stage: 3, offload_param_device: cpu, offload_optimizer_device: cpu"),
            "zero3, offload: true",
        ),
        (accelerates("zero_stage: 2, offload_optimizer_device: cpu"), "zero2, offload: true"),
        (accelerates("zero_stage: 0"), "auto"),
        ({"fp16": {"enabled": "auto"}, "train_batch_size": None}, "auto"),
        (zero(stage=0), "auto"),
        (zero(reduce_bucket_size="5e8"), zero(reduce_bucket_size=5e8)),
        (rates("1e-4", 1e-4), rates(1e-4, 1e-4)),
        (fsdp("fsdp_ignored_modules: ''"), fsdp("")),
        (accelerates("gradient_clipping: 0.5"), "zero2, max_grad_norm: 0.5"),
        (accelerates("{}", "mixed_precision: no\n"), "zero2, precision: fp32"),
        (accelerates("deepspeed_config_file: FOLDER/own.json", "mixed_precision: no\n"), "zero3, max_grad_norm: 0.5"),
    ],
)
def test_alternative_spellings_are_accepted(
    settings: Any, word: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_launcher_environment(monkeypatch)
    (tmp_path / "own.json").write_text(json.dumps({**zero(stage=3, overlap_comm=True), "gradient_clipping": 0.5}))
    settings = settings.replace("FOLDER", str(tmp_path)) if isinstance(settings, str) else settings
    made = []
    for number, one in enumerate((settings, word)):
        (folder := tmp_path / str(number)).mkdir()
        sft = read(recipe(folder, one))[0]
        made.append(
            (
                parallel.choose_engine(sft).arguments,
                parallel.sharding_plan(sft, 2),
                sft.max_grad_norm,
                sft.precision,
                sft.activation_checkpointing,
            )
        )
    assert made[0] == made[1]
