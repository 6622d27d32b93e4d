"""Compare initial values of new embedding rows on a small model: bits per byte of the untrained grown model on held-out text.

    python bench/new_rows.py --model SMOLLM2_FOLDER --text zh_docs.txt --out bench/results/new_rows.json

2,000 pieces are learned from nine tenths of the text. With `--matched` only `new_rows: matched` is measured, with 2,000 and
500 pieces beside `subtoken_mean`, and added to the file. Otherwise tongwen's other methods come first, then candidates:
means with other weights, a learned composition (ridge regression of the
base's own merges: row of ab from rows of a and b), and distillation: new rows moved so that the hidden state after a
piece, four layers up, matches the one after its old tokens (the idea of AweDist), in all directions or only in those that
the output hardly uses, because the head is tied.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, embedding

from tongwen.model.loading import load
from tongwen.model.loading.locate import locate
from tongwen.vocab.script import Script
from tongwen.workflows import tokenizer_files, vocab_pieces, vocab_texts
from tongwen.workflows.matched_rows import match_rows

PIECES, LAYERS, CHUNK = 2000, 4, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--distil-characters", type=int, default=15_000)
    parser.add_argument("--matched", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    base = tokenizer_files.open_tokenizer_files(args.model)
    lines = Path(args.text).read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    held_out, rest = [line for line in lines[:3000] if len(line) > 30][:40], lines[3000:]
    learned = vocab_pieces.learn(base, rest, Script("han"), PIECES)
    made = learned.extended(PIECES)
    model = load.load_model(locate(args.model), torch.float32).requires_grad_(False).eval()
    old = model.get_input_embeddings().weight.clone()
    trial = Trial(model, old, made, held_out)
    found = {"base": trial.score(base, old)}
    print("base", found["base"], flush=True)
    if args.matched:
        add_matched(Path(args.out), trial, learned, base, rest, found["base"])
        return
    for name, rows in candidates(trial, learned, made.parts):
        found[name] = trial.with_rows(rows)
        print(f"{name:40s} {found[name]:.4f}", flush=True)
    for name, share in (("distilled", 1.0), ("distilled where the output hardly looks", 0.75)):
        for epoch, rows, seconds in distil(trial, rest, args.distil_characters, share):
            found[f"{name}, {epoch} passes"] = trial.with_rows(rows)
            print(f"{name}, {epoch} passes, {seconds:.0f} CPU s: {found[f'{name}, {epoch} passes']:.4f}", flush=True)
    Path(args.out).write_text(json.dumps({"bits_per_byte": found}, indent=1) + "\n", encoding="utf-8")


class Trial:
    """The model, its old matrix (V, H), and the text that is scored."""

    def __init__(self, model: Any, old: torch.Tensor, made: Any, held_out: list[str]) -> None:
        self.model, self.old, self.made, self.held_out = model, old, made, held_out

    def with_rows(self, rows: torch.Tensor) -> float:
        return self.score(self.made.files, torch.cat([self.old, rows]))

    def score(self, one: Any, matrix: torch.Tensor, head: torch.Tensor | None = None) -> float:
        """Bits per byte, each text by itself behind the token that begins one. head: the matrix, if there is no other."""
        head = matrix if head is None else head
        nats = size = 0.0
        with torch.no_grad():
            for text, ids in zip(self.held_out, one.encode_fast(self.held_out), strict=True):
                whole = torch.tensor([[0, *ids]])
                states = self.model.model(inputs_embeds=embedding(whole, matrix), use_cache=False).last_hidden_state
                nats += float(cross_entropy(states[0, :-1] @ head.T, whole[0, 1:], reduction="sum"))
                size += len(text.encode())
        return nats / size / math.log(2)


def add_matched(out: Path, trial: Trial, learned: Any, base: Any, texts: list[str], untouched: float) -> None:
    """Measure matched rows, and write them into the file beside what it holds."""
    whole = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    sample, old, found = vocab_texts.sample_texts(texts), trial.old, {}
    for pieces in (PIECES, 500):
        made = learned.extended(pieces)
        middle = torch.stack([old[part].mean(0) for part in made.parts])
        rows = match_rows(trial.model, made, sample, 0)
        assert rows
        head = torch.cat([old, torch.from_numpy(rows.head)])
        for index, row in rows.stays.items():
            head[index] = torch.from_numpy(row)
        inside = torch.cat([old, torch.from_numpy(rows.inside)])
        found[f"{pieces} pieces"] = {
            "base": untouched,
            "subtoken_mean": trial.score(made.files, torch.cat([old, middle])),
            "matched": trial.score(made.files, inside, head),
            "took": rows.report,
            "tokens_of_held_out_text": {
                "base": sum(map(len, base.encode_fast(trial.held_out))),
                "grown": sum(map(len, made.files.encode_fast(trial.held_out))),
            },
        }
        print(found, flush=True)
    machine = {
        "processor": processor(),
        "precision": "fp32",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip(),
    }
    whole["matched"] = {"machine": machine, **found}
    out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def candidates(trial: Trial, learned: Any, parts: list[list[int]]) -> Any:
    old = trial.old
    mean, count, width = old.mean(0), len(parts), old.shape[1]
    middle = torch.stack([old[part].mean(0) for part in parts])
    yield "subtoken_mean", middle
    yield "mean", mean.expand(count, -1)
    yield "normal", torch.randn(count, width) * 0.02
    yield "first old token", torch.stack([old[part[0]] for part in parts])
    yield "last old token", torch.stack([old[part[-1]] for part in parts])
    for factor in (0.5, 0.9, 1.1):
        yield f"mean + {factor} x (subtoken_mean - mean)", mean + factor * (middle - mean)
    norm = old.norm(dim=1).mean()
    yield "subtoken_mean at the base's norm", middle / middle.norm(dim=1, keepdim=True) * norm
    yield "composition by ridge regression", composed(trial, learned)


def composed(trial: Trial, learned: Any) -> torch.Tensor:
    """Rows by the map that best gives the base's own merged rows from those of their two halves."""
    old, definition = trial.old, learned.base.definition
    ids = definition["model"]["vocab"]
    halves = [merge if isinstance(merge, list) else merge.split(" ") for merge in definition["model"]["merges"]]
    pairs = [(ids[left], ids[right], ids[left + right]) for left, right in halves if left + right in ids]
    mean = old.mean(0)
    left, right, whole = (old[[pair[place] for pair in pairs]] - mean for place in range(3))
    both = torch.cat([left, right], dim=1)
    weights = torch.linalg.solve(both.T @ both + 30 * torch.eye(both.shape[1]), both.T @ whole)
    rows: dict[int, torch.Tensor] = {}
    for one, other, made in learned.found.merges:
        if made >= len(old) and made not in rows:
            pair = torch.cat(
                [rows.get(one, old[min(one, len(old) - 1)]), rows.get(other, old[min(other, len(old) - 1)])]
            )
            rows[made] = mean + (pair - mean.repeat(2)) @ weights
    return torch.stack([rows[index] for index in sorted(rows)])


def distil(trial: Trial, texts: list[str], characters: int, share: float) -> Any:
    """(passes, rows, CPU seconds). share: of the directions of the final states, the least used ones."""
    began, old, inner = time.process_time(), trial.old, trial.model.model
    whole = "\n".join(texts)[:characters]
    examples, states = [], []
    for begin in range(0, len(whole), CHUNK):
        new = trial.made.files.encode_fast([whole[begin : begin + CHUNK]])[0]
        as_old, ends = [0], [0]
        for token in new:
            as_old += trial.made.parts[token - len(old)] if token >= len(old) else [token]
            ends.append(len(as_old) - 1)
        with torch.no_grad():
            out = inner(torch.tensor([as_old]), output_hidden_states=True, use_cache=False)
        examples.append((torch.tensor([0, *new]), inner.norm(out.hidden_states[LAYERS][0, ends])))
        states.append(out.last_hidden_state[0])
    used = torch.cat(states)
    _, directions = torch.linalg.eigh(used.T @ used)
    free = directions[:, : int(share * old.shape[1])]
    start = torch.stack([old[part].mean(0) for part in trial.made.parts])
    moved = torch.zeros(len(start), free.shape[1], requires_grad=True)
    optimizer, layers = torch.optim.Adam([moved], lr=2e-3), inner.layers
    for epoch in range(1, 4):
        random.Random(epoch).shuffle(examples)
        for ids, wanted in examples:
            inner.layers = layers[:LAYERS]
            given = inner(
                inputs_embeds=embedding(ids[None], torch.cat([old, start + moved @ free.T])), use_cache=False
            ).last_hidden_state[0]
            inner.layers = layers
            new = ids >= len(old)
            optimizer.zero_grad()
            ((given - wanted)[new].square().mean() / wanted[new].square().mean()).backward()
            optimizer.step()
        yield epoch, (start + moved @ free.T).detach(), time.process_time() - began


if __name__ == "__main__":
    main()
