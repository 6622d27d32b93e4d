"""Measure LLaMA-Factory's LoRA SFT: CPU-seconds per real token and peak resident memory.

A stand-alone script, run by the python of the peer's own virtual environment (see install.sh):

    PEER_VENV/bin/python llamafactory.py --model FOLDER --data alpaca_zh.json --steps 24 \
        --mode default --threads 1 --out result.json

It calls LLaMA-Factory's own entry point (`llamafactory.train.tuner.run_exp`) in this process with
a configuration of the kind its YAML files hold.  Two things are added from outside and neither
changes what is computed: a TrainerCallback that reads the clocks when an optimizer step ends, and
a wrapper around the trainer's `training_step` that counts the tokens of the batch it was given.

What is measured (`steady state`): from the end of step 2 to the end of the last step.
  cpu_seconds     user+sys time of this process, all threads (time.process_time); the data is
                  collated in this process as well (no data loader workers)
  real_tokens     prompt+answer tokens that were trained, padding not counted
  peak_rss_bytes  the highest resident memory of this process when the last step has ended
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODES = ("default", "nockpt", "grouped", "neat_packing")
WARMUP_STEPS = 2  # not measured
PACKAGES = ("llamafactory", "transformers", "torch", "peft", "accelerate", "datasets", "trl")

# 8 samples make an optimizer step in every mode: (rows in a micro batch, accumulated micro batches).
#  - default, nockpt: 1 x 8, as in LLaMA-Factory's examples/train_lora.
#  - grouped: 4 x 2.  8 x 1 (--micro-batch 8 --accumulation 1) took within a few per cent the same
#    CPU time, and 12.4 GiB instead of 7.6.  The sampler sorts blocks of 50 steps' samples (fewer
#    if that is more than a quarter of the data: 21 steps with 700 rows) from long to short, so a
#    few steps see only the longest samples; --steps 23 measures one whole sweep of 21.
#  - neat_packing: 1 x 5.  The rows are packs of at most 511 tokens (cutoff_len - 1, which is what
#    LLaMA-Factory makes of cutoff_len when packing): 700 samples of the data fill 417 of them, so
#    8 samples are 4.8 rows.
MICRO_BATCH = {"default": (1, 8), "nockpt": (1, 8), "grouped": (4, 2), "neat_packing": (1, 5)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder (transformers format)")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca JSON array")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps, at least 3")
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--micro-batch", type=int, help="rows per micro batch, instead of the mode's")
    parser.add_argument("--accumulation", type=int, help="micro batches per step, instead of the mode's")
    args = parser.parse_args()
    if args.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be more than {WARMUP_STEPS}: the first {WARMUP_STEPS} are not measured")
    return args


def peak_rss_bytes() -> int:
    """Return the peak memory of this process; ru_maxrss may contain an inherited value of its parent."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def make_config(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    rows, accumulation = MICRO_BATCH[args.mode]
    rows, accumulation = args.micro_batch or rows, args.accumulation or accumulation
    dataset_dir = work / "data"
    dataset_dir.mkdir()
    (dataset_dir / "dataset_info.json").write_text(
        json.dumps({"bench": {"file_name": str(args.data.resolve())}}), encoding="utf-8"
    )
    config: dict[str, Any] = {
        # model
        "model_name_or_path": str(args.model.resolve()),
        "flash_attn": "sdpa",
        # method
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target": "all",
        # dataset
        "dataset": "bench",
        "dataset_dir": str(dataset_dir),
        "template": "chatml",
        "cutoff_len": 512,
        "overwrite_cache": True,
        "cache_dir": str(work / "cache"),
        # The example's worker processes are left out: their CPU time is not this process's.
        "dataloader_num_workers": 0,
        # output
        "output_dir": str(work / "output"),
        "overwrite_output_dir": True,
        "logging_steps": 1,  # the loss of each step is reported
        "save_strategy": "no",
        "report_to": "none",
        "plot_loss": False,
        # train
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1.0e-4,
        "max_steps": args.steps,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # below 1 it is a ratio (the example's warmup_ratio is deprecated)
        "seed": 42,
        "use_cpu": True,
        "bf16": args.precision == "bf16",  # the examples have it true; fp32 for CPUs that do not compute in it
        "fp16": False,
    }
    if args.mode != "default":
        config["disable_gradient_checkpointing"] = True
    if args.mode == "grouped":
        config["train_sampling_strategy"] = "group_by_length"  # transformers 4: group_by_length
    if args.mode == "neat_packing":
        config["packing"] = True
        config["neat_packing"] = True
    return config


def main() -> None:
    args = parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    # This file has the package's name: its folder must not be where imports are looked up first.
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]

    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        os.environ["HF_HOME"] = str(Path(name) / "hf")  # nothing of the user's caches is used
        result = measure(args, Path(name))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("mode", "cpu_ms_per_token", "peak_rss_bytes")}))


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch

    torch.set_num_threads(args.threads)
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    count = {"real": 0, "positions": 0, "answer": 0, "samples": 0, "micro_batches": 0}
    marks: list[dict[str, float]] = []  # one per optimizer step
    losses: list[float] = []
    about: dict[str, Any] = {}

    def count_batch(inputs: dict[str, Any]) -> None:
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        if mask.dim() == 2:
            if int(mask.max()) > 1:
                raise RuntimeError("a packed batch without the block-diagonal mask")
            real = mask != 0
            samples = ids.size(0)
        else:
            # neat_packing: the additive block-diagonal mask [rows, 1, length, length]; a token sees
            # itself (0.0 on the diagonal) unless it is padding, and the first token of a document
            # does not see the one before it.
            own = mask[:, 0] == 0
            real = own.diagonal(dim1=1, dim2=2)
            joined = own.diagonal(offset=-1, dim1=1, dim2=2)
            samples = int(real[:, 0].sum() + (real[:, 1:] & ~joined).sum())
        count["real"] += int(real.sum())
        count["positions"] += ids.numel()
        count["answer"] += int((inputs["labels"] != -100).sum())
        count["samples"] += samples
        count["micro_batches"] += 1

    train_batch = CustomSeq2SeqTrainer.training_step

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        # Here and not in the collator: batches are prepared some time before they are trained.
        count_batch(inputs)
        return train_batch(self, model, inputs, *rest, **named)

    CustomSeq2SeqTrainer.training_step = training_step

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            model = named["model"]
            dtypes = sorted({str(p.dtype) for p in model.parameters()})
            if not args.bf16 and dtypes != ["torch.float32"]:
                raise RuntimeError(f"the model is not in fp32: {dtypes}")
            if not args.bf16 and (args.fp16 or torch.is_autocast_enabled("cpu")):
                raise RuntimeError("mixed precision is on")
            about["parameter_dtypes"] = dtypes
            about["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            about["lora_targets"] = sorted(model.peft_config["default"].target_modules)
            about["attention"] = model.config._attn_implementation
            about["gradient_checkpointing"] = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
            about["optimizer"] = str(args.optim)
            about["train_rows"] = len(named["train_dataloader"].dataset)
            about["peak_rss_bytes_before_training"] = peak_rss_bytes()

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            marks.append({"cpu": time.process_time(), "wall": time.perf_counter(), "rss": peak_rss_bytes(), **count})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    config = make_config(args, work)
    run_exp(config, callbacks=[Clock()])

    if len(marks) != args.steps:
        raise RuntimeError(f"{len(marks)} steps were trained, {args.steps} were asked for")
    first, last = marks[WARMUP_STEPS - 1], marks[-1]
    diff = {key: last[key] - first[key] for key in first}
    return {
        "peer": "llamafactory",
        "mode": args.mode,
        "steps": args.steps,
        "measured_steps": args.steps - WARMUP_STEPS,
        "threads": torch.get_num_threads(),
        "real_tokens": diff["real"],
        "cpu_seconds": diff["cpu"],
        "cpu_ms_per_token": 1000 * diff["cpu"] / diff["real"],
        "wall_seconds": diff["wall"],
        "peak_rss_bytes": last["rss"],
        "losses": losses,
        "answer_tokens": diff["answer"],
        "computed_positions": diff["positions"],
        "samples": diff["samples"],
        "micro_batches": diff["micro_batches"],
        "per_step": [
            {
                "cpu_seconds": b["cpu"] - a["cpu"],
                "real_tokens": b["real"] - a["real"],
                "samples": b["samples"] - a["samples"],
                "peak_rss_bytes": b["rss"],
            }
            for a, b in itertools.pairwise(marks)
        ],
        **about,
        "config": {
            key: value
            for key, value in config.items()
            if key not in ("model_name_or_path", "dataset_dir", "cache_dir", "output_dir")
        },
        "versions": {package: version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    main()
