"""Laws of optimizations: they change no number, and trials before the run leave no trace."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import write_recipe
from tests.launching import run_forked
from tests.laws.packed_batches import batch_of, gradient, packed_model, random_store
from tongwen.core.console import human_bytes
from tongwen.core.errors import MachineError
from tongwen.model.adapters.attach import make_trainable
from tongwen.model.kernels.checkpointing import compile_layers, recompute
from tongwen.model.kernels.loss import learned_loss
from tongwen.recipe.training import AdapterConfig, Sft
from tongwen.train.memory import CUDA_CONTEXT, device_memory
from tongwen.train.metrics import peak_memory_bytes
from tongwen.train.try_batch import fits
from tongwen.workflows.training import model as training_model


@pytest.mark.sample()
@pytest.mark.skipif(not shutil.which("g++"), reason="torch's inductor compiles with g++")
def test_compiled_layers_give_the_same_loss_and_gradient(chat_model: Path) -> None:
    model = make_trainable(packed_model(chat_model), AdapterConfig(method="full"), []).model.train()
    batches = [batch_of(count) for count in (2, 5)]  # other lengths, the same program
    wanted = [gradient(model, batch) for batch in batches]
    assert compile_layers(model) == 2
    for batch, (wanted_loss, wanted_gradient) in zip(batches, wanted, strict=True):
        loss, found = gradient(model, batch)
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert float((found - wanted_gradient).norm() / wanted_gradient.norm()) < 1e-5


def test_missing_compiler_error_names_the_remedy(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match="no compiler for cpu") as caught:
        compile_layers(packed_model(chat_model))
    assert "compile: false" in caught.value.text()


@pytest.mark.sample()
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_compiled_run_matches_the_uncompiled_run(checkpointing: str, chat_model: Path, tmp_path: Path) -> None:
    """Run from the recipe to the saved adapter, with the graphs that inductor would get."""

    def trace_only() -> None:
        original = torch.nn.Module.compile
        torch.nn.Module.compile = lambda self, **kwargs: original(self, backend="eager", **kwargs)  # type: ignore[method-assign]

    losses = []
    for value in ("false", "true"):
        sft = f", stop_after: 3 steps, compile: {value}, activation_checkpointing: {checkpointing}"
        recipe = write_recipe(tmp_path / value, chat_model, sft=sft, merge=False)
        assert run_forked("run", recipe, before=trace_only) == 0
        lines = (tmp_path / value / "out" / "sft" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_trial_of_a_micro_batch_leaves_no_trace(chat_model: Path) -> None:
    model = make_trainable(packed_model(chat_model), AdapterConfig(rank=4), []).model.eval()
    batch, state, passed = batch_of(3), torch.get_rng_state(), list[int]()

    def counted(model: Any, batch: dict[str, Any]) -> Any:
        passed.append(sum(part.grad is not None for part in model.parameters()))
        return learned_loss(model, batch)

    assert fits(model, batch, counted, nullcontext(), passes=2, reserve=1000)
    assert passed[0] == 0 < passed[1], "the second pass meets the gradients of the first"
    assert all(part.grad is None for part in model.parameters()) and not model.training
    assert torch.equal(state, torch.get_rng_state())


def test_micro_batch_that_does_not_fit_raises_no_error(chat_model: Path) -> None:
    model = packed_model(chat_model).eval()

    def overflow(model: Any, batch: dict[str, Any]) -> Any:
        total, nats = learned_loss(model, batch)
        total.register_hook(
            lambda gradient: (_ for _ in ()).throw(
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB")
            )
        )
        return total, nats

    assert not fits(model, batch_of(3), overflow, nullcontext(), passes=1, reserve=0)
    assert all(part.grad is None for part in model.parameters()) and not model.training
    # What is held in reserve is really held.
    assert not fits(model, batch_of(3), learned_loss, nullcontext(), passes=1, reserve=2**60)

    def fail(message: str) -> Any:
        return lambda model, batch: (_ for _ in ()).throw(RuntimeError(message))

    full = fail("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")
    assert not fits(model, batch_of(3), full, nullcontext(), passes=1, reserve=0)
    with pytest.raises(RuntimeError, match="another"):
        fits(model, batch_of(3), fail("another reason"), nullcontext(), passes=1, reserve=0)


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_processes_that_share_weights_decide_alike(
    engine: str, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer must not depend on values that differ between processes: free memory, or their shard of the model."""
    model = packed_model(chat_model)
    prepared, config = SimpleNamespace(model=model, device="cuda", dtype=torch.bfloat16), Sft(engine=engine)
    size = sum(part.numel() * part.element_size() for part in model.parameters())
    answers = {}
    for whole in (CUDA_CONTEXT, CUDA_CONTEXT + size, 2 * CUDA_CONTEXT + 3 * size + 2**31):
        for free in (0, whole):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free, whole=whole: (free, whole))
            phase = SimpleNamespace(config=config, plan=SimpleNamespace(budget=64))
            fits = training_model._fits(prepared, phase, random_store(6), device_memory("cuda"))  # type: ignore[arg-type]
            answers.setdefault(whole, set()).add(fits)
    assert list(answers.values()) == [{False}, {False}, {True}]


def test_memory_of_any_accelerator_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """npu and xpu have cuda's functions; mps reports no peak, and uses the memory of the machine."""
    npu = SimpleNamespace(mem_get_info=lambda: (1, 64), max_memory_allocated=lambda: 17)
    monkeypatch.setattr(torch, "get_device_module", lambda device: npu if "npu" in str(device) else SimpleNamespace())
    assert device_memory("npu") == 64 and device_memory("mps") == device_memory("cpu") == 0
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: "npu")
    assert peak_memory_bytes() == 17
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: "mps")
    assert peak_memory_bytes() is None and human_bytes(None) == "not known"
    monkeypatch.undo()
    assert peak_memory_bytes()


@pytest.mark.parametrize(
    ("setting", "fitting", "recomputed"),
    [("on", True, True), ("off", False, False), ("auto", True, False), ("auto", False, True)],
)
def test_activations_are_recomputed_if_memory_is_short(
    setting: str, fitting: bool, recomputed: bool, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store, tried = packed_model(chat_model), random_store(6), list[dict[str, Any]]()
    recompute(model)  # as a phase before has left it
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (900, 1000))

    def look(model: Any, batch: dict[str, Any], *rest: Any, **kwargs: Any) -> bool:
        tried.append({"tokens": batch["tokens"], **kwargs})
        return fitting

    notices = list[str]()
    monkeypatch.setattr(training_model, "fits", look)
    monkeypatch.setattr(training_model.console, "notice", notices.append)
    config = SimpleNamespace(activation_checkpointing=setting, sharded_by="", optimizer="adamw_8bit")
    plan = SimpleNamespace(flat=lambda: [(0,), (1, 2, 3), ()], accumulate=3)
    prepared = SimpleNamespace(model=model, device="cuda", packed=True, computing=nullcontext)
    training_model._set_checkpointing(prepared, SimpleNamespace(config=config, plan=plan), store)  # type: ignore[arg-type]
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert bool(layers) == recomputed
    assert bool(notices) == (setting == "auto" and not fitting)
    if setting == "auto":
        size = sum(part.numel() for part in model.parameters())
        assert tried == [{"tokens": int(store.lengths[[1, 2, 3]].sum()), "passes": 2, "reserve": 2 * size + 30}]
