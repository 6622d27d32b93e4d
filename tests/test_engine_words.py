"""What a recipe and a user's own engine file say of engines: read as the recipe's words, or refused with both values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_rows
from tongwen.errors import TongwenError
from tongwen.recipe.load import load
from tongwen.train import engine

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


def recipe(folder: Path, settings: Any, sft: str = "") -> Path:
    """A recipe whose engine is a file with these settings, or a word."""
    word = settings
    if isinstance(settings, dict) or "\n" in settings:
        file = folder / ("engine.json" if isinstance(settings, dict) else "engine.yaml")
        file.write_text(json.dumps(settings) if isinstance(settings, dict) else settings)
        word = str(file)
    data = write_rows(folder / "data.jsonl", [])
    out = folder / "recipe.yaml"
    out.write_text(f"name: x\nbase: y\nprepare: {{dialogues: {data}}}\nsft: {{engine: {word}{sft}}}\n")
    return out


def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(engine, "_prepare_deepspeed_on_cpu", lambda: None)


def test_deepspeed_files_of_older_projects_load_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch)
    sft, notices = read(recipe(tmp_path, BELLE))
    assert (
        sft.schedule == "warmup_lr"
        and sft.optimizer == "adamw"
        and sft.trainer == {"adam_beta1": 0.9, "adam_beta2": 0.999}
    )
    assert "schedule: warmup_lr" in notices and "fp16" in notices
    made = engine.choose(sft)
    config = made.arguments["deepspeed"]
    assert made.name == "zero2" and config["zero_optimization"]["allgather_bucket_size"] == 5e8
    assert config["steps_per_print"] == 5 and config["gradient_clipping"] == "auto"
    assert not {"optimizer", "scheduler", "fp16"} & set(config), "the recipe has them"
    sft, notices = read(recipe(tmp_path, NO_OFFLOAD))
    assert engine.choose(sft).name == "zero2" and not notices
    sft, _ = read(recipe(tmp_path, {**NO_OFFLOAD, "gradient_clipping": 0.5, "bf16": {"enabled": True}}))
    assert sft.max_grad_norm == 0.5 and sft.precision == "bf16"


def read(file: Path) -> tuple[Any, str]:
    made, notices = load(file)
    return made.sft, "\n".join(notices)


def test_the_batch_of_a_file_is_the_recipes_or_refused(tmp_path: Path) -> None:
    assert read(recipe(tmp_path, {**NO_OFFLOAD, "train_batch_size": 32}))[0].batch_size == 32
    per_device = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    file = recipe(tmp_path, {**NO_OFFLOAD, **per_device})
    assert load(file, ["devices=4"])[0].sft.batch_size == 24  # type: ignore[union-attr]
    with pytest.raises(TongwenError) as refused:
        load(recipe(tmp_path, {**NO_OFFLOAD, "train_batch_size": 32}, ", batch_size: 16"))
    text = refused.value.text()
    assert "the recipe says 16" in text and "engine.json says 32" in text and '"auto"' in text


def test_an_fsdp_file_of_the_first_version_is_read_as_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch)
    sft, notices = read(recipe(tmp_path, FSDP1))
    assert sft.offload and sft.precision == "bf16"
    assert "backward_prefetch" in notices and "state_dict_type" in notices
    assert engine.choose(sft).arguments["fsdp_config"] == {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": False,
        "cpu_offload": True,
    }


@pytest.mark.parametrize(
    ("settings", "sft", "said"),
    [
        ("zero4", "", "'zero4' is not one of auto, ddp, fsdp2, zero2, zero3"),
        ("ddp", ", offload: true", "`offload` needs an engine that shares out"),
        ("fsdp2", ", optimizer: muon", "`optimizer: muon` does not work with `engine: fsdp2`"),
        ("zero2", ", adapter: {method: adalora}", "`method: adalora` does not work"),
        ("zero3", ", adapter: {method: qlora}", "`engine: fsdp2`"),
        ("fsdp2", ", adapter: {method: qlora, quantize: int8}", "`quantize: nf4`"),
        ({"optimizer": {"type": "Lamb"}}, "", "'Lamb' is not known here; known are: Adam, AdamW"),
        ({"scheduler": {"type": "OneCycle"}}, "", "'OneCycle' is not known here"),
        ("distributed_type: MULTI_GPU\nfsdp_config: {}\n", "", "'MULTI_GPU' is not known here"),
        ("fsdp_config: {fsdp_wonder: 1}\n", "", "'wonder' is not known here"),
        ("nowhere.json", "", "No such file"),
        ("a: [\n", "", "cannot be read"),
    ],
)
def test_what_does_not_work_is_refused_by_name(settings: Any, sft: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TongwenError) as refused:
        load(recipe(tmp_path, settings, sft))
    assert said in refused.value.text() and refused.value.exit_code == 2


def test_one_process_and_other_settings_from_outside_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TongwenError, match="several processes"):
        engine.choose(read(recipe(tmp_path, "ddp"))[0])
    launched(monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TongwenError, match="ACCELERATE_USE_FSDP"):
        engine.choose(read(recipe(tmp_path, "auto"))[0])


def test_a_checkpoint_of_another_engine_or_of_more_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    engine.Engine("single").check_resumes(tmp_path)
    with pytest.raises(TongwenError, match="one of ddp, and zero2 cannot continue it"):
        engine.Engine("zero2").check_resumes(tmp_path)
    (tmp_path / "global_step3").mkdir()
    for rank in range(2):
        (tmp_path / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(TongwenError, match=r"2 processes, and here are 1[\s\S]*--devices 2"):
        engine.Engine("zero2").check_resumes(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine.Engine("zero2").check_resumes(tmp_path)
