"""Names of other tools in a recipe: translated with a notice, or refused with the recipe's own name.

`OWNED`: TrainingArguments for which the recipe has its own settings; `NEEDLESS`: those that it needs no setting for;
`LIMITS`: those that are numbers. `OLD`: names that transformers 5 dropped or other
trainers use, with the recipe's name for each.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from tongwen.core.i18n import N_

# TrainingArguments name -> the recipe's setting (in the training section unless another section is named).
OWNED = {
    "output_dir": "out",
    "seed": "seed",
    "data_seed": "seed",
    "learning_rate": "learning_rate",
    "num_train_epochs": "stop_after: N epochs",
    "max_steps": "stop_after: N steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size",
    "per_device_eval_batch_size": "micro_batch_tokens",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "lr_scheduler_kwargs": "decay",
    "optim": "optimizer",
    "optim_target_modules": "adapter: {targets: [...]}",
    "neftune_noise_alpha": "neftune",
    "load_best_model_at_end": "patience",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "bf16": "precision",
    "fp16": "precision",
    "bf16_full_eval": "precision",
    "fp16_full_eval": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "gradient_checkpointing": "activation_checkpointing",
    "activation_checkpointing_kwargs": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing",
    "torch_compile": "compile",
    "torch_compile_backend": "compile",
    "torch_compile_mode": "compile",
    "report_to": "track",
    "run_name": "name",
    "logging_steps": "log_every",
    "logging_strategy": "log_every",
    "save_steps": "save_every",
    "save_strategy": "save_every",
    "save_total_limit": "keep_checkpoints",
    "eval_steps": "evaluate_every",
    "eval_strategy": "evaluate_every",
    "eval_delay": "evaluate_every",
    "push_to_hub": "export: {formats: [hf], push: OWNER/NAME}",
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision"),
        "export: {formats: [hf], push: OWNER/NAME}",
    ),
    "do_eval": "evaluate_every",
    "auto_find_batch_size": "micro_batch_tokens",
    "accelerator_config": "engine",
    "parallelism_config": "engine",
    "fsdp": "engine: fsdp2",
    "fsdp_config": "engine: FILE.yaml",
    "deepspeed": "engine: zero2, zero3 or FILE.json",
}

# TrainingArguments that a recipe needs no setting for, with the reason.
NEEDLESS = {
    "logging_nan_inf_filter": N_("a NaN stays a NaN"),
    "save_only_model": N_("a checkpoint always resumes"),
    "eval_on_start": N_("the held-out set is always scored before and after"),
    "metric_for_best_model": N_("`patience` goes by the held-out bits per byte"),
    "greater_is_better": N_("`patience` goes by the held-out bits per byte"),
    "resume_from_checkpoint": N_("the same command continues the run"),
    "remove_unused_columns": N_("there are no columns"),
    "label_names": N_("there are no columns"),
    "dataloader_drop_last": N_("no sample is dropped"),
    "average_tokens_across_devices": N_("the loss is always averaged over all learned tokens"),
    "train_sampling_strategy": N_("micro-batches carry no padding"),
    "group_by_length": N_("micro-batches carry no padding"),
    "disable_tqdm": N_("progress is shown only in a terminal"),
    "do_train": N_("a section that is present runs"),
    "do_predict": N_("`tongwen generate` does it"),
    "use_cpu": N_("the device is found by itself"),
    "ignore_data_skip": N_("a resumed run continues where it stopped"),
    "full_determinism": N_("the same seed gives the same order"),
    "label_smoothing_factor": N_("not supported with the loss over learned tokens"),
    "use_liger_kernel": N_("the head already runs on learned rows only"),
}

# Numbers among the other TrainingArguments, with their limits: a dataclass accepts any, and fails only when it is used.
LIMITS = {
    "adam_beta1": (0, 1 - 1e-9),
    "adam_beta2": (0, 1 - 1e-9),
    "adam_epsilon": (0, 1),
    "torch_empty_cache_steps": (1, 2**31),
    "eval_accumulation_steps": (1, 2**31),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, 1024),
    "ddp_bucket_cap_mb": (1, 1 << 20),
    "ddp_timeout": (1, 2**31),
    "local_rank": (-1, 1 << 20),
}

# Dropped or foreign name -> the recipe's key, or "" when it has no effect any more.
OLD = {
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "evaluation_strategy": "",
    "group_by_length": "",
    "overwrite_output_dir": "",
    "logging_dir": "",
    "no_cuda": "",
    "use_mps_device": "",
    "fp16_backend": "",
    "half_precision_backend": "",
    "tpu_num_cores": "",
    "past_index": "",
    "block_size": "max_length",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "model_max_length": "max_length",
}

OLD_REASONS = {
    "evaluation_strategy": N_(
        "the held-out set is always scored before and after; `evaluate_every: N` scores it in between"
    ),
    "group_by_length": N_("micro-batches contain no padding, so grouping by length saves nothing"),
    "overwrite_output_dir": N_("`tongwen run RECIPE --again` redoes a stage and keeps the old folder"),
    "logging_dir": N_("metrics.jsonl and report.html are in the stage's folder"),
}


@cache
def training_arguments() -> dict[str, str]:
    """Return the fields of the installed TrainingArguments with their types, read from the source without an import."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return {}
    source = Path(spec.submodule_search_locations[0]) / "training_args.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            return {
                item.target.id: ast.unparse(item.annotation)
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    return {}
