"""The engine of a training: made from the recipe and the user's file, refused where it cannot be what they ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launching import needs_deepspeed
from tests.recipe.engine_files import fsdp, read, recipe, set_launcher_environment, zero
from tongwen.core.errors import TongwenError
from tongwen.train import parallel


def test_unknown_fsdp_layer_is_refused(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    set_launcher_environment(monkeypatch)
    names = "fsdp_transformer_layer_cls_to_wrap: 'LlamaDecoderLayer, GPTNeoXLayer'"
    chosen = parallel.choose_engine(read(recipe(tmp_path, fsdp(names)))[0])
    with pytest.raises(TongwenError) as refused:
        chosen.shard(AutoModelForCausalLM.from_pretrained(chat_model), torch.float32)
    assert refused.value.exit_code == 2 and "no layer 'GPTNeoXLayer'" in (text := refused.value.text())
    assert "engine.yaml" in text and "fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer" in text


@needs_deepspeed
def test_unknown_deepspeed_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(TongwenError, match=r"engine.json · zero_optimization.wonder: 1: Extra inputs") as refused:
        parallel.choose_engine(read(recipe(tmp_path, zero(wonder=1)))[0])
    assert refused.value.exit_code == 2
    by_itself = read(recipe(tmp_path, zero(reduce_bucket_size="auto")))[0]
    assert parallel.choose_engine(by_itself).name == "zero2" and parallel.sharding_plan(by_itself, 2).bucket == 0


def test_conflicting_accelerate_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher_environment(monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TongwenError, match="ACCELERATE_USE_FSDP"):
        parallel.choose_engine(read(recipe(tmp_path, "auto"))[0])


def test_checkpoint_of_another_engine_or_world_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    parallel.Engine("single").check_resumes(tmp_path)
    with pytest.raises(TongwenError, match="ddp wrote the checkpoint, and zero2 cannot continue it"):
        parallel.Engine("zero2").check_resumes(tmp_path)
    (tmp_path / "global_step3").mkdir()
    for rank in range(2):
        (tmp_path / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(TongwenError, match=r"2 processes, but 1 is running[\s\S]*--devices 2"):
        parallel.Engine("zero2").check_resumes(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parallel.Engine("zero2").check_resumes(tmp_path)
