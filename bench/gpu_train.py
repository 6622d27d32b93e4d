"""Training on one GPU, side by side: tongwen, and transformers' Trainer with peft, in turn, each in its own process.

    python bench/gpu_train.py --out bench/results/gpu_train.json          # one GPU of 80 GB, under 8 minutes
    python bench/gpu_train.py --tiny --out tiny.json                      # the same script on a CPU, toy shapes
    python bench/gpu_train.py … --llama-factory PYTHON --unsloth PYTHON   # with peers, run by a python that has them

Random weights of a 1B and an 8B Llama shape; random tokens with the length distribution of dialogues; 64 samples per optimizer
step, the same for all contestants; LoRA of rank 16 on all linear layers, and full training where it fits; bf16. After WARM_UP
steps each contestant is measured for some seconds, between the ends of two steps, with the GPU synchronised. Contestants with
padded rows get micro-batches of similar lengths, as from `group_by_length` (see `Samples.grouped`): 16 rows, or fewer where
all logits are held at once. They use activation checkpointing for 8B, and elsewhere after running out of memory without it; the
result notes that. Liger's kernels are used if liger_kernel is installed. The peers (`peers/gpu.py`) open the same weights from
a folder.

The figures are real tokens per second (without padding), MFU on real tokens (operations from `flops_per_token`, relative to the
data sheet and to a measured product of two large matrices), and peak memory. A run is appended to those in the file.
Needed: torch, transformers, peft, and what tongwen imports; not datasets, trl, flash-attn or bitsandbytes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SAMPLES, WARM_UP, RANK = 64, 3, 16
WINDOW = 16  # steps whose samples are sorted by length together
PADDED = 16  # rows are padded to a multiple of it; other lengths make kernels recompile
IMPORT_SECONDS = 120  # seconds a contestant may take for its imports
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the data sheets
OUT_OF_MEMORY = re.compile(r"out of memory|outofmemory|alloc_failed", re.IGNORECASE)
SHAPES: dict[str, dict[str, Any]] = {  # Llama-3.2-1B and Llama-3.1-8B
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": True},
}
PEERS = ("LLaMA-Factory", "Unsloth")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "liger_kernel", "llamafactory", "unsloth")
RUNS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (  # the most important first, in case time runs out
    ("tongwen", (("8B", "lora"), ("1B", "lora"), ("1B", "full"))),
    ("trainer, 8 x 8", (("1B", "lora"),)),
    ("trainer, 4 x 16", (("1B", "full"),)),
    ("trainer, 16 x 4, Liger", (("1B", "lora"),)),
    ("Unsloth, 16 x 4", (("1B", "lora"),)),
    ("LLaMA-Factory, 16 x 4, Liger", (("1B", "lora"),)),
    ("LLaMA-Factory, 16 x 4, Liger, checkpointed", (("8B", "lora"),)),
    ("Unsloth, 16 x 4, checkpointed", (("8B", "lora"),)),
    ("trainer, 16 x 4, Liger, checkpointed", (("8B", "lora"),)),
    ("trainer, 8 x 8, checkpointed", (("8B", "lora"),)),
    ("tongwen, compiled", (("8B", "lora"), ("1B", "lora"))),
)


@dataclass(frozen=True)
class Case:
    """A measurement by one process.

    seconds: after the warm-up; folder: of the weights, for peers; recompute: activation checkpointing, except for tongwen
    """

    contestant: str
    shape: str
    method: str
    seconds: float
    folder: str = ""
    recompute: bool = False

    @property
    def tiny(self) -> bool:
        return self.shape == "tiny"

    @property
    def program(self) -> str:
        return program_of(self.contestant)


def program_of(contestant: str) -> str:
    """Return the training program: tongwen, trainer, or one of the peers."""
    return contestant.split(",")[0]


class Samples:
    """Random tokens: (ids, learn) pairs with the lengths of dialogues; their first part is not learned."""

    def __init__(self, shape: str) -> None:
        import numpy as np

        self.rng, shorter = np.random.default_rng(0), 16 if shape == "tiny" else 1
        many = SAMPLES * WINDOW * (1 if shape == "tiny" else 4)
        self.lengths = np.clip(self.rng.lognormal(5.3, 0.8, many), 32, 2048).astype(np.int64) // shorter
        self.prompts = np.maximum(1, self.lengths * self.rng.uniform(0.2, 0.6, many)).astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = self.rng.integers(0, vocabulary(shape), self.offsets[-1], dtype=np.uint32)

    def __len__(self) -> int:
        return len(self.lengths)

    def store(self) -> Any:
        """Return the samples as tongwen's token store."""
        import numpy as np

        from tongwen.data.token_store import SAMPLE, TokenStore

        spans = np.stack([self.offsets[:-1] + self.prompts, self.offsets[1:]], axis=1)
        return TokenStore(self.ids, self.offsets, spans, np.zeros(len(self), SAMPLE), ("random",))

    def grouped(self, rows: int) -> list[int]:
        """Return an order in which micro-batches of `rows` rows have similar lengths, and each step short and long ones.

        Samples are sorted within WINDOW steps and cut into micro-batches; each step gets a short one, a longer one, etc.
        """
        import numpy as np

        rng, order = np.random.default_rng(0), list[int]()
        for first in range(0, len(self), SAMPLES * WINDOW):
            longer = first + np.argsort(self.lengths[first : first + SAMPLES * WINDOW], kind="stable")
            dealt = [rng.permutation(alike) for alike in longer.reshape(-1, WINDOW, rows)]
            order += np.stack(dealt, axis=1).ravel().tolist()
        return order

    def rows(self, order: list[int]) -> list[dict[str, Any]]:
        """Return the samples in the form that a Trainer takes."""
        import torch

        rows = []
        for one in order:
            ids = torch.from_numpy(self.ids[self.offsets[one] : self.offsets[one + 1]].astype("int64"))
            labels = ids.clone()
            labels[: self.prompts[one]] = -100
            rows.append({"input_ids": ids, "labels": labels})
        return rows


def vocabulary(shape: str) -> int:
    return 512 if shape == "tiny" else 128256


def make_model(case: Case) -> Any:
    """Return a random model on the training device: bf16 under an adapter, fp32 for full training."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = (
        {"num_attention_heads": 4, "num_key_value_heads": 2}
        if case.tiny
        else {"num_attention_heads": 32, "num_key_value_heads": 8}
    )
    config = LlamaConfig(vocab_size=vocabulary(case.shape), max_position_embeddings=4096, **heads, **SHAPES[case.shape])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if case.method == "lora" else torch.float32)
    with torch.device(device()):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    return model


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def flops_per_token(model: Any, samples: Samples, method: str) -> float:
    """Return FLOPs per real token, forward and backward, a multiply-add as two.

    Layers: 6 per weight in full, 4 under an adapter (no gradient of frozen weights). Head: learned tokens only. Causal
    attention: 6 x layers x width x the mean document length per token. Adapter: 6 per weight.
    """
    import torch

    config = model.config
    head = model.get_output_embeddings()
    plain = [
        one
        for name, one in model.named_modules()
        if isinstance(one, torch.nn.Linear) and "lora_" not in name and one is not head
    ]
    checkpointing, of_head = sum(one.weight.numel() for one in plain), head.weight.numel()
    adapter = sum(part.numel() for name, part in model.named_parameters() if "lora_" in name)
    learned = float((samples.lengths - samples.prompts).sum() / samples.lengths.sum())
    seen = float((samples.lengths**2).sum() / samples.lengths.sum())
    packed_attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen
    times = 4 if method == "lora" else 6
    return times * (checkpointing + learned * of_head) + packed_attention + 6 * adapter


def measure(case: Case) -> dict[str, Any]:
    """Train until the time is over; return the figures of the steps after the warm-up."""
    if case.contestant.startswith("Unsloth"):
        import unsloth  # noqa: F401 (must be imported before transformers to patch it)
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Record the end of each step. tokens: cumulative, in the contestant's order of samples."""

        def __init__(self) -> None:
            self.ends: list[tuple[int, float, int]] = []  # (step, when the device had done it, tokens until then)
            self.model: Any = None
            self.follow(list(range(len(samples))))

        def follow(self, order: list[int]) -> None:
            self.tokens = samples.lengths[order].reshape(-1, SAMPLES).sum(axis=1).cumsum()

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            self.model = model

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if device() == "cuda":
                torch.cuda.synchronize()
            self.ends.append((state.global_step, time.perf_counter(), int(self.tokens[state.global_step - 1])))
            measured = self.ends[-1][1] - self.ends[WARM_UP - 1][1] if len(self.ends) > WARM_UP else 0.0
            control.should_training_stop |= measured > case.seconds

    free = torch.cuda.mem_get_info()[0] if device() == "cuda" else None
    began, samples = time.perf_counter(), Samples(case.shape)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trained, facts = training_function(case)(case, samples, clock, Path(folder))
    (first, begin, before), (last, end, after) = clock.ends[WARM_UP - 1], clock.ends[-1]
    tokens = after - before
    speed = tokens / (end - begin)
    operations = flops_per_token(trained, samples, case.method)
    reached, peak = (matrix_product(), peak_flops()) if device() == "cuda" else (None, None)
    return {
        **facts,
        "free_memory_bytes": free,
        "steps": last - first,
        "seconds": round(end - begin, 2),
        "seconds_before": round(begin - began, 2),
        "real_tokens": tokens,
        "tokens_per_second": round(speed, 1),
        "flops_per_token": operations,
        "mfu": speed * operations / peak if peak else None,
        "matrix_product_flops": reached,
        "mfu_of_matrix_product": speed * operations / reached if reached else None,
        **peak_memory(),
        "versions": versions(),
    }


def training_function(case: Case) -> Callable[[Case, Samples, Any, Path], tuple[Any, dict[str, Any]]]:
    """Return the contestant's function: (case, samples, clock, an empty folder) -> (trained model, facts of the run)."""
    if case.program in PEERS:
        from peers import gpu

        return gpu.unsloth if case.program == "Unsloth" else gpu.llama_factory
    return ours if case.program == "tongwen" else theirs


def ours(case: Case, samples: Samples, clock: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Train with tongwen, as a training stage does after loading its base."""
    import torch

    from tongwen.model.adapters.attach import make_trainable
    from tongwen.model.kernels import checkpointing, packed_attention
    from tongwen.model.kernels.fused_blocks import fuse_blocks
    from tongwen.model.kernels.loss import learned_loss
    from tongwen.recipe.fields import Duration
    from tongwen.recipe.phases import training_phases
    from tongwen.recipe.training import AdapterConfig, Sft
    from tongwen.train.memory import own_memory, token_budget
    from tongwen.train.metrics import MetricsCallback
    from tongwen.train.packing import make_plan
    from tongwen.train.parallel import Engine
    from tongwen.train.phase import Phase
    from tongwen.train.trainer import PhaseRun, train_phase
    from tongwen.workflows.training.model import set_memory_savers
    from tongwen.workflows.training.types import PreparedModel

    class Timed(MetricsCallback):
        def on_step_end(self, *arguments: Any, **rest: Any) -> None:
            clock.on_step_end(*arguments, **rest)

    steps = len(samples) // SAMPLES
    settings = Sft(
        adapter=AdapterConfig(method="full") if case.method == "full" else AdapterConfig(rank=RANK),
        batch_size=SAMPLES,
        precision="bf16",
        stop_after=Duration(count=steps, unit="steps"),
        log_every=10,
        trainer={"save_strategy": "no"},
    )
    model = make_model(case)
    model.set_attn_implementation(packed_attention.register())
    adapted = make_trainable(model, settings.adapter, [])
    for part in adapted.trainable:
        part.data = part.data.float()
    store = samples.store()
    plan = make_plan(
        store.lengths,
        lambda epoch: list(range(len(store))),
        batch_size=SAMPLES,
        stop_after=settings.stop_after,
        budget=token_budget(device(), model.config, own_memory(device()), full=case.method == "full"),
    )
    prepared = PreparedModel(adapted, (), True, None, device(), torch.bfloat16, Engine("single"))
    phase = Phase(*training_phases(settings)[0], plan, folder)
    adapted.train_only(phase.parts)
    if case.contestant.endswith("compiled"):
        checkpointing.compile_layers(model)
    else:
        fuse_blocks(model)
    set_memory_savers(prepared, phase, store)
    train_phase(
        PhaseRun(
            phase=phase,
            model=adapted.model,
            tokenizer=None,
            store=store,
            packed=True,
            dtype=torch.bfloat16,
            seed=0,
            checkpoint=None,
            loss=learned_loss,
            evaluate=None,
            metrics=Timed(
                folder / "metrics.jsonl", plan.tokens_of(store.lengths), phase, SimpleNamespace(update=print)
            ),  # type: ignore[arg-type]
            engine=prepared.engine,
        )
    )
    recomputes = any(getattr(one, "gradient_checkpointing", False) for one in model.modules())
    return adapted.model, {"recompute": recomputes, "micro_batches": plan.accumulate}


def theirs(case: Case, samples: Samples, clock: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Train with transformers' Trainer, for LoRA with peft."""
    model = make_model(case)
    if case.method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    return in_trainer(case, model, samples, clock, folder)


def batches_of(contestant: str) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step)"""
    rows, accumulate = contestant.split(", ")[1].split(" x ")
    return int(rows), int(accumulate)


def in_trainer(case: Case, model: Any, samples: Samples, clock: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Train a model with transformers' Trainer on padded rows."""
    import torch
    from torch.nn.functional import pad
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Trainer, TrainingArguments

    rows, accumulate = batches_of(case.contestant)
    order = samples.grouped(rows)
    clock.follow(order)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        def padded(parts: list[Any], value: int = 0) -> Any:
            rows = pad_sequence(parts, batch_first=True, padding_value=value)
            return pad(rows, (0, -rows.shape[1] % PADDED), value=value)

        ids = padded([one["input_ids"] for one in batch])
        labels = padded([one["labels"] for one in batch], -100)
        real = padded([torch.ones_like(one["input_ids"]) for one in batch])
        return {"input_ids": ids, "labels": labels, "attention_mask": real}

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        max_steps=len(samples) // SAMPLES,
        learning_rate=2e-4 if case.method == "lora" else 2e-5,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        bf16=True,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        use_cpu=device() == "cpu",
        gradient_checkpointing=case.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel="Liger" in case.contestant,
    )
    Trainer(
        model=model, args=arguments, train_dataset=samples.rows(order), data_collator=collate, callbacks=[clock]
    ).train()
    return model, {"recompute": case.recompute, "micro_batches": accumulate}


def peak_flops() -> float | None:
    """Return the GPU's data-sheet FLOP/s, if known."""
    import torch

    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def matrix_product() -> float:
    """Measure the FLOP/s of a product of two large random bf16 matrices."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(2):  # the first round warms up
        began = time.perf_counter()
        for _ in range(10):
            left @ right
        torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - began)


def peak_memory() -> dict[str, int]:
    """Return the peak bytes of tensors and of the allocator's reserve; on a CPU those of the process."""
    import torch

    if device() == "cuda":
        held = int(torch.cuda.max_memory_allocated()), int(torch.cuda.max_memory_reserved())
    else:
        held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,) * 2
    return dict(zip(("peak_memory_bytes", "peak_reserved_bytes"), held, strict=True))


def versions() -> dict[str, str]:
    """Return the versions of the installed packages among PACKAGES."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def save_weights(shape: str, folder: Path) -> None:
    """Write a model folder for the peers, with a dummy tokenizer: the samples are random ids."""
    make_model(Case("", shape, "lora", 0)).save_pretrained(folder)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    config = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<end>", "special": True, **flags}],
        "model": {"type": "BPE", "vocab": {"<end>": 0, "a": 1}, "merges": []},
        **dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")),
    }
    (folder / "tokenizer.json").write_text(json.dumps(config), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def import_packages(contestant: str) -> None:
    """Import a contestant's packages before its time starts."""
    name = program_of(contestant)
    importlib.import_module({"Unsloth": "unsloth", "LLaMA-Factory": "llamafactory.train.tuner"}.get(name, "torch"))
    importlib.import_module("tongwen.workflows.training.job" if name == "tongwen" else "peft")
    importlib.import_module("transformers.trainer")


@dataclass(frozen=True)
class Race:
    """Run the cases one after another, each in its own process.

    folder: for weights and output of the processes; end: by the monotonic clock; pythons: of the peers; missing: by shape,
    why it has no weights
    """

    folder: Path
    end: float
    seconds: float
    pythons: dict[str, str]
    missing: dict[str, str] = field(default_factory=dict)

    def skip_reason(self, case: Case) -> str:
        """Return why a contestant cannot start; empty if it can."""
        if case.program in PEERS and case.program not in self.pythons:
            return f"no python was named that has {case.program}"
        if (
            case.program == "trainer"
            and "Liger" in case.contestant
            and importlib.util.find_spec("liger_kernel") is None
        ):
            return "the package liger_kernel is not here"
        return ""

    def weights(self, shape: str) -> Path:
        return self.folder / f"weights-{shape}"

    def start(self, arguments: list[str], python: str = sys.executable) -> subprocess.Popen[str]:
        """Start this script in its own process, which writes its result to case.json in its folder."""
        place = Path(tempfile.mkdtemp(dir=self.folder))  # Unsloth writes compiled code to its working folder
        command = [python, str(Path(__file__).resolve()), *arguments, "--out", str(place / "case.json")]
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
        environment |= dict.fromkeys(("HF_HUB_OFFLINE", "UNSLOTH_DISABLE_STATISTICS", "TOKENIZERS_PARALLELISM"), "1")
        with (place / "log").open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                command,
                env=environment,
                cwd=place,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def start_case(self, case: Case) -> subprocess.Popen[str]:
        settings = json.dumps({**vars(case), "folder": str(self.weights(case.shape)) if case.program in PEERS else ""})
        return self.start(["--case", settings], self.pythons.get(case.program, sys.executable))

    def start_all(self, cases: list[Case]) -> dict[Case, subprocess.Popen[str]]:
        """Start a process per case and wait until all have finished their imports, which would disturb a measurement.

        Late processes are stopped.
        """
        cases = [case for case in cases if not self.skip_reason(case)]
        limit = min(self.end, time.monotonic() + IMPORT_SECONDS)
        shapes = sorted({case.shape for case in cases if case.program in PEERS})
        made = {shape: self.start(["--weights", shape]) for shape in shapes if not _are_whole(self.weights(shape))}
        processes = {case: self.start_case(case) for case in cases}
        self.missing.update({shape: failed for shape, one in made.items() if (failed := self.wait(one).get("failed"))})
        while time.monotonic() < limit and any(map(is_starting, processes.values())):
            time.sleep(0.1)
        for process in filter(is_starting, processes.values()):
            stop(process)
            write_atomically(result_file(process), {"failed": f"not ready after {IMPORT_SECONDS} seconds"})
        return processes

    def outcome(self, case: Case, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Let a ready process measure; return its result, or why there is none."""
        late = self.end - time.monotonic() < 3 * self.seconds  # to create or load the weights, and to warm up
        why = "no time was left" if late else self.missing.get(case.shape, "") if case.program in PEERS else ""
        if why:
            stop(process)
            return {"failed": why}
        found = self.wait(process)
        if OUT_OF_MEMORY.search(found.get("failed", "")) and not case.recompute and case.program != "tongwen":
            case = replace(case, recompute=True)
            again = self.outcome(case, self.start_case(case))
            return {"failed": f"{found['failed']} | checkpointed: {again['failed']}"} if "failed" in again else again
        return found

    def wait(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Let a process continue, and return its result."""
        patience = 12 * self.seconds + 60  # a hanging process leaves time for the others
        limit, late = max(1.0, min(self.end - time.monotonic(), patience)), ""
        try:
            process.communicate("go\n", limit)
        except subprocess.TimeoutExpired:
            late = f"not done after {limit:.0f} seconds"
        stop(process)
        place = result_file(process)
        if place.is_file():
            found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
            return found
        log = place.with_name("log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = next(filter(OUT_OF_MEMORY.search, log), log[-1] if log else "no output")[:500]
        return {"failed": late or f"{reason} (exit status {process.returncode})"}


def stop(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children, and wait until its memory is free."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def result_file(process: subprocess.Popen[str]) -> Path:
    """Return the result file of a process."""
    arguments: list[str] = process.args  # type: ignore[assignment]
    return Path(arguments[arguments.index("--out") + 1])


def write_atomically(place: Path, found: Any) -> None:
    """Write a file atomically."""
    partial = place.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(place)


def is_starting(process: subprocess.Popen[str]) -> bool:
    return process.poll() is None and not result_file(process).with_name("ready").is_file()


def _are_whole(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()  # what `save_weights` writes last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.5, help="nothing is begun that would not end in this time")
    parser.add_argument("--seconds", type=float, default=5, help="how long each contestant is measured")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on the CPU")
    parser.add_argument(
        "--only", default="", help="what this regular expression finds, of '8B lora tongwen' and its like"
    )
    parser.add_argument("--folder", type=Path, help="for weights, and for the logs of failed processes; kept")
    for name in PEERS:
        parser.add_argument(f"--{name.lower()}", metavar="PYTHON", help=f"a python that has {name}")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        case = Case(**json.loads(args.case))
        import_packages(case.contestant)
        args.out.with_name("ready").touch()
        if sys.stdin.readline():  # else the race is over
            write_atomically(args.out, measure(case))
    elif args.weights:
        save_weights(args.weights, args.out.parent.parent / f"weights-{args.weights}")
        write_atomically(args.out, {})
    else:
        if args.tiny:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        elif device() == "cpu":
            parser.error("no GPU is here; --tiny runs on a CPU")
        pythons = {}
        for name in PEERS:
            if value := vars(args)[name.lower().replace("-", "_")]:
                if not (program := shutil.which(value)):
                    parser.error(f"--{name.lower()}: {value} is no program")
                pythons[name] = str(Path(program).absolute())
        try:
            cases = choose(args)
        except re.error as error:
            parser.error(f"--only: {error}")
        if not cases:
            parser.error(f"--only: nobody is called {args.only!r}")
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(not compare(args, cases, pythons, (args.folder or Path(folder)).absolute()))


def choose(args: argparse.Namespace) -> list[Case]:
    return [
        Case(contestant, shape, method, 0.1 if args.tiny else args.seconds, recompute="checkpointed" in contestant)
        for contestant, tasks in RUNS
        for shape, method in ((("tiny", "lora"),) if args.tiny else tasks)
        if re.search(args.only, f"{shape} {method} {contestant}")
    ]


def compare(args: argparse.Namespace, cases: list[Case], pythons: dict[str, str], folder: Path) -> bool:
    """Measure all cases in turn; write the figures after each. Return whether there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    race = Race(folder, time.monotonic() + 60 * args.minutes, cases[0].seconds, pythons)
    known = json.loads(args.out.read_text(encoding="utf-8"))["runs"] if args.out.is_file() else []
    result: dict[str, Any] = {**environment(), "tasks": {}}
    ready = race.start_all(cases)
    for case in cases:
        found = race.outcome(case, ready[case]) if case in ready else {"failed": race.skip_reason(case)}
        result["tasks"].setdefault(f"{case.shape} {case.method}", {})[case.contestant] = found
        print(f"{case.shape} {case.method:4s} {case.contestant:43s} {summary(found)}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, {"runs": [*known, result]})
    return any("failed" not in found for task in result["tasks"].values() for found in task.values())


def summary(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    mfu = f"MFU {found['mfu']:.1%}, " if found["mfu"] else ""
    return f"{found['tokens_per_second']:,.0f} tokens/s, {mfu}{found['peak_memory_bytes'] / 1e9:.1f} GB"


def environment() -> dict[str, Any]:
    """Return the machine and the commit, marked if the working tree has changes."""
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    commit = subprocess.run(git, capture_output=True, text=True, check=False, cwd=folder).stdout.strip()
    graphics = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(graphics, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        gpu = ""
    machine = {"gpu": gpu, "cpus": os.cpu_count(), "python": platform.python_version()}
    return {"machine": machine, "commit": commit, "samples_per_step": SAMPLES}


if __name__ == "__main__":
    main()
