"""Training on one GPU, side by side: tongwen, and transformers' Trainer with peft, in turn, each in a process of its own.

    python bench/gpu_train.py --out bench/results/gpu_train.json          # one GPU of 80 GB, under 8 minutes
    python bench/gpu_train.py --tiny --out tiny.json                      # the same script on a CPU, toy shapes

Random weights of a 1B and an 8B Llama shape, random tokens whose lengths are distributed as dialogues' are, 64 samples per
optimizer step, the same ones for everybody; LoRA of rank 16 on all linear layers, and all weights where they fit; bf16. After
WARM_UP steps each contestant is measured for some seconds, between the ends of two steps, the GPU waited for. Beside the
Trainer as it is started by most (micro-batches of 4, shuffled) stands one whose samples are sorted by length within a step
(micro-batches of 16); with Liger's kernels where the package liger_kernel is there. Who runs out of memory gets activation
checkpointing, and that is told.

The figures are real tokens per second (padding is none), MFU on real tokens with the floating-point operations of what is
trained (see `flops_per_token`) over 989e12 and over what a product of two large matrices reached here, and peak memory.
Needed: torch, transformers, peft, and what tongwen imports; not datasets, trl, flash-attn or bitsandbytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SAMPLES, PEAK, WARM_UP, RANK = 64, 989e12, 3, 16  # PEAK: dense bf16 of an H100 or H200 by its data sheet
SHAPES: dict[str, dict[str, Any]] = {  # Llama-3.2-1B and Llama-3.1-8B
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": True},
}
TASKS = (("8B", "lora"), ("1B", "lora"), ("1B", "full"))
CONTESTANTS = (
    "tongwen",
    "trainer, 16 x 4, sorted",
    "trainer, 4 x 16",
    "tongwen, compiled",
    "trainer, 16 x 4, sorted, Liger",
)


@dataclass(frozen=True)
class Case:
    """What one process measures. seconds: how long, after the warm-up; recompute: activations, for the Trainer."""

    contestant: str
    shape: str
    method: str
    seconds: float
    recompute: bool = False

    @property
    def tiny(self) -> bool:
        return self.shape == "tiny"


class Samples:
    """Random tokens: (ids, learn) pairs with the lengths of dialogues, of which the first part is not learned."""

    def __init__(self, shape: str) -> None:
        import numpy as np

        self.rng, shorter = np.random.default_rng(0), 16 if shape == "tiny" else 1
        many = SAMPLES * (12 if shape == "tiny" else 200)
        self.lengths = np.clip(self.rng.lognormal(5.3, 0.8, many), 32, 2048).astype(np.int64) // shorter
        self.prompts = np.maximum(1, self.lengths * self.rng.uniform(0.2, 0.6, many)).astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = self.rng.integers(0, vocabulary(shape), self.offsets[-1], dtype=np.uint32)

    def __len__(self) -> int:
        return len(self.lengths)

    def store(self) -> Any:
        """As tongwen keeps them."""
        import numpy as np

        from tongwen.data.store import SAMPLE, TokenStore

        spans = np.stack([self.offsets[:-1] + self.prompts, self.offsets[1:]], axis=1)
        return TokenStore(self.ids, self.offsets, spans, np.zeros(len(self), SAMPLE), ("random",))

    def rows(self, order: list[int]) -> list[dict[str, Any]]:
        """As a Trainer takes them."""
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
    """Random weights where they are trained: bf16 under an adapter, fp32 where they learn themselves."""
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
    """Of the model, forward and back, per real token; a multiply-add counts two. Layers 6 per weight in full, 4 under an
    adapter (no gradient of frozen weights), the head on learned tokens only, causal attention 6 x layers x width x the mean
    length that a token's document has, the adapter 6 per weight."""
    import torch

    config = model.config
    head = model.get_output_embeddings()
    plain = [
        one
        for name, one in model.named_modules()
        if isinstance(one, torch.nn.Linear) and "lora_" not in name and one is not head
    ]
    layers, of_head = sum(one.weight.numel() for one in plain), head.weight.numel()
    adapter = sum(part.numel() for name, part in model.named_parameters() if "lora_" in name)
    learned = float((samples.lengths - samples.prompts).sum() / samples.lengths.sum())
    seen = float((samples.lengths**2).sum() / samples.lengths.sum())
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen
    times = 4 if method == "lora" else 6
    return times * (layers + learned * of_head) + attention + 6 * adapter


def measure(case: Case) -> dict[str, Any]:
    """Train until the time is over; the figures of the steps after the warm-up."""
    import torch
    from transformers import TrainerCallback

    ends: list[tuple[int, float]] = []  # (step, when the device had done it)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if device() == "cuda":
                torch.cuda.synchronize()
            ends.append((state.global_step, time.perf_counter()))
            measured = ends[-1][1] - ends[WARM_UP - 1][1] if len(ends) > WARM_UP else 0.0
            control.should_training_stop |= measured > case.seconds

    samples = Samples(case.shape)
    model = make_model(case)
    run = ours if case.contestant.startswith("tongwen") else theirs
    with tempfile.TemporaryDirectory() as folder:
        trained, told = run(case, model, samples, Clock(), Path(folder))
    (first, begin), (last, end) = ends[WARM_UP - 1], ends[-1]
    tokens = int(samples.lengths[first * SAMPLES : last * SAMPLES].sum())
    speed = tokens / (end - begin)
    operations = flops_per_token(trained, samples, case.method)
    reached = matrix_product() if device() == "cuda" else None
    return {
        **told,
        "steps": last - first,
        "seconds": round(end - begin, 2),
        "real_tokens": tokens,
        "tokens_per_second": round(speed, 1),
        "flops_per_token": operations,
        "mfu": speed * operations / PEAK,
        "matrix_product_flops": reached,
        "mfu_of_matrix_product": speed * operations / reached if reached else None,
        **peak_memory(),
    }


def ours(case: Case, model: Any, samples: Samples, clock: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """What a training stage does after its base was opened."""
    import torch

    from tongwen import course
    from tongwen.model import attention, layers
    from tongwen.model.adapt import adapt
    from tongwen.model.score import learned_loss
    from tongwen.recipe.schema import Adapter, Duration, Sft
    from tongwen.train.batches import make_plan, token_budget
    from tongwen.train.engine import Engine
    from tongwen.train.fit import Job, fit
    from tongwen.train.watch import Watch

    class Timed(Watch):
        def on_step_end(self, *arguments: Any, **rest: Any) -> None:
            clock.on_step_end(*arguments, **rest)

    steps = len(samples) // SAMPLES
    words = Sft(
        adapter=Adapter(method=case.method, rank=RANK),  # type: ignore[arg-type]
        batch_size=SAMPLES,
        precision="bf16",
        stop_after=Duration(count=steps, unit="steps"),
        log_every=10,
        trainer={"save_strategy": "no"},
    )
    model.set_attn_implementation(attention.register())
    adapted = adapt(model, words.adapter, [])
    for part in adapted.learners:
        part.data = part.data.float()
    store, stretch = samples.store(), words.stretches[0]
    plan = make_plan(
        store.lengths,
        lambda epoch: list(range(len(store))),
        batch_size=SAMPLES,
        stop_after=words.stop_after,
        budget=token_budget(device()),
    )
    pupil = course.Pupil(adapted, (), True, None, device(), torch.bfloat16, Engine("single"))
    leg = course.Leg(stretch, plan, folder, 0, 0)
    adapted.focus(stretch.parts)
    course.set_checkpointing(pupil, leg, store)
    if case.contestant.endswith("compiled"):
        layers.compile_layers(model)
    fit(
        Job(
            model=adapted.model,
            tokenizer=None,
            store=store,
            plan=plan,
            packed=True,
            stretch=stretch,
            dtype=torch.bfloat16,
            seed=0,
            checkpoints=folder,
            resume=None,
            loss=learned_loss,
            evaluate=None,
            watch=Timed(folder / "metrics.jsonl", plan.tokens_of(store.lengths), steps, SimpleNamespace(update=print)),  # type: ignore[arg-type]
            engine=pupil.engine,
        )
    )
    recomputes = any(getattr(one, "gradient_checkpointing", False) for one in model.modules())
    return adapted.model, {"recompute": recomputes, "micro_batches": plan.accumulate}


def theirs(case: Case, model: Any, samples: Samples, clock: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' Trainer on padded rows, under an adapter of peft's."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Trainer, TrainingArguments

    rows, accumulate = (int(number) for number in case.contestant.split(", ")[1].split(" x "))
    order, steps = list(range(len(samples))), len(samples) // SAMPLES
    if "sorted" in case.contestant:
        order = [
            one
            for step in range(steps)
            for one in sorted(order[step * SAMPLES : (step + 1) * SAMPLES], key=lambda one: samples.lengths[one])
        ]
    if case.method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        )

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        ids = pad_sequence([one["input_ids"] for one in batch], batch_first=True)
        labels = pad_sequence([one["labels"] for one in batch], batch_first=True, padding_value=-100)
        real = pad_sequence([torch.ones_like(one["input_ids"]) for one in batch], batch_first=True)
        return {"input_ids": ids, "labels": labels, "attention_mask": real}

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
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
        use_liger_kernel=case.contestant.endswith("Liger"),
    )
    Trainer(
        model=model, args=arguments, train_dataset=samples.rows(order), data_collator=collate, callbacks=[clock]
    ).train()
    return model, {"recompute": case.recompute, "micro_batches": accumulate}


def matrix_product() -> float:
    """Floating-point operations per second of a product of two large bf16 matrices of random numbers."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for begin in (None, time.perf_counter()):  # the first round warms up
        for _ in range(10):
            left @ right
        torch.cuda.synchronize()
        began = begin
    return 10 * 2 * 8192**3 / (time.perf_counter() - began)  # type: ignore[operator]


def peak_memory() -> dict[str, int]:
    """Bytes: of tensors at their most, and of what the allocator held; on a CPU of the process."""
    import torch

    from tongwen.train.watch import peak_memory_bytes

    reserved = int(torch.cuda.max_memory_reserved()) if device() == "cuda" else peak_memory_bytes()
    return {"peak_memory_bytes": peak_memory_bytes(), "peak_reserved_bytes": reserved}


def in_its_own_process(case: Case, limit: float) -> dict[str, Any]:
    """The figures, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "case.json"
        command = [sys.executable, __file__, "--case", json.dumps(vars(case)), "--out", str(out)]
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {limit:.0f} seconds"}
        if out.is_file():
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return found
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][-500:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.5, help="nothing is begun that would not end in this time")
    parser.add_argument("--seconds", type=float, default=10, help="how long each contestant is measured")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on the CPU")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        chosen.out.write_text(json.dumps(measure(Case(**json.loads(chosen.case)))), encoding="utf-8")
        return
    if chosen.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    end = time.monotonic() + 60 * chosen.minutes
    tasks = (("tiny", "lora"),) if chosen.tiny else TASKS
    contestants = CONTESTANTS[:2] if chosen.tiny else CONTESTANTS
    result = {**about(), "tasks": {f"{shape} {method}": {} for shape, method in tasks}}
    for contestant in contestants:  # the most telling ones first, in case the time is over
        for shape, method in tasks:
            case = Case(contestant, shape, method, 0.1 if chosen.tiny else chosen.seconds)
            found = run_case(case, end)
            result["tasks"][f"{shape} {method}"][contestant] = found
            figures = (
                found.get("failed")
                or f"{found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.1%}, {found['peak_memory_bytes'] / 1e9:.1f} GB"
            )
            print(f"{shape} {method:4s} {contestant:32s} {figures}", flush=True)
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_case(case: Case, end: float) -> dict[str, Any]:
    if "Liger" in case.contestant and importlib.util.find_spec("liger_kernel") is None:
        return {"failed": "the package liger_kernel is not here"}
    needed = 3 * case.seconds + 20  # to import, to make the weights, to warm up
    if end - time.monotonic() < needed:
        return {"failed": "no time was left"}
    found = in_its_own_process(case, end - time.monotonic())
    if "OutOfMemory" in found.get("failed", "") and not case.recompute and case.contestant.startswith("trainer"):
        return run_case(Case(**{**vars(case), "recompute": True}), end)
    return found


def about() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    graphics = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(graphics, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        gpu = ""
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    machine = {"gpu": gpu, "cpus": os.cpu_count(), "python": platform.python_version()}
    return {
        "machine": machine,
        "versions": versions,
        "commit": commit.strip(),
        "samples_per_step": SAMPLES,
        "peak_flops": PEAK,
    }


if __name__ == "__main__":
    main()
