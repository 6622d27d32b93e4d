"""Train with LLaMA-Factory and Unsloth for `gpu_train.py`, run by a python with the peer installed.

Both get the same model from a folder, and the same samples in the order of `Samples.grouped`. LLaMA-Factory is started by its
entry point with a configuration like its YAML files. Unsloth's model and adapter go into transformers' Trainer, imported in the
order it requires.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def llama_factory(case: Any, samples: Any, clock: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return (trained model, facts of the run)."""
    from datasets import Dataset, DatasetDict
    from gpu_train import RANK, SAMPLES, batches_of, device
    from llamafactory.train.tuner import run_exp

    rows, accumulate = batches_of(case.contestant)
    order = samples.grouped(rows)
    clock.follow(order)
    tokens = [
        {name: part.tolist() for name, part in row.items()} | {"attention_mask": [1] * len(row["input_ids"])}
        for row in samples.rows(order)
    ]
    DatasetDict({"train": Dataset.from_list(tokens)}).save_to_disk(str(folder / "tokens"))
    run_exp(
        {
            "model_name_or_path": case.folder,
            "flash_attn": "sdpa",
            "enable_liger_kernel": "Liger" in case.contestant,
            "disable_gradient_checkpointing": not case.recompute,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": case.method,
            **({"lora_rank": RANK, "lora_alpha": 2 * RANK, "lora_target": "all"} if case.method == "lora" else {}),
            "template": "empty",
            "dataset": "tokens",  # required, not used
            "tokenized_path": str(folder / "tokens"),
            "output_dir": str(folder / "output"),
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": accumulate,
            "disable_shuffling": True,
            "learning_rate": 1e-4,
            "max_steps": len(samples) // SAMPLES,
            "lr_scheduler_type": "cosine",
            "bf16": True,
            "use_cpu": device() == "cpu",
            "disable_tqdm": True,
        },
        callbacks=[clock],
    )
    return clock.model, {"recompute": case.recompute, "micro_batches": accumulate}


def unsloth(case: Any, samples: Any, clock: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return (trained model, facts of the run)."""
    import torch
    from gpu_train import RANK, in_trainer
    from unsloth import FastLanguageModel  # must be imported before transformers to patch it

    model, _ = FastLanguageModel.from_pretrained(
        case.folder,
        max_seq_length=2048,
        dtype=torch.bfloat16,
        load_in_4bit=False,
        full_finetuning=case.method == "full",
    )
    if case.method == "lora":
        layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=2 * RANK,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(layers),
            use_gradient_checkpointing=case.recompute,
        )
    return in_trainer(case, model, samples, clock, folder)
