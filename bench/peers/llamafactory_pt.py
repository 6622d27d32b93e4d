"""Continue the pre-training of a model with LLaMA-Factory's `stage: pt`, and report the CPU time of each step.

A stand-alone script, run by the python of the peer's own virtual environment (see install.sh):

    PEER_VENV/bin/python llamafactory_pt.py --model FOLDER --text documents.jsonl --steps 12 --save FOLDER --out result.json

The configuration is its own examples/train_lora/llama3_lora_pretrain.yaml; `--set` changes settings of it. The only addition is
a TrainerCallback that reads the clock (user and system, of the whole process) when training begins and when an
optimizer step ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

EXAMPLE: dict[str, Any] = {
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "cutoff_len": 2048,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1 it is a ratio (the example's warmup_ratio is deprecated)
    "bf16": True,
}
PACKAGES = ("llamafactory", "transformers", "torch", "peft", "accelerate", "datasets", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a `text` each")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--save", type=Path, required=True, help="folder for what was trained")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--set", type=json.loads, default={}, help="settings that replace the example's, as JSON")
    args = parser.parse_args()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    with tempfile.TemporaryDirectory(prefix="peer-") as work:
        os.environ["HF_HOME"] = f"{work}/hf"  # nothing of the user's caches is used
        result = train(args, Path(work))
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def train(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    clock, losses = list[float](), list[float]()

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            clock.append(time.process_time())

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            clock.append(time.process_time())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    facts = {"bench": {"file_name": str(args.text.resolve()), "columns": {"prompt": "text"}}}
    (work / "dataset_info.json").write_text(json.dumps(facts), encoding="utf-8")
    settings = EXAMPLE | args.set
    own = {
        "stage": "pt",
        "do_train": True,
        "model_name_or_path": str(args.model.resolve()),
        "dataset": "bench",
        "dataset_dir": str(work),
        "cache_dir": str(work / "cache"),
        "overwrite_cache": True,
        "output_dir": str(args.save),
        "overwrite_output_dir": True,
        "max_steps": args.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    run_exp(own | settings, callbacks=[Clock()])
    tokens = settings["cutoff_len"] * settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    return {
        "cpu_seconds": clock[-1] - clock[0],
        "steps": len(clock) - 1,
        "tokens": tokens * (len(clock) - 1),  # blocks without padding
        "losses": losses,
        "settings": settings,
        "versions": {package: version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    # This file's folder must not be where imports are looked up first: a file beside it has the package's name.
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    main()
