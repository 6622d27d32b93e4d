"""Laws of the engines: with every engine, and after every kill, the result equals that of one process."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import remade, tensors, without_chatml, write_recipe, write_rows
from tests.launching import needs_deepspeed, run_forked, run_ranks
from tongwen.core import distributed
from tongwen.core.model_families import FAMILIES
from tongwen.train.parallel import Engine
from tongwen.train.trainer import PlannedTrainer
from tongwen.workflows.training import job
from tongwen.workflows.training import model as training_model

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
CASES = [
    *itertools.product(("ddp", "fsdp2"), ("lora", "full")),
    *(pytest.param("zero2", method, marks=needs_deepspeed) for method in ("lora", "full")),
    pytest.param("zero2+offload", "full", marks=needs_deepspeed),
    pytest.param("zero3", "lora", marks=needs_deepspeed),
    *(pytest.param(engine, "qlora", marks=needs_bitsandbytes) for engine in ("ddp", "fsdp2")),
]


def word_of(engine: str, folder: Path) -> str:
    """Return the engine setting of a recipe. ZeRO-3's default shards no tensor below 100,000 elements."""
    if engine != "zero3":
        return engine
    folder.mkdir(parents=True, exist_ok=True)
    zero = {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    return str(folder / "zero3.json")


def recipe_for(folder: Path, base: Path, method: str, engine: str = "auto", sft: str = "") -> Path:
    file = write_recipe(
        folder,
        base,
        sft=f", engine: {word_of(engine, folder)}, adapter: {{method: {method}, rank: 4}}, stop_after: 8 steps, save_every: 3{sft}",
        merge=method != "full",
    )
    text = file.read_text().replace("adapter: {rank: 4}, ", "")
    file.write_text(text.replace("1e-2", "1e-3") if method == "full" else text)
    return file


def logits(folder: Path) -> torch.Tensor:
    """Return the (1, T, V) logits of a finished model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60)[None]).logits


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the models that one process trains, by method."""
    made = {}
    for method in ("lora", "full", *(["qlora"] if importlib.util.find_spec("bitsandbytes") else [])):
        folder = tmp_path_factory.mktemp(f"alone_{method}")
        assert run_forked("run", recipe_for(folder, chat_model, method)) == 0
        made[method] = folder / "out" / ("sft" if method == "full" else "merge")
    return made


def kill_at_step(step: int) -> Any:
    """Return a function that kills rank 1 at that step."""

    def install(rank: int) -> None:
        original = PlannedTrainer.training_step

        def step_or_kill(self: Any, *arguments: Any, **options: Any) -> Any:
            if rank == 1 and self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *arguments, **options)

        PlannedTrainer.training_step = step_or_kill  # type: ignore[method-assign]

    return install


def write_micro_batches(folder: Path) -> Any:
    """Return a function that lets each rank write down how many micro-batches its steps have."""

    def install(rank: int) -> None:
        original = PlannedTrainer.training_step

        def step(self: Any, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            with (folder / f"rank-{rank}").open("a") as file:
                file.write(f"{len(inputs)}\n")
            if self.deepspeed:
                assert self.deepspeed.gradient_accumulation_steps() == self.job.phase.plan.accumulate
            return original(self, model, inputs, *arguments, **options)

        PlannedTrainer.training_step = step  # type: ignore[method-assign]

    return install


@pytest.mark.sample("fsdp2-full")
@pytest.mark.parametrize(("engine", "method"), CASES)
def test_two_killed_and_resumed_processes_match_one(
    engine: str, method: str, chat_model: Path, tmp_path: Path, alone: dict[str, Path]
) -> None:
    engine, _, option = engine.partition("+")
    sft = f", micro_batch_tokens: 84{f', {option}: true' if option else ''}"
    recipe = recipe_for(tmp_path, chat_model, method, engine, sft)
    first = run_ranks(2, "run", recipe, before=kill_at_step(5))
    assert first[1] == -signal.SIGKILL and first[0] == 5, "the other process ends too, and says why"
    assert not (tmp_path / "out" / "sft").exists()
    assert run_ranks(2, "run", recipe, before=write_micro_batches(tmp_path)) == [0, 0]
    counts = [(tmp_path / f"rank-{rank}").read_text().split() for rank in range(2)]
    assert counts[0] == counts[1] and len(counts[0]) == 5 and len({*counts[0]}) > 1
    stage = tmp_path / "out" / "sft"
    assert [line["step"] for line in metrics(stage)] == list(range(1, 9))
    assert json.loads((stage / "manifest.json").read_text())["engine"] == engine
    for line, expected in zip(metrics(stage), metrics(alone[method].parent / "sft"), strict=True):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4), (name, line["step"])
    made = tmp_path / "out" / ("sft" if method == "full" else "merge")
    assert torch.allclose(logits(made), logits(alone[method]), atol=1e-5)
    for folder, wanted in ((made, alone[method]), (stage, alone[method].parent / "sft")):
        found, parts = tensors(folder), tensors(wanted)
        assert found.keys() == parts.keys() and parts
        for name, part in parts.items():
            assert found[name].shape == part.shape and torch.allclose(found[name], part, atol=1e-5), name


@pytest.mark.sample()
def test_sharded_16_bit_base_trains_in_fp32(chat_model: Path, tmp_path: Path) -> None:
    half = {name: part.bfloat16() for name, part in tensors(chat_model).items()}
    base, made = remade(chat_model, tmp_path / "base", half, dtype="bfloat16"), {}
    for engine, world in (("auto", 1), ("fsdp2", 2)):
        recipe = recipe_for(tmp_path / engine, base, "full", engine)
        assert run_ranks(world, "run", recipe) == [0] * world
        made[engine] = tensors(tmp_path / engine / "out" / "sft")
    for name, part in made["auto"].items():
        assert part.dtype == made["fsdp2"][name].dtype == torch.float32
        assert torch.allclose(made["fsdp2"][name], part, atol=1e-5), name
    assert any(not torch.equal(part, part.bfloat16().float()) for part in made["fsdp2"].values())


def first_step(folder: Path) -> tuple[float, torch.Tensor]:
    """(loss, whole gradient) of the first step. Adam's first moment is then a tenth of the gradient."""
    state = torch.load(folder / "checkpoints" / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    return metrics(folder)[0]["loss"], torch.cat([state[key]["exp_avg"].flatten() * 10 for key in sorted(state)])


def pad_everything(rank: int) -> None:
    """Pretend that the family does not support packing."""
    llama = replace(FAMILIES["llama"], padded=("a test", "测试"))
    training_model.family_of = lambda model_type: llama  # type: ignore[assignment]


@pytest.mark.sample("lora")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_first_gradient_is_independent_of_the_batch_layout(method: str, chat_model: Path, tmp_path: Path) -> None:
    """1 x 8 = 8 x 1 = 2 processes x 4 = packed = padded, through the real command."""
    settings = ", batch_size: 8, max_grad_norm: 0, warmup: 0, save_every: 1, stop_after: 1 steps"
    cuts = {
        "8 x 1": (1, 16, None),
        "1 x 8": (1, 4096, None),
        "1 x 8 padded": (1, 4096, pad_everything),
        "2 processes x 4": (2, 16, None),
    }
    found = {}
    for name, (world, tokens, before) in cuts.items():
        folder = tmp_path / name.replace(" ", "-")
        recipe = recipe_for(folder, chat_model, method, sft=f"{settings}, micro_batch_tokens: {tokens}")
        text = recipe.read_text()
        for doubled in (", batch_size: 4", ", save_every: 3", ", stop_after: 8 steps"):
            text = text.replace(doubled, "", 1)
        recipe.write_text(text.replace("merge: {}\n", ""))
        assert run_ranks(world, "run", recipe, before=before) == [0] * world
        found[name] = first_step(folder / "out" / "sft")
    loss, gradient = found["8 x 1"]
    for name, (other_loss, other) in found.items():
        assert other_loss == pytest.approx(loss, abs=1e-6), name
        assert float((other - gradient).norm() / gradient.norm()) < 1e-6, name


def test_silently_replaced_engine_is_detected(chat_model: Path, tmp_path: Path, capfd: Any) -> None:
    """accelerate silently replaces FSDP by DDP on a CPU."""

    def leave_it_to_accelerate(rank: int) -> None:
        Engine.enforce = lambda self, accelerator, plugin=None: None  # type: ignore[method-assign]
        Engine.shard = lambda self, model, dtype: None  # type: ignore[method-assign]

    assert run_ranks(2, "run", recipe_for(tmp_path, chat_model, "lora", "fsdp2"), before=leave_it_to_accelerate) == [
        5,
        5,
    ]
    assert "the recipe asks for fsdp2, but ddp is running" in capfd.readouterr().err


@pytest.mark.sample("fsdp2-auto")
@pytest.mark.parametrize(("first", "then"), [("fsdp2", "auto"), pytest.param("zero3", "fsdp2", marks=needs_deepspeed)])
def test_two_stages_run_under_one_launcher(first: str, then: str, chat_model: Path, tmp_path: Path) -> None:
    """The second stage waits for the files of the first, and no state of the first engine is left. It trains single rows."""
    base, made = without_chatml(chat_model, tmp_path / "base"), {}
    for name, engines in {"one": ("auto", "auto"), "two": (first, then)}.items():
        recipe = recipe_for(tmp_path / name, base, "lora", engines[1])
        text = recipe.read_text().replace("8 steps", "3 steps")
        documents = write_rows(tmp_path / "docs.jsonl", [{"text": f"文档{number}，写给测试。"} for number in range(20)])
        settings = "train: full, learning_rate: 1e-3, stop_after: 2 steps, batch_size: 4, precision: fp32, samples: 0"
        text = text.replace("prepare: {", f"prepare: {{documents: {documents}, ")
        recipe.write_text(f"{text}pretrain: {{{settings}, engine: {word_of(engines[0], recipe.parent)}}}\n")
        world = 1 if name == "one" else 2
        assert run_ranks(world, "run", recipe) == [0] * world
        made[name] = tensors(tmp_path / name / "out" / "merge")
    for name, part in made["one"].items():
        assert torch.allclose(made["two"][name], part, atol=1e-5), name


@pytest.mark.parametrize("flag", ["--again", "--fork"])
def test_again_and_fork_are_refused_under_a_launcher(flag: str, chat_model: Path, tmp_path: Path, capfd: Any) -> None:
    assert run_ranks(2, "run", recipe_for(tmp_path, chat_model, "lora"), flag) == [2, 2]
    assert f"{flag} --devices 2" in capfd.readouterr().err


@pytest.mark.sample()
def test_changed_recipe_is_refused_under_a_launcher(chat_model: Path, tmp_path: Path, capfd: Any) -> None:
    recipe = recipe_for(tmp_path, chat_model, "lora")
    assert run_ranks(2, "run", recipe, before=kill_at_step(5))[1] == -signal.SIGKILL
    assert run_ranks(2, "run", recipe, "sft.learning_rate=1e-3", "sft.weight_decay=0.3") == [2, 2]
    err = capfd.readouterr().err
    assert "sft.learning_rate: 0.01 → 0.001" in err and "sft.weight_decay: 0.0 → 0.3" in err
    assert run_ranks(2, "run", recipe) == [0, 0]


@pytest.mark.sample()
def test_batch_tokens_refuse_another_number_of_processes(chat_model: Path, tmp_path: Path, capfd: Any) -> None:
    recipe = recipe_for(tmp_path, chat_model, "lora", sft=", batch_tokens: 400")
    recipe.write_text(recipe.read_text().replace("batch_size: 4, ", ""))
    assert run_forked("run", recipe, before=lambda: kill_at_step(5)(1)) == signal.SIGKILL
    assert run_ranks(2, "run", recipe) == [2, 2]
    assert "processes: 1 → 2" in (err := capfd.readouterr().err) and "--devices 1" in err
    assert run_forked("run", recipe) == 0


@pytest.mark.sample()
def test_launcher_environment_does_not_change_precision(
    chat_model: Path, tmp_path: Path, alone: dict[str, Path]
) -> None:
    def ask(rank: int) -> None:
        os.environ |= {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "eager"}

    assert run_ranks(2, "run", recipe_for(tmp_path, chat_model, "lora"), before=ask) == [0, 0]
    assert torch.allclose(logits(tmp_path / "out" / "merge"), logits(alone["lora"]), atol=1e-5)


@pytest.mark.sample()
def test_processes_whose_scores_differ_stop_at_the_same_step(chat_model: Path, tmp_path: Path) -> None:
    """The falling scores of rank 0 decide. By its own scores rank 1 would stop, and rank 0 would wait for it forever."""

    def rising(rank: int) -> None:
        original, seen = job._score, list[int]()

        def score(*args: Any) -> dict[str, Any]:
            seen.append(rank)
            found = original(*args)
            return found | {"bits_per_byte": found["bits_per_byte"] + 9.0 * rank * len(seen)}

        job._score = score  # type: ignore[assignment]

    recipe = recipe_for(tmp_path, chat_model, "lora", sft=", evaluate_every: 1, patience: 1")
    assert run_ranks(2, "run", recipe, before=rising, seconds=60) == [0, 0]
    found = metrics(tmp_path / "out" / "sft")
    scores = [line["bits_per_byte"] for line in found]
    assert len(found) == 8 and scores == sorted(scores, reverse=True)


@pytest.mark.sample()
def test_signal_to_the_process_group_saves_a_checkpoint(chat_model: Path, tmp_path: Path) -> None:
    """Slurm and systemd send the signal to the command, the launcher and the processes."""
    recipe = recipe_for(tmp_path, chat_model, "lora")
    recipe.write_text(recipe.read_text().replace("8 steps", "9999 steps"))
    command = [sys.executable, "-m", "tongwen", "run", str(recipe), "--devices", "2"]
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "out" / "sft.partial" / "metrics.jsonl"
    wait_until(lambda: log.is_file() and len(log.read_text().splitlines()) > 4)
    os.killpg(running.pid, signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "the same command continues" in err and "Traceback" not in err
    stopped = int(err.split("checkpoint-")[1].split()[0].strip(";,"))
    assert (tmp_path / "out" / "sft.partial" / "checkpoints" / f"checkpoint-{stopped}").is_dir()
    assert stopped == metrics(tmp_path / "out" / "sft.partial")[-1]["step"]


@pytest.mark.sample()
def test_killed_rank_is_named_and_the_others_end(chat_model: Path, tmp_path: Path) -> None:
    """Processes started by `tongwen run --devices 2`."""
    recipe = recipe_for(tmp_path, chat_model, "lora")
    recipe.write_text(recipe.read_text().replace("8 steps", "9999 steps"))
    command = [sys.executable, "-m", "tongwen", "run", str(recipe), "--devices", "2"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "sft.partial" / "metrics.jsonl"
    wait_until(lambda: log.is_file() and len(log.read_text().splitlines()) > 4)
    ranks = {
        int(child.environ()["RANK"]): child
        for child in psutil.Process(running.pid).children(recursive=True)
        if "RANK" in child.environ()
    }
    ranks[1].kill()
    began = time.monotonic()
    _, err = running.communicate(timeout=60)
    assert time.monotonic() - began < 45 and not any(child.is_running() for child in ranks.values())
    assert running.returncode == 5
    assert f"SIGKILL ended the process of rank 1 ({ranks[1].pid})" in err and "the same command continues" in err


def wait_until(done: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_slurm_variables_match_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    slurm = {"PROCID": "5", "LOCALID": "1", "JOB_ID": "1234567", "STEP_NUM_TASKS": "8", "STEP_TASKS_PER_NODE": "4(x2)"}
    for name, value in {**slurm, "STEP_NODELIST": "gpu[03-04],gpu9"}.items():
        distributed.read_slurm_environment()
        assert not distributed.is_launched(), f"nothing is known before {name}"
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "")
    distributed.read_slurm_environment()
    assert not distributed.is_launched()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    distributed.read_slurm_environment()
    assert distributed.is_launched() and not distributed.is_main_process() and distributed.world_size() == 8
    found = {
        name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    assert found == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "24567",
    }


@pytest.mark.sample()
def test_two_ranks_end_with_the_command_that_was_killed(chat_model: Path, tmp_path: Path) -> None:
    """Nothing passes SIGKILL on: each process watches the one that waits for it. What was saved continues."""
    recipe = recipe_for(tmp_path, chat_model, "lora")
    recipe.write_text(recipe.read_text().replace("8 steps", "9999 steps"))
    command = [sys.executable, "-m", "tongwen", "run", str(recipe), "--devices", "2"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "out" / "sft.partial" / "metrics.jsonl"
    wait_until(lambda: log.is_file() and len(log.read_text().splitlines()) > 4)
    run_ranks = psutil.Process(running.pid).children(recursive=True)
    assert sum("RANK" in child.environ() for child in run_ranks) == 2
    running.kill()
    began = time.monotonic()
    wait_until(lambda: not any(_lives(child) for child in run_ranks))
    assert time.monotonic() - began < 20
    running.wait(timeout=10)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
