"""The output of a training job besides its model: facts for the manifest, answers during training, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tongwen.core import artifact, distributed
from tongwen.recipe.effects import free_settings
from tongwen.recipe.load import dump
from tongwen.recipe.phases import training_phases
from tongwen.recipe.training import Training
from tongwen.train.metrics import peak_memory_bytes
from tongwen.train.metrics_file import read_metrics
from tongwen.train.phase import Phase
from tongwen.train.report import held_out_table, write_report
from tongwen.workflows.training.types import PreparedModel, SamplePrompt, TrainingJob

SAMPLES = "samples.jsonl"


def method_of(section: Training) -> str:
    """Return the trained parts as one phrase: `lora`, `new_rows → qlora+embeddings`."""
    method = section.adapter.method
    return " → ".join(
        phase.train.replace("lora", method) if "lora" in phase.parts else phase.train
        for phase in training_phases(section)
    )


def facts_of(job: TrainingJob, model: PreparedModel, phases: list[Phase], throughput: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's entries besides settings and parents."""
    section, plan = job.section, phases[0].plan
    return {
        "device": model.device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "method": method_of(section),
        "free": {job.stage: section.model_dump(mode="json", include=free_settings(section))},
        "steps": throughput["steps"],
        "tokens": throughput["tokens"],
        "batch": {"tokens": section.batch_tokens} if section.batch_tokens else {"samples": section.batch_size},
        "engine": model.engine.name,
        "micro_batches": {
            "accumulate": plan.accumulate,
            "world": plan.world,
            "token_budget": plan.budget,
            "fill": round(plan.fill(job.data.store.lengths), 4),
        },
        "stop_tokens": [job.record_encoder.tokenizer.convert_ids_to_tokens(index) for index in model.stops],
        **job.facts,
    }


def save_answers(file: Path, step: int, titles: list[str], answers: list[str]) -> None:
    """Write the answers at a step to samples.jsonl. A resumed run replaces the lines after its checkpoint."""
    if not distributed.is_main_process() or not titles:
        return
    lines = [line for line in read_metrics(file) if line["step"] < step]
    lines += [
        {"step": step, "question": title, "answer": answer} for title, answer in zip(titles, answers, strict=True)
    ]
    beside = file.with_suffix(".partial")
    beside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    beside.replace(file)


def make_report(job: TrainingJob, before: dict[str, Any], after: dict[str, Any], samples: Path) -> dict[str, Any]:
    """Return the entries of report.json that come from the data and the scores."""
    counts = {name: len(store) for name, store in job.data.held_out_stores.items()}
    return {
        "ledger": _ledgers(job),
        "mask": job.data.mask,
        "held_out": held_out_table(before["scores"], after["scores"], counts),
        "peak_memory_bytes": peak_memory_bytes(),
        "samples": _samples(job.prompts, before["answers"], after["answers"], read_metrics(samples)),
    }


def _samples(
    prompts: list[SamplePrompt], before: list[str], after: list[str], lines: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the prompts with all their answers. lines: of samples.jsonl, in this order at each step."""
    by_prompt = [lines[index :: len(prompts)] for index in range(len(prompts))]
    return [
        {
            "question": prompt.title,
            "before": old,
            "on_the_way": {line["step"]: line["answer"] for line in own},
            "after": new,
            "wanted": prompt.reference,
        }
        for prompt, old, own, new in zip(prompts, before, by_prompt, after, strict=True)
    ]


def _ledgers(job: TrainingJob) -> dict[str, Any]:
    """Return the ledgers of `prepare` and of encoding. Rows kept by the first must equal rows read by the second."""
    table = job.prepared.manifest["ledger"][job.record_encoder.kind]
    encoded = job.data.ledger.to_dict()
    tables = {"prepare": {key: table[key] for key in ("in", "kept", "lost", "files")}, "encode": encoded}
    kept, taken = tables["prepare"]["kept"]["rows"], tables["encode"]["in"]["rows"]
    if kept != taken:
        raise AssertionError(f"prepare keeps {kept} rows, encode takes in {taken}")
    return tables


def write_results(job: TrainingJob, folder: Path, report: dict[str, Any]) -> None:
    """Write report.json, report.html and rejected.jsonl."""
    artifact.write_json(folder / "report.json", report)
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(bad, ensure_ascii=False) + "\n" for bad in job.data.rejected)
    title = f"{job.recipe.name} · {job.stage}"
    write_report(folder, title, report, read_metrics(folder / "metrics.jsonl"), dump(job.recipe))
