"""Continued pre-training on a CPU with equal CPU-seconds: tongwen with and without new tokens, and LLaMA-Factory.

    sh bench/peers/install.sh PEER_VENV
    python bench/cpt_cpu.py --peer PEER_VENV/bin/python --model SMOLLM2_FOLDER --text zh_docs.txt --out bench/results/cpt_cpu.json

All train on the documents that `prepare` keeps, in one number type on one thread. One function scores them on the held-out
paragraphs, in bits per byte, which do not depend on the vocabulary. LLaMA-Factory runs with its example for `stage: pt` (LoRA
of rank 8, 2,048 tokens per row, 8 rows per step, 1e-4), and once more with tongwen's settings, to separate settings from code.
A short run of each measures the cost of a step; then the steps that fit into the budget are trained, with the schedule over
them. Learning the new tokens counts towards the budget. The peer's steps are rounded up, ours down.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft_cpu import processor

RECIPE = """\
name: bench
base: {model}
out: {out}
prepare: {{documents: [{{path: {text}, language: zh, records: paragraph}}], held_out: 0.01}}
{vocab}
pretrain:
  train: full
  max_length: 512
  batch_tokens: 1024
  learning_rate: 3e-4
  schedule: wsd
  decay: 0.5
  stop_after: 3 steps
  precision: {precision}
  save_every: 1000000
  samples: 0
"""
SAME: dict[str, Any] = {
    "finetuning_type": "full",
    "cutoff_len": 512,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "warmup_stable_decay",
    "warmup_steps": 0.03,
    "disable_gradient_checkpointing": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of the peer's environment")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seconds", type=float, default=900, help="CPU-seconds of training for each")
    parser.add_argument("--pieces", type=int, default=2000)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all contestants")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        rows["tongwen"] = ours(args, work / "plain", "")
        rows["tongwen, new words"] = ours(args, work / "words", f"vocab: {{pieces: {args.pieces}}}")
        prepared = work / "plain" / "out" / "prepare"
        rows["peer"] = theirs(args, work / "peer", prepared, {})
        same = {**SAME, "lr_scheduler_kwargs": {"num_decay_steps": max(1, rows["tongwen"]["steps"] // 2)}}
        rows["peer, tongwen's settings"] = theirs(args, work / "same", prepared, same)
        rows["base"] = {"folder": args.model}
        for row in rows.values():
            row["bits_per_byte"] = score(row.pop("folder"), row.pop("adapter", ""), prepared)
    for name, row in rows.items():
        print(
            f"{name:26s} {row['bits_per_byte']:.4f}", {key: row.get(key) for key in ("cpu_seconds", "steps", "tokens")}
        )
    peer = rows["peer"]["bits_per_byte"]
    result = {
        "machine": {"processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "seconds": args.seconds,
        "precision": args.precision,
        "of_peer": {name: row["bits_per_byte"] / peer for name, row in rows.items()},
        "recipe": RECIPE,
        "runs": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def ours(args: argparse.Namespace, folder: Path, vocab: str) -> dict[str, Any]:
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    settings = {"model": args.model, "text": args.text, "out": folder / "out", "vocab": vocab}
    settings["precision"] = args.precision
    recipe.write_text(RECIPE.format(**settings), encoding="utf-8")
    tongwen("run", str(recipe), "--only", "prepare")
    before = cpu_of_children()
    if vocab:
        tongwen("run", str(recipe), "--only", "vocab")
    spent = cpu_of_children() - before
    tongwen("run", str(recipe), "--only", "pretrain")
    lines = metrics(folder)
    per_step = (lines[-1]["cpu_seconds"] - lines[0]["cpu_seconds"]) / (len(lines) - 1)
    steps = max(2, int((args.seconds - spent) / per_step))
    tongwen("run", str(recipe), "--only", "pretrain", "--again", f"pretrain.stop_after={steps} steps")
    lines = metrics(folder)
    trained = (
        (lines[-1]["cpu_seconds"] - lines[0]["cpu_seconds"]) * steps / (steps - 1)
    )  # the start of the first step is not recorded
    manifest = json.loads((folder / "out/pretrain/manifest.json").read_text(encoding="utf-8"))
    return {
        "folder": str(folder / "out" / "pretrain"),
        "cpu_seconds": trained + spent,
        "of_them_for_words": spent,
        "steps": steps,
        "tokens": lines[-1]["tokens"],
        "losses": [line["loss"] for line in lines],
        "versions": manifest["versions"],
    }


def theirs(args: argparse.Namespace, folder: Path, prepared: Path, settings: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    texts = [row["text"] for row in documents(prepared / "documents.jsonl")]
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    script = str(Path(__file__).parent / "peers" / "llamafactory_pt.py")
    command = [args.peer, script, "--model", args.model, "--text", str(file), "--save", str(folder / "saved")]
    settings = {**settings, "bf16": args.precision == "bf16"}
    command += ["--out", str(folder / "result.json"), "--set", json.dumps(settings)]

    def train(steps: int) -> dict[str, Any]:
        run([*command, "--steps", str(steps)])
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))

    short = train(2)
    found = train(math.ceil(args.seconds / (short["cpu_seconds"] / short["steps"])))
    whole = settings.get("finetuning_type") == "full"
    where = {"folder": str(folder / "saved")} if whole else {"folder": args.model, "adapter": str(folder / "saved")}
    return {**where, **found}


def score(folder: str, adapter: str, prepared: Path) -> float:
    """Return the bits per byte of a model on the held-out documents."""
    import torch

    from tongwen.data import token_store
    from tongwen.data.ledger import Ledger
    from tongwen.data.prepare_steps import load_records
    from tongwen.data.token_bytes import token_bytes
    from tongwen.model.adapters import chain
    from tongwen.model.kernels import packed_attention
    from tongwen.model.kernels.loss import bits_per_byte
    from tongwen.model.loading import load
    from tongwen.model.loading.locate import locate
    from tongwen.recipe.training import Pretrain
    from tongwen.train.packing import MicroBatches, fill
    from tongwen.workflows.record_encoders import make_document_encoder

    reader = make_document_encoder(folder, Pretrain(max_length=512))
    records = list(load_records(prepared / "documents.held_out.jsonl"))
    store = token_store.in_memory(reader.held_out(records, Ledger("rows", "tokens"), lambda bad: None))
    model = load.load_model(locate(folder), torch.float32)
    if adapter:
        model = chain.open_adapter(model, adapter, None).merge_and_unload()
    model.set_attn_implementation(packed_attention.register())
    batches = MicroBatches(store, fill(store.lengths, 1024), packed=True)
    sizes = torch.from_numpy(token_bytes(reader.tokenizer))
    return bits_per_byte(model, (batches[index] for index in range(len(batches))), sizes)["bits_per_byte"]


def documents(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return documents(folder / "out" / "pretrain" / "metrics.jsonl")


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tongwen(*arguments: str) -> None:
    run([sys.executable, "-m", "tongwen", *arguments])


def run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    main()
