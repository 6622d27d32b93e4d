"""No step is taken on a NaN, no NaN is saved, and a stop signal leads to a checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoTokenizer, TrainingArguments

from tests.conftest import manifest, remade, tensors, write_recipe, write_rows
from tests.launching import run_forked
from tongwen.core.errors import ArtifactError, NumbersError
from tongwen.train.checkpoints import check_adapter_saved
from tongwen.train.nan_guard import ABSURD, SKIPS, NanGuard
from tongwen.train.packing import BatchPlan
from tongwen.train.parallel import Engine
from tongwen.train.shutdown import ShutdownRequest
from tongwen.train.trainer import PlannedTrainer

SFT = ", save_every: 2, stop_after: 6 steps, micro_batch_tokens: 64"


def guard(ranks: list[list[float]], **kwargs: Any) -> NanGuard:
    """Return a guard for two processes with two micro-batches each; `ranks` are the rows that they exchange."""
    plan = BatchPlan(((0, 1, 2, 3),) * 99, (((0,), (1,), (2,), (3,)),) * 99, 2, 8, 99)
    defaults = {
        "stop_requested": bool,
        "last_checkpoint": lambda: "the last checkpoint is c-4",
        "before_steps": 10,
        "vocabulary": 500,
    }
    return NanGuard(plan, lambda sample: f"f.jsonl:{sample}", lambda row: torch.tensor(ranks), **defaults | kwargs)


def look(one: NanGuard, index: int = 0, scaled: bool = False) -> None:
    one.note(torch.tensor(1.0), 1)
    one.check(index, 1.0, torch.nn.Linear(1, 1), scaled=scaled)


def test_nan_on_one_rank_stops_all_and_names_its_rows() -> None:
    """A micro-batch's number is its slot times the processes, plus the process."""
    one = guard([[1.0, 1.0, 1.0, 0.0], [1.0, math.nan, 1.0, 0.0]])
    with pytest.raises(
        NumbersError, match=r"step 15: the loss is NaN[\s\S]*micro-batch 4 of 4; rows f.jsonl:3\n[\s\S]*c-4"
    ):
        look(one, 4)
    with pytest.raises(NumbersError, match=r"gradient is NaN[\s\S]*f.jsonl:0, f.jsonl:1"):
        look(guard([[1.0, 1.0, math.inf, 0.0], [1.0, 1.0, 1.0, 0.0]]))


def test_stop_request_on_one_rank_stops_all() -> None:
    one = guard([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    look(one)
    assert one.stopping


def test_loss_above_random_guessing_stops_the_run() -> None:
    one, fine = (guard([[loss, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]) for loss in (8.3, 8.1))
    for _ in range(ABSURD - 1):
        look(one)
    with pytest.raises(NumbersError, match=r"8\.30[\s\S]*above 8\.21[\s\S]*random guessing gives 6\.21"):
        look(one)
    for _ in range(ABSURD + 1):
        look(fine)


def test_repeated_fp16_overflows_stop_the_run() -> None:
    ranks = [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, math.inf, 0.0]]
    one = guard(ranks)
    look(one, scaled=True)
    ranks[1][2] = 1.0
    look(one, scaled=True)
    assert (one.skipped, one.skipped_in_a_row) == (1, 0)
    ranks[1][2] = math.nan
    for _ in range(SKIPS):
        look(one, scaled=True)
    with pytest.raises(NumbersError, match=r"21 steps in a row[\s\S]*bf16"):
        look(one, scaled=True)
    ranks[0][0] = math.nan  # which no scaler has to do with
    with pytest.raises(NumbersError, match="the loss is NaN or infinite in micro-batch 1 of 4; rows"):
        look(one, scaled=True)


def patched(monkeypatch: pytest.MonkeyPatch, name: str, before: Any) -> None:
    """Run `before` at the start of that method of the trainer."""
    original = getattr(PlannedTrainer, name)

    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        before(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(PlannedTrainer, name, method)


@pytest.mark.sample("loss")
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_weights_move(
    where: str, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, chat_model, sft=SFT, merge=False)
    with monkeypatch.context() as patch:
        if where == "loss":
            loss = PlannedTrainer.compute_loss

            def third(self: Any, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
                own = self.job.loss
                if self.state.global_step == 3 and len(self.guard.step.nats) == 1:
                    self.job.loss = lambda *all: tuple(one * math.nan for one in own(*all))
                try:
                    return loss(self, model, inputs, *arguments, **options)
                finally:
                    self.job.loss = own

            patch.setattr(PlannedTrainer, "compute_loss", third)
        else:
            names = lambda self: [part for part in self.job.model.parameters() if part.requires_grad]  # noqa: E731
            patched(
                patch,
                "_get_grad_norm",
                lambda self: None if self.state.global_step != 3 else names(self)[0].grad.fill_(math.inf),
            )
        code, _, err = tongwen("run", recipe, *(["sft.max_grad_norm=0"] if where == "gradient" else []))
    assert code == 6 and "step 4: " in err and "data.jsonl:" in err and "checkpoint-2" in err
    assert err.count("data.jsonl:") < (4 if where == "loss" else 5)
    checkpoints = tmp_path / "out" / "sft.partial" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    assert tongwen("run", recipe, *(["sft.max_grad_norm=0"] if where == "gradient" else []))[0] == 0


def test_non_finite_state_is_never_saved(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(self: Any) -> None:
        if self.state.global_step == 4:
            next(iter(self.optimizer.state.values()))["exp_avg"][0] = math.nan

    patched(monkeypatch, "_save_checkpoint", poison)
    code, _, err = tongwen("run", write_recipe(tmp_path, chat_model, sft=SFT, merge=False))
    assert code == 6 and "exp_avg" in err and "nothing was saved" in err and "checkpoint-2" in err


def test_nan_among_the_weights_is_named(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:

    shutil.copytree(chat_model, tmp_path / "base")
    weights = tensors(chat_model)
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = math.nan
    save_file(weights, str(tmp_path / "base" / "model.safetensors"), metadata={"format": "pt"})
    code, _, err = tongwen("run", write_recipe(tmp_path, tmp_path / "base", sft=SFT, merge=False))
    assert code == 6 and "model.layers.1.mlp.up_proj.weight" in err


@pytest.mark.sample("6")
@pytest.mark.parametrize("step", [3, 6])
def test_signal_saves_and_the_same_command_resumes(step: int, chat_model: Path, tmp_path: Path) -> None:
    """Also a signal after the last step: the next stage does not begin."""
    recipes = [write_recipe(tmp_path / name, chat_model, sft=SFT, merge=False) for name in ("whole", "asked")]
    assert run_forked("run", recipes[0]) == 0

    def send_signal() -> None:
        train, save = PlannedTrainer.training_step, PlannedTrainer._save_checkpoint

        def step_with_signal(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.state.global_step == step - 1 < 5 and not self.guard.step.nats:
                os.kill(os.getpid(), signal.SIGUSR1)
            return train(self, *arguments, **options)

        def save_with_signal(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.state.global_step == step == 6:
                os.kill(os.getpid(), signal.SIGUSR1)
            return save(self, *arguments, **options)

        PlannedTrainer.training_step, PlannedTrainer._save_checkpoint = step_with_signal, save_with_signal  # type: ignore[method-assign]

    assert os.WEXITSTATUS(run_forked("run", recipes[1], before=send_signal)) == 130
    folder = tmp_path / "asked" / "out"
    assert (folder / "sft.partial" / "checkpoints" / f"checkpoint-{step}").is_dir()
    assert run_forked("run", recipes[1]) == 0
    wanted, found = tensors(tmp_path / "whole" / "out" / "sft"), tensors(folder / "sft")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_time_limit_stops_the_run(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    code, out, err = tongwen("run", write_recipe(tmp_path, chat_model, sft=SFT, merge=False), "stop_before=1 minute")
    assert "only one step is run and saved" in out
    assert code == 130 and "stopped (the time limit is near)" in err and "checkpoint-1" in err and "same command" in err
    recipe = json.dumps((tmp_path / "out" / "recipe.yaml").read_text())
    assert "stop_before: 1 minutes" in recipe


def test_deadline_leaves_time_for_a_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    shutdown = ShutdownRequest(1300.0)
    now += 10
    assert not shutdown.should_stop(), "twice the step of 10 seconds and a save of 30 at most would fit"
    assert not shutdown.is_short and ShutdownRequest(1059.0).is_short and not ShutdownRequest(None).is_short
    shutdown.on_save(5.0)
    now += 69
    assert not shutdown.should_stop()
    now += 80
    assert shutdown.should_stop(), "twice 80 and 5 would not"
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1005")
    assert ShutdownRequest(None).should_stop()


def test_fp16_skips_overflowing_steps(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate a GPU on a CPU, where accelerate would silently train in fp32."""
    recipe = write_recipe(tmp_path, chat_model, sft=SFT.replace("64", "4096"), merge=False)
    code, _, err = tongwen("run", recipe, "sft.precision=fp16")
    assert code == 5 and "precision: auto" in err
    monkeypatch.setattr("tongwen.model.loading.devices.compute_dtype", lambda *args: (torch.float16, "as on a GPU"))
    make = PlannedTrainer.create_accelerator_and_postprocess

    def with_scaler(self: Any) -> None:
        make(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        self.accelerator.native_amp = True

    monkeypatch.setattr(PlannedTrainer, "create_accelerator_and_postprocess", with_scaler)
    code, out, _ = tongwen("run", recipe)
    assert code == 0 and "fp16 overflowed in " in out
    scaler = torch.load(tmp_path / "out" / "sft" / "checkpoints" / "checkpoint-6" / "scaler.pt", weights_only=True)
    assert scaler["scale"] < 2.0**20
    assert all(part.dtype == torch.float32 and bool(part.any()) for part in tensors(tmp_path / "out" / "sft").values())
    code, _, err = tongwen("run", recipe, f"out={tmp_path / 'short'}", "sft.stop_after=1 steps")
    assert code == 6 and "in every step; none updated the weights" in err


def test_nan_in_a_held_out_score_is_an_error(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    """A token of the held-out file alone overflows: only its row has the first coordinate, which one MLP row multiplies."""
    weights = tensors(chat_model)
    layer = "model.layers.0.{}_proj.weight".format
    rows = weights["model.embed_tokens.weight"]
    rows[:, 0] = 0
    rows[AutoTokenizer.from_pretrained(chat_model).convert_tokens_to_ids("Z")] = torch.eye(rows.shape[1])[0]
    weights[layer("self_attn.o")][0] = 0
    weights[layer("mlp.gate")][0] = 0
    weights[layer("mlp.up")][0] = 3e38 * torch.eye(rows.shape[1])[0]
    base = remade(chat_model, tmp_path / "base", weights)
    held = write_rows(tmp_path / "held.jsonl", [{"instruction": "Z?", "output": "ZZ"}])
    recipe = write_recipe(tmp_path, base, sft=SFT, merge=False)
    code, _, err = tongwen("run", recipe, f"prepare.held_out={held}", "sft.samples=0", "sft.adapter.targets=[q_proj]")
    assert code == 6 and "a held-out score is NaN or infinite" in err


@pytest.mark.parametrize(
    "text", ["Cannot allocate memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory"]
)
def test_out_of_memory_is_recognised_everywhere(
    text: str, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a model is loaded: its files are intact."""
    recipe = write_recipe(tmp_path, chat_model, sft=SFT, merge=False)
    assert tongwen("run", recipe, "--only", "prepare")[0] == 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"[enforce fail] {text} (12)")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    code, _, err = tongwen("run", recipe)
    assert code == 5 and "sft: out of memory" in err and "sft.activation_checkpointing=on" in err


def test_int8_is_refused_on_unsupported_gpus(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = write_recipe(tmp_path, chat_model, sft=SFT, merge=False)
    assert tongwen("run", recipe, "--only", "prepare")[0] == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr("tongwen.model.loading.devices.compute_device", lambda: "cpu")
    code, _, err = tongwen("run", recipe, "sft.adapter.method=qlora", "sft.adapter.quantize=int8")
    assert code == 5 and "this GPU has 7.0" in err and "quantize: nf4" in err


@pytest.mark.parametrize("held", [{}, {"lora_A": torch.zeros(0), "lora_B": torch.zeros(0, 4)}])
def test_adapter_without_weights_is_never_saved(held: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """443 bytes in 2023; 107 KB of names alone under ZeRO-3."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="without weights"):
        check_adapter_saved(tmp_path)
    save_file(held, str(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(ArtifactError, match="is empty"):
        check_adapter_saved(tmp_path)
    save_file({**held, "lora_E": torch.ones(1)}, str(tmp_path / "adapter_model.safetensors"))
    if held:
        with pytest.raises(ArtifactError, match="is empty"):  # one full tensor among empty ones is no adapter
            check_adapter_saved(tmp_path)
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADALORA"}')
    check_adapter_saved(tmp_path)


@pytest.mark.parametrize("where", ["checkpoints", "sft.partial"])
def test_run_stops_if_the_saved_adapter_is_empty(
    where: str, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkpoint, and in the result of the stage."""
    original = PeftModel.save_pretrained

    def save(self: Any, folder: str, *arguments: Any, **options: Any) -> None:
        original(self, folder, *arguments, **options)
        if ("checkpoints" in Path(folder).parts) == (where == "checkpoints"):
            save_file({}, str(Path(folder) / "adapter_model.safetensors"), metadata={"format": "pt"})

    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    recipe = write_recipe(tmp_path, chat_model, sft=", stop_after: 1 steps", merge=False)
    code, _, err = tongwen("run", recipe)
    assert code == 4 and "the saved adapter is empty" in err and where in err
    assert not (tmp_path / "out" / "sft").exists()
    kept = list((tmp_path / "out" / "sft.partial" / "checkpoints").glob("checkpoint-*"))
    assert len(kept) == (0 if where == "checkpoints" else 1)


def test_process_with_two_visible_gpus_uses_one(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers uses all visible GPUs for DataParallel."""
    taken = []
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 1 if self._n_gpu == 1 else 2))
    monkeypatch.setattr(Engine, "verify", lambda self, model, *rest: taken.append(type(model).__name__))
    assert tongwen("run", write_recipe(tmp_path, chat_model, sft=", stop_after: 1 steps", merge=False))[0] == 0
    assert taken == ["PeftModelForCausalLM"]


def test_single_launched_process_uses_one_device(chat_model: Path, tmp_path: Path) -> None:
    """`torchrun --nproc-per-node 1`; rare saves are reported before training."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])

    def set_launcher_environment() -> None:
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }

    recipe = write_recipe(tmp_path, chat_model, sft=", stop_after: 2 steps", merge=False)
    assert run_forked("run", recipe, before=set_launcher_environment) == 0
    assert manifest(tmp_path / "out" / "sft")["micro_batches"]["world"] == 1


def test_rare_checkpoints_are_reported_before_training(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, chat_model, sft=SFT, merge=False)
    code, out, _ = tongwen("run", recipe, "sft.save_every=6")
    assert code == 0 and "save_every: 6, but there are only 6 steps" in out


def test_small_updates_are_not_lost_in_bf16(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 cannot represent updates of a millionth for most weights. Trainable weights are in fp32."""
    before = tensors(chat_model)
    lost = {name: (part.bfloat16() - 1e-6 == part.bfloat16()).float().mean() for name, part in before.items()}
    assert lost["model.layers.0.self_attn.q_proj.weight"] > 0.9
    monkeypatch.setattr("tongwen.model.loading.devices.compute_dtype", lambda *args: (torch.bfloat16, "as on a GPU"))
    settings = ("sft.adapter={method: full}", "sft.learning_rate=1e-6", "sft.schedule=constant", "sft.warmup=0")
    assert tongwen("run", write_recipe(tmp_path, chat_model, sft=SFT, merge=False), *settings)[0] == 0
    after = tensors(tmp_path / "out" / "sft")
    assert min((after[name] != part).float().mean() for name, part in before.items() if "proj" in name) > 0.9


def test_signal_outside_training_interrupts(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tongwen.stages.prepare.run", lambda recipe, out: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = tongwen("run", write_recipe(tmp_path, chat_model))
    assert code == 130 and "same command continues" in err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
