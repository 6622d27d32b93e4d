"""Laws that need a GPU; `make gpu` runs them, without a GPU they are skipped."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import byte_level_tokenizer, tiny_llama, write_recipe
from tests.laws.packed_batches import batch_of, gradient, random_store
from tongwen.cli.main import main
from tongwen.model.adapters.attach import make_trainable
from tongwen.model.kernels import packed_attention
from tongwen.model.kernels.checkpointing import compile_layers
from tongwen.model.kernels.fused_blocks import fuse_blocks
from tongwen.model.kernels.loss import LearnedCrossEntropy, learned_loss, use_blockwise_head
from tongwen.model.loading.load import load_model
from tongwen.model.loading.model_ref import ModelRef
from tongwen.recipe.training import AdapterConfig
from tongwen.train import audit
from tongwen.train.packing import to_device
from tongwen.train.try_batch import fits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads wide enough for flash attention."""
    folder = tmp_path_factory.mktemp("gpu")
    tiny_llama(folder, len(byte_level_tokenizer(folder)), hidden_size=128, intermediate_size=256, num_attention_heads=8)
    return folder


def on_gpu(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = load_model(ModelRef("t", str(folder)), dtype)
    model.set_attn_implementation(packed_attention.register())
    return model.cuda()


@pytest.fixture()
def flash_attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry for each call of flash attention."""
    called: list[int] = []
    original = packed_attention._all_at_once
    monkeypatch.setattr(packed_attention, "_all_at_once", lambda *rest: called.append(1) or original(*rest))
    return called


@pytest.mark.parametrize("window", [None, 1, 5, 99])
@pytest.mark.parametrize("heads", [8, 2])
def test_flash_attention_matches_separate_documents(
    heads: int, window: int | None, flash_attention_calls: list[int]
) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(1, many, 50, 64, device="cuda", requires_grad=True) for many in (8, heads, heads)]
    borders = torch.tensor([0, 1, 30, 50], dtype=torch.int32, device="cuda")
    kwargs: dict[str, Any] = {"cu_seq_lens_q": borders, "max_length_q": 29, "sliding_window": window}

    def both(*parts: torch.Tensor) -> list[torch.Tensor]:
        out, _ = packed_attention.documents_attention(None, *parts, None, **kwargs)  # type: ignore[arg-type]
        return [out, *torch.autograd.grad(out.float().square().sum(), parts)]

    exact = both(*parts)
    assert not flash_attention_calls, "fp32 goes the other way"
    with torch.autocast("cuda", torch.bfloat16):
        fast = both(*parts)
    assert flash_attention_calls
    of_size = max(
        float(wanted.detach().norm()) for wanted in exact
    )  # who sees only itself has no gradient of its scores
    for found, wanted in zip(fast, exact, strict=True):
        near = 0.02 * float(wanted.detach().norm()) + 1e-4 * of_size
        assert float((found.detach().float() - wanted.detach()).norm()) < near


def test_packed_documents_are_isolated(base: Path, flash_attention_calls: list[int]) -> None:
    store = random_store(2, longest=60)
    assert audit.check_isolation(on_gpu(base), [store.sample(0), store.sample(1)], learned_loss) < 0.05
    assert flash_attention_calls


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gpu_gradient_matches_cpu(method: str, base: Path) -> None:
    choice = AdapterConfig(method="full") if method == "full" else AdapterConfig(rank=4)
    model = make_trainable(load_model(ModelRef("t", str(base)), torch.float32), choice, []).model
    model.set_attn_implementation(packed_attention.register())
    loss, wanted = gradient(model, batch_of(4))
    model.cuda()
    batch = to_device(batch_of(4), model)
    for spared in (False, True)[: 2 if method == "lora" else 1]:
        assert not spared or use_blockwise_head(model, batch)
        for dtype, near in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                found_loss, found = gradient(model, batch)
            assert found_loss == pytest.approx(loss, rel=near)
            assert float((found.cpu() - wanted).norm() / wanted.norm()) < near


def test_fused_blocks_match_the_unfused_gradient(base: Path) -> None:
    model = make_trainable(on_gpu(base), AdapterConfig(rank=4), []).model.train()
    for name, part in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(part, std=0.05)
    batch = to_device(batch_of(4), model)
    with torch.autocast("cuda", torch.bfloat16):
        loss, wanted = gradient(model, batch)
    assert fuse_blocks(model) > 0
    with torch.autocast("cuda", torch.bfloat16):
        found_loss, found = gradient(model, batch)
    assert found_loss == pytest.approx(loss, rel=0.01)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_gpu_loss_matches_torch() -> None:
    logits = torch.randn(600, 50, device="cuda", requires_grad=True)
    targets = torch.randint(0, 50, (600,), device="cuda")
    total, _ = LearnedCrossEntropy.apply(logits * 1.0, targets, 1.0)
    (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), logits)
    total.backward()
    assert logits.grad is not None and torch.allclose(logits.grad, wanted, atol=1e-5)


def test_compiled_layers_give_the_same_gradient(base: Path, flash_attention_calls: list[int]) -> None:
    model = make_trainable(on_gpu(base), AdapterConfig(rank=4), []).model.train()
    batch = to_device(batch_of(4), model)
    loss, wanted = gradient(model, batch)
    assert compile_layers(model) == 2 and flash_attention_calls
    flash_attention_calls.clear()
    found_loss, found = gradient(model, batch)
    assert flash_attention_calls, "compiled layers go the same way"
    assert found_loss == pytest.approx(loss, rel=0.01)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_micro_batch_that_does_not_fit_is_detected_and_freed(base: Path) -> None:
    model = make_trainable(on_gpu(base), AdapterConfig(rank=4), []).model
    assert fits(model, batch_of(4), learned_loss, nullcontext(), passes=2, reserve=0)
    before = torch.cuda.memory_allocated()  # with what the first product on a GPU takes for good
    whole = torch.cuda.get_device_properties(0).total_memory
    assert not fits(model, batch_of(4), learned_loss, nullcontext(), passes=2, reserve=whole)
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("settings", ["", ", compile: true", ", activation_checkpointing: on"])
def test_training_on_gpu_lowers_the_loss(
    settings: str, base: Path, tmp_path: Path, flash_attention_calls: list[int]
) -> None:
    recipe = write_recipe(tmp_path, base, sft=f", stop_after: 12 steps{settings}")
    recipe.write_text(recipe.read_text().replace("precision: fp32", "precision: bf16"))
    assert main(["run", str(recipe)]) == 0
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "out" / "sft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0] and flash_attention_calls
    shutil.rmtree(tmp_path / "out")
