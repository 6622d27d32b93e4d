"""Every architecture in the installed transformers, end to end, through the commands that a user types.

    python bench/families.py --out bench/results/families.json        (or: make families; half an hour on one core)

Each gets a tiny random model of its own class (tests/architectures.py) and a process of its own, forked from one that has
imported everything: `check`; `run` (audit, LoRA, merge); the same run stopped after its first step and continued;
`generate`; `convert --to gguf` where the family's GGUF is known. The judges know nothing of tongwen: peft's live model,
plain transformers for the merged folder and its greedy text, llama.cpp for the GGUF file.
An architecture is trained, refused with a message (by `check`, or by the run before it trains), or failed. A traceback
is a failure, and so is a refusal of what was trained. Each outcome holds the commit at which it was measured, so that a
few can be measured again.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in place of this folder, whose gguf.py would hide the library
os.environ["OMP_NUM_THREADS"] = "1"

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tests.architectures import class_name, kinds, make_base, plain  # noqa: E402
from tests.conftest import dialogues, write_recipe, write_rows  # noqa: E402

from tongwen.cli.main import main as tongwen  # noqa: E402
from tongwen.core import console  # noqa: E402
from tongwen.export.gguf_metadata import ARCHITECTURES  # noqa: E402
from tongwen.train.metrics import MetricsCallback  # noqa: E402

SECONDS = 60  # of CPU time, for one architecture
MEMORY = 6 << 30  # bytes: a size that was not shrunk must not fill the machine
STEPS, NEW_TOKENS, MERGE_LIMIT = 3, 8, 1e-5
PROMPT = "问题1：你好吗？"
SHOWN = 400  # characters of a message


class Refused(Exception):
    """A command ended with an error of its own: (command, exit code, message)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all without any")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = earlier(args.out) if args.kinds else {}
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # pictures of losses would take a tenth of the time
    with tempfile.TemporaryDirectory() as folder:  # import and warm up once, for all forks
        try_kind("llama", Path(folder))
    gc.freeze()  # a collection in a fork would walk through everything that was imported
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    for kind in args.kinds or kinds():
        one = in_a_fork(kind) | {"commit": commit.stdout.strip()}
        results[kind] = one
        print(f"{kind}: {' · '.join(str(value) for value in one.values())}", flush=True)
        if args.out:  # now: a run that is stopped keeps what it measured
            report = report_of(results)
            args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(counts_of(results), indent=1))


def report_of(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": "tiny random models of every architecture in transformers, trained with LoRA, continued, merged, asked",
        "machine": f"{platform.processor() or platform.machine()}, one thread",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "cpu_seconds": round(sum(one["cpu_seconds"] for one in results.values())),
        "of": len(kinds()),
        "counts": counts_of(results),
        "architectures": dict(sorted(results.items())),
    }


def earlier(file: Path | None) -> dict[str, Any]:
    """Return the results in a file, of which a run for some architectures replaces these alone."""
    found: dict[str, Any] = (
        json.loads(file.read_text(encoding="utf-8"))["architectures"] if file and file.is_file() else {}
    )
    return found


def counts_of(results: dict[str, dict[str, Any]]) -> dict[str, int]:
    outcomes = Counter(one["outcome"] for one in results.values())
    trained = [one for one in results.values() if one["outcome"] == "trained"]
    return {
        **dict(sorted(outcomes.items())),
        "tried": sum(outcomes.values()) - outcomes["not built"],
        "packed": sum(one["batches"] == "packed" for one in trained),
        "resumed to the bit": sum(one["resumed"] for one in trained),
        "merged within 1e-5": sum(one["merge_difference"] <= MERGE_LIMIT for one in trained),
        "generated as transformers": sum(one["generated"] == "same" for one in trained),
        "GGUF as transformers": sum(one["gguf"] == "same" for one in trained),
    }


def in_a_fork(kind: str) -> dict[str, Any]:
    """Return the outcome of one architecture, from a child process with a time limit."""
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            try:
                answer.write_text(json.dumps(try_kind(kind, Path(place))), encoding="utf-8")
            finally:
                os._exit(0)  # a fork must never return
        _child, status, usage = os.wait4(child, 0)
        if answer.is_file():
            outcome: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        else:
            slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
            outcome = {
                "outcome": "failed",
                "message": f"more than {SECONDS} s of CPU time" if slow else f"died, status {status}",
            }
    return outcome | {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}


def try_kind(kind: str, folder: Path) -> dict[str, Any]:
    """Run the whole chain for one architecture in `folder`, and return its outcome."""
    facts: dict[str, Any] = {"class": class_name(kind)}
    try:
        base = make_base(folder / "base", kind)
        plain(base)
    except Exception as error:
        return facts | {"outcome": "not built", "message": said(error)}
    try:
        return {"outcome": "trained"} | facts | trained(base, folder)
    except Refused as refusal:
        command, code, message = refusal.args
        in_time = code in range(2, 7) and not (folder / "out" / "sft" / "manifest.json").is_file()
        message = message.replace(f"{folder}/", "")
        return {"outcome": f"refused by {command}" if in_time else "failed"} | facts | {"message": message}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            {"outcome": "failed"} | facts | {"message": f"{said(error)} ({Path(where.filename).name}:{where.lineno})"}
        )


def trained(base: Path, folder: Path) -> dict[str, Any]:
    """Train, stop and continue, merge, generate, export. Raises Refused when a command refuses."""
    recipe = write_recipe(folder, base, rows=dialogues(16), sft=f", stop_after: {STEPS} steps")
    recipe.write_text(recipe.read_text().replace("samples: 1", "samples: 0"))  # `generate` shows the same
    run("check", recipe)
    out = run("run", recipe)
    packed = "cannot see each other" in out
    reason = "" if packed else next(iter(re.findall(r"trains in padded batches: (.*)", out)), "")
    whole, stopped = folder / "out", folder / "stopped"
    with stopping_after(1):
        try:
            run("run", recipe, f"out={stopped}", "--until", "sft")
        except Refused as refusal:
            if refusal.args[1] != 130:
                raise
    run("run", recipe, f"out={stopped}", "--until", "sft")
    same = all(file_of(whole, name) == file_of(stopped, name) for name in ("adapter_model.safetensors",))
    difference, learned = merge_difference(base, whole)
    facts = {
        "batches": "packed" if packed else "padded",
        "why_padded": reason,
        "resumed": same and losses(whole) == losses(stopped),
    }
    facts |= {"merge_difference": difference, "learned": learned, "generated": generated(whole / "merge", folder)}
    kind = json.loads((base / "config.json").read_text())["model_type"]
    return facts | {"gguf": exported(whole / "merge", folder) if kind in ARCHITECTURES else "—"}


def run(command: str, *arguments: object) -> str:
    """Run a command in this process, and return what it printed. Raises Refused unless it succeeds."""
    from rich.console import Console

    console.SCREEN.json, console.SCREEN.console = False, Console(highlight=False, width=1000)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = tongwen([command, *map(str, arguments)])
    if code:
        raise Refused(command, code, err.getvalue().strip()[-SHOWN:])
    return out.getvalue() + err.getvalue()


class stopping_after:  # noqa: N801 (used like a function)
    """Send this process a stop signal in this optimizer step, as Slurm or Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step, self.usual = step, MetricsCallback.on_pre_optimizer_step

    def __enter__(self) -> None:
        def stop(callback: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.usual(callback, args, state, control, **kwargs)
            if state.global_step + 1 == self.step:
                os.kill(os.getpid(), signal.SIGTERM)

        MetricsCallback.on_pre_optimizer_step = stop  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        MetricsCallback.on_pre_optimizer_step = self.usual  # type: ignore[method-assign]


def file_of(run_folder: Path, name: str) -> bytes:
    return (run_folder / "sft" / name).read_bytes()


def losses(run_folder: Path) -> list[float]:
    lines = (run_folder / "sft" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["loss"] for line in lines]
    assert len(found) == STEPS, "a step is missing"
    return found


def merge_difference(base: Path, run_folder: Path) -> tuple[float, float]:
    """Return how far the merged model's logits are from those of peft's live one, and those from the base's."""
    ids = torch.randint(3, 400, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, merged = (plain(folder)(input_ids=ids).logits for folder in (base, run_folder / "merge"))
        live = peft.PeftModel.from_pretrained(plain(base), str(run_folder / "sft")).eval()(input_ids=ids).logits
    assert not torch.equal(live, before), "the adapter changes nothing"
    return float((merged - live).abs().max()), float((live - before).abs().max())


def generated(model: Path, folder: Path) -> str:
    """Return whether `tongwen generate` writes the greedy text that plain transformers writes."""
    prompts, out = write_rows(folder / "prompts.jsonl", [{"prompt": PROMPT}]), folder / "answers.jsonl"
    run("generate", "--model", model, "--prompts", prompts, "--out", out, "--max-new-tokens", NEW_TOKENS)
    ours = json.loads(out.read_text(encoding="utf-8"))["answer"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = plain(model).generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    theirs = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return "same" if ours.strip() == theirs.rstrip("\ufffd").strip() else f"{ours!r} instead of {theirs!r}"


def exported(model: Path, folder: Path) -> str:
    """Return whether llama.cpp writes the greedy tokens that plain transformers writes, from an exported file."""
    from tests.llamacpp import LlamaCpp

    try:
        run("convert", model, "--to", "gguf", "--quantize", "f32", "--out", folder / "gguf")
    except Refused as refusal:
        return f"refused: {refusal.args[2]}"
    (file,) = (folder / "gguf").glob("*.gguf")
    ids = [5, 9, 30, 7, 200, 41]
    found = LlamaCpp(file, threads=1).greedy(ids, NEW_TOKENS)
    with torch.no_grad():
        expected = plain(model).generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :]
    return "same" if found == expected.tolist()[: len(found)] and found else f"{found} instead of {expected.tolist()}"


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:SHOWN]}"


if __name__ == "__main__":
    main()
