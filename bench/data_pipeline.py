"""Data preparation: peak memory and speed of each step on growing texts, and recall of near duplicates.

    python bench/data_pipeline.py --text zh_docs.txt --tokenizer SMOLLM2_FOLDER --out bench/results/data_pipeline.json
    python bench/data_pipeline.py --text zh_docs.txt --tokenizer SMOLLM2_FOLDER --sizes 2048        # once, unattended

The text is repeated with variation (every repetition maps its Chinese characters by another permutation, so that no
repetition is a duplicate of another) until it has SIZE million bytes, one paragraph a line. Each size runs in its
own process. A step's figure is million bytes of that text per CPU second of one process; memory is the process's peak.
Near duplicates: paragraphs of at least 100 characters, a fifth of them copied with 5 % of the characters changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).resolve().parents[1] / "src"
FIRST, LAST = 0x4E00, 0x9FA5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512], help="million bytes")
    parser.add_argument("--out")
    parser.add_argument("--step", type=int, help="one size in this process (internal)")
    args = parser.parse_args()
    if args.step:
        print(json.dumps(measure(args, args.step)))
        return
    runs = []
    for size in args.sizes:
        command = [sys.executable, __file__, "--text", args.text, "--tokenizer", args.tokenizer, "--step", str(size)]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(json.dumps(runs[-1]), flush=True)
    near = near_duplicates(Path(args.text))
    print(json.dumps(near))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "what": "steps of the data pipeline on repeated Chinese text, one process",
        "runs": runs,
        "near_duplicates": near,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in ("numpy", "tokenizers", "transformers")},
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write_text(source: Path, target: Path, size: int) -> None:
    """Write repetitions with permuted Chinese characters: lengths and repetition inside a text stay the same."""
    lines = source.read_text(encoding="utf-8")
    written = turn = 0
    with target.open("w", encoding="utf-8") as stream:
        while written < size:
            codes = list(range(FIRST, LAST + 1))
            if turn:
                random.Random(turn).shuffle(codes)
            text = lines.translate(dict(zip(range(FIRST, LAST + 1), codes, strict=True)))
            for line in text.splitlines(keepends=True):
                written += stream.write(line) and len(line.encode())
                if written >= size:
                    break
            turn += 1


def measure(args: argparse.Namespace, size: int) -> dict[str, Any]:
    from tongwen.data import input_parts, prepare_steps, token_store
    from tongwen.data.clean import Cleaner
    from tongwen.data.encode_documents import encode_documents
    from tongwen.data.encoder import Encoder
    from tongwen.data.ledger import Ledger
    from tongwen.data.reader import read_rows
    from tongwen.model.loading.locate import locate
    from tongwen.model.loading.tokenizer import load_tokenizer
    from tongwen.recipe.data import Prepare

    out: dict[str, Any] = {"million_bytes": size, "mb_per_cpu_second": {}, "peak_mb": {}}

    def step(name: str, work: Callable[[], Any], full: int = size) -> Any:
        began = time.process_time()
        result = work()
        out["mb_per_cpu_second"][name] = round(full / (time.process_time() - began), 2)
        out["peak_mb"][name] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return result

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_text(Path(args.text), place / "text.txt", size * 1_000_000)
        section = Prepare.model_validate(
            {"documents": [{"path": str(place / "text.txt"), "records": "line"}], "held_out": 100.0}
        )
        parts = input_parts.list_parts(section, lambda path, tell: path, print)
        (place / "parts").mkdir()
        few = place / "few.txt"
        write_text(Path(args.text), few, 16_000_000)  # reading and cleaning by themselves, on a part
        source = parts[0].source
        step("read", lambda: sum(1 for _ in read_rows(few, source, lambda _: None)), 16)
        alone = dataclasses.replace(parts[0], file=few)
        step("read and clean", lambda: sum(1 for _ in prepare_steps.iter_rows(alone, section, Cleaner(section.clean, "documents"), lambda _: None)), 16)  # fmt: skip
        step("read, clean, sign, write", lambda: prepare_steps.scan(parts[0], section, place, lambda _: None))
        step("compare", lambda: prepare_steps.compare(parts, section, 42, place))
        step("settle", lambda: prepare_steps.settle(parts[0], parts, section, place))
        tables = prepare_steps.join(parts, section, place)
        out["rows"] = {"in": tables["documents"]["in"]["rows"], "kept": tables["documents"]["kept"]["rows"]}
        tokenizer = load_tokenizer(locate(args.tokenizer))
        encoder, ledger = Encoder(tokenizer), Ledger("rows", "tokens")
        writer = token_store.Writer(place / "tokens", len(tokenizer))

        def encode() -> None:
            texts = prepare_steps.load_records(place / "documents.jsonl")
            for batch in encode_documents(texts, encoder, tokenizer.eos_token_id, 1024, ledger):  # type: ignore[arg-type]
                writer.add(batch, ledger, [])
            writer.close()

        kept = (place / "documents.jsonl").stat().st_size / 1e6
        step("encode", encode, int(kept))
        out["tokens"] = writer.tokens
        out["peak_mb"]["whole"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return out


def near_duplicates(text: Path) -> dict[str, Any]:
    sys.path.insert(0, str(SOURCE))
    from tongwen.data import dedup

    rng = random.Random(1)
    lines = {dedup.fold(line): line for line in text.read_text(encoding="utf-8").splitlines() if len(line) >= 100}
    documents = [line for folded, line in lines.items() if len(folded) >= 100]
    originals, characters = len(documents), sorted(set("".join(documents[:500])))
    planted = []
    for index in rng.sample(range(originals), originals // 5):
        copy = list(documents[index])
        for place in rng.sample(range(len(copy)), round(0.05 * len(copy))):
            copy[place] = rng.choice(characters)
        planted.append((index, len(documents)))
        documents.append("".join(copy))
    began = time.process_time()
    folded = [dedup.fold(document) for document in documents]
    table = np.stack([dedup.signature(one) for one in folded])
    signed = time.process_time() - began
    threshold = 0.6
    gone = np.zeros(len(folded), bool)
    found = dedup.find_near(lambda band: table[:, band].copy(), gone, folded.__getitem__, threshold)
    roots = list(range(len(folded)))

    def root(index: int) -> int:
        while roots[index] != index:
            index = roots[index]
        return index

    for index, other in found.items():
        roots[root(index)] = root(other)
    above = [dedup.jaccard(folded[one], folded[other]) >= threshold for one, other in found.items()]
    size = sum(len(document.encode()) for document in documents) / 1e6
    return {
        "documents": originals,
        "planted": len(planted),
        "threshold": threshold,
        "recall_of_planted": round(sum(root(one) == root(other) for one, other in planted) / len(planted), 4),
        "reported_pairs": len(found),
        "reported_above_threshold": round(sum(above) / max(1, len(above)), 4),
        "mb_per_cpu_second": round(size / signed, 2),
    }


if __name__ == "__main__":
    main()
