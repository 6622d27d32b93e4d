"""From parsed dialogues to stored tokens, side by side: tongwen, the tokenizer library alone, LLaMA-Factory and TRL in turn.

    sh bench/peers/install.sh PEER_VENV
    python bench/encode_rows.py --peer PEER_VENV/bin/python --model SMOLLM2_FOLDER --data alpaca_zh.json \\
        --out bench/results/encode_rows.json

The dialogues are the rows of an Alpaca file, repeated with a counter in the text until there are ROWS of them. They are
parsed before the clock starts (dictionaries for tongwen, the peers' `Dataset.from_list` of them for the peers). The figure is rows per CPU second (user and system, children included) until the
tokens with their mask are on disk: tongwen's token store, the peers' Arrow file. `library` is
`encode_batch_fast` of the tokenizers package on the same rendered texts, in batches of 1,000, and nothing else.
Each contestant runs in its own process, with one tokenizer thread; the median of the rounds is quoted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of the peers' environment")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--peer-rows", type=int, help="rows for the peers, when fewer are to do")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(CONTESTANTS), help="run one contestant in this process (internal)")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(CONTESTANTS[args.only](args, rows_of(args))))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for turn in range(args.rounds):
        for name in CONTESTANTS:
            found[name].append(run(args, name))
            print(turn + 1, f"{name:14s} {found[name][-1]['rows_per_cpu_second']:8.0f} rows per CPU second", flush=True)
        write(args, found)


def run(args: argparse.Namespace, name: str) -> dict[str, Any]:
    ours = name in ("tongwen", "library")
    rows = args.rows if ours else args.peer_rows or args.rows
    command = [sys.executable if ours else args.peer, __file__, "--only", name, "--peer", args.peer]
    command += ["--model", args.model, "--data", args.data, "--rows", str(rows)]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if ours:
        environment["PYTHONPATH"] = str(SOURCE)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def rows_of(args: argparse.Namespace) -> list[dict[str, str]]:
    rows = json.loads(Path(args.data).read_text(encoding="utf-8"))
    out = []
    for number in range(args.rows):
        row = rows[number % len(rows)]
        out.append(
            {**row, "instruction": f"{row['instruction']}（{number}）", "output": f"{row['output']}（{number}）"}
        )
    return out


def measured(rows: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    before = cpu()
    counts = work()
    seconds = cpu() - before
    return {"rows": rows, "cpu_seconds": round(seconds, 2), "rows_per_cpu_second": round(rows / seconds, 1), **counts}


def cpu() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def tongwen(args: argparse.Namespace, rows: list[dict[str, str]]) -> dict[str, Any]:
    from tongwen.data import token_store
    from tongwen.data.encode_dialogues import encode_dialogues
    from tongwen.recipe.training import Sft
    from tongwen.workflows.record_encoders import make_dialogue_encoder

    section = Sft(max_length=4096)
    reader = make_dialogue_encoder(args.model, section)

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            writer = token_store.Writer(Path(folder) / "tokens", len(reader.tokenizer))
            ledger = writer.ledger
            dialogues = iter_dialogues(rows)
            for batch in encode_dialogues(dialogues, reader.template, reader.encoder, section, ledger, print):
                writer.add(batch, ledger, [])
            writer.close()
            return {"tokens": writer.tokens}

    return measured(len(rows), work)


def library(args: argparse.Namespace, rows: list[dict[str, str]]) -> dict[str, Any]:
    from tongwen.recipe.training import Sft
    from tongwen.workflows.record_encoders import make_dialogue_encoder

    reader = make_dialogue_encoder(args.model, Sft())
    texts = [reader.template.samples(one)[0].text for one in iter_dialogues(rows)]

    def work() -> dict[str, Any]:
        tokens = 0
        for begin in range(0, len(texts), 1000):
            for one in reader.encoder.backend.encode_batch_fast(texts[begin : begin + 1000], add_special_tokens=False):
                tokens += len(one)
        return {"tokens": tokens}

    return measured(len(rows), work)


def iter_dialogues(rows: list[dict[str, str]]) -> Iterator[Any]:
    """Read the rows as `prepare` does, with the format recognised row by row."""
    from tongwen.core.records import Origin
    from tongwen.data.formats import read_dialogue, recognise
    from tongwen.recipe.data import SourceConfig

    source = SourceConfig(path="rows")
    for number, row in enumerate(rows, 1):
        yield read_dialogue(row, recognise(row) or "", source, {}, Origin("rows", number))


def llamafactory(args: argparse.Namespace, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Run LLaMA-Factory's `get_dataset` without reading the file: aligning, template, mask and tokens into Arrow."""
    import datasets
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.converter import align_dataset
    from llamafactory.data.loader import _get_preprocessed_dataset
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer, Seq2SeqTrainingArguments

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    arguments = DataArguments(template="chatml", cutoff_len=4096, overwrite_cache=True)
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    parsed = datasets.Dataset.from_list(rows)
    attributes = DatasetAttr("file", dataset_name="bench")

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            training = Seq2SeqTrainingArguments(output_dir=folder, use_cpu=True)
            aligned = align_dataset(parsed, attributes, arguments, training)
            done = _get_preprocessed_dataset(aligned, arguments, training, "sft", template, tokenizer, None)
            done.save_to_disk(f"{folder}/tokens")
            return {"rows_out": len(done)}

    return measured(len(rows), work)


def trl(args: argparse.Namespace, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Run TRL's `SFTTrainer._prepare_dataset` on prompt and completion messages, with the loss on the completion.

    TRL leaves the conversion of Alpaca rows to its users; it is not counted.
    """
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dataset = datasets.Dataset.from_list(
        [
            {
                "prompt": [
                    {"role": "user", "content": row["instruction"] + ("\n" + row["input"] if row["input"] else "")}
                ],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
            for row in rows
        ]
    )

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(output_dir=folder, max_length=4096, use_cpu=True, bf16=False)
            trainer = SFTTrainer.__new__(SFTTrainer)  # without a model: only the data are prepared
            for name in ("_is_vision_dataset", "_is_vlm"):
                setattr(trainer, name, False)
            trainer.completion_only_loss = True
            done = trainer._prepare_dataset(dataset, tokenizer, config, False, None, "train")
            done.save_to_disk(f"{folder}/tokens")
            return {"rows_out": len(done)}

    return measured(len(rows), work)


CONTESTANTS = {"tongwen": tongwen, "library": library, "llamafactory": llamafactory, "trl": trl}


def write(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    medians = {name: statistics.median(one["rows_per_cpu_second"] for one in runs) for name, runs in found.items()}
    command = [args.peer, "-c", "import json; from importlib.metadata import version as v; "]
    command[-1] += (
        "print(json.dumps({n: v(n) for n in ('llamafactory', 'trl', 'transformers', 'datasets', 'tokenizers')}))"
    )
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "what": "rows per CPU second, from parsed dialogues to stored tokens",
        "rows_per_cpu_second": medians,
        "times": {name: round(medians["tongwen"] / value, 2) for name, value in medians.items()},
        "runs": found,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "ours": {name: metadata.version(name) for name in ("transformers", "tokenizers", "numpy")},
            "peers": theirs,
            "python": platform.python_version(),
        },
        "commit": commit.stdout.strip(),
    }
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
