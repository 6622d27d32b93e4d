"""Crash tests: a training killed again and again must end bit-identical to one that was never killed.

    python bench/crash_storm.py --out bench/results/crash_storm.json        (or: make crash-storm)

torch is imported once; every trial is a fork that runs the real command (`tongwen run`) on a tiny model, on one CPU thread.
Parts:
- SIGKILL at random moments, one in four inside a commit, for a full fine-tune and for LoRA with dropout; fewer for phases, for
  early stopping with batch_tokens, and for two processes that die together; the same with whole processes
- each state-changing system call of one save killed once, and failed once with EIO (by strace, so for every library); also for
  a save that deletes the previous checkpoint
- flipped bits in committed checkpoints
- changed recipes
- the same kills against transformers' Trainer, which must fail, else this harness would be blind
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from tests.conftest import byte_level_tokenizer, dialogues, tensors, tiny_llama, write_rows  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

from tongwen.cli import main as cli  # noqa: E402
from tongwen.core import artifact, distributed  # noqa: E402
from tongwen.stages import prepare, pretrain, sft  # noqa: E402, F401
from tongwen.train.checkpoints import damage  # noqa: E402
from tongwen.train.trainer import PlannedTrainer  # noqa: E402
from tongwen.workflows import pipeline  # noqa: E402, F401
from tongwen.workflows.training import job  # noqa: E402, F401 (imported here, once for all forks)

STEPS, EVERY = 12, 2
SFT = f"sft: {{template: chatml, samples: 0, max_length: 256, precision: fp32, save_every: {EVERY}, micro_batch_tokens: 96, "
LORA = "adapter: {rank: 4, dropout: 0.1}, "
PLAIN = f"batch_size: 4, learning_rate: 1e-3, stop_after: {STEPS} steps}}"
RUNS = {
    "full": SFT + "adapter: {method: full}, " + PLAIN,
    "lora": SFT + LORA + PLAIN,
    "phases": SFT.replace("sft: {template: chatml", "pretrain: {batch_size: 4, learning_rate: 1e-3")
    + LORA
    + "phases: [{train: embeddings, stop_after: 5 steps}, {train: lora+embeddings, stop_after: 7 steps}]}",
    "patience": SFT
    + LORA
    + "batch_tokens: 400, learning_rate: 0.1, stop_after: 40 steps, evaluate_every: 2, patience: 2, keep_checkpoints: 1}",
    "processes": SFT + LORA + PLAIN,
}
# Thirteen settings that affect the result, one of each kind.
CHANGES = (
    "sft.learning_rate=2e-3",
    "sft.weight_decay=0.1",
    "seed=7",
    "sft.batch_size=2",
    "sft.stop_after=14 steps",
    "sft.schedule=linear",
    "sft.warmup=0.5",
    "sft.max_grad_norm=0.5",
    "sft.max_length=128",
    "sft.template=alpaca",
    "sft.learn=everything",
    "sft.precision=bf16",
    "sft.adapter={rank: 8}",
)
FLIPPED = ("full", "lora")
CALLS = "openat,write,writev,pwrite64,fsync,fdatasync,ftruncate,fallocate,rename,renameat,renameat2,mkdir,unlink,unlinkat,rmdir"


@dataclass
class Outcome:
    """How a child ended. killed: by this harness; in_commit: during a save; saves: seconds of each completed save."""

    code: int
    killed: bool = False
    in_commit: bool = False
    saves: list[float] = field(default_factory=list)


def forked(
    work: Callable[[], Any], log: Path, kill: Callable[[int, int], bool], trainer: type = PlannedTrainer
) -> Outcome:
    """Run `work` in a child, and kill it as soon as kill(its pid, number of saves begun) is true."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        os.setpgid(0, 0)
        tqdm.set_lock(threading.RLock())  # a killed fork would keep the shared lock
        _redirect_output(log)
        _report_saves(trainer, lambda mark: os.write(writer, mark))
        try:
            os._exit(work() or 0)
        except BaseException as error:  # a fork must never return
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(99)
    os.close(writer)
    with suppress(OSError):  # parent or child, whichever is first; the child may have ended
        os.setpgid(child, 0)
    outcome, begun, began = Outcome(0), 0, 0.0
    while True:
        if select.select([reader], [], [], 0.002)[0]:
            marks = os.read(reader, 1)
            if not marks:
                break
            outcome.in_commit = marks == b"("
            begun += outcome.in_commit
            began = outcome.saves.append(time.monotonic() - began) or 0.0 if marks == b")" else time.monotonic()
        if not outcome.killed and kill(child, begun):
            os.killpg(child, signal.SIGKILL)
            outcome.killed = True
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    outcome.killed = os.WIFSIGNALED(status)
    outcome.code = os.waitstatus_to_exitcode(status)
    return outcome


def _redirect_output(log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1, encoding="utf-8")


def _report_saves(trainer: type, notify: Callable[[bytes], Any]) -> None:
    save = trainer._save_checkpoint

    def reporting_save(self: Any, *arguments: Any, **options: Any) -> None:
        send = notify if distributed.is_main_process() else len
        send(b"(")
        save(self, *arguments, **options)
        send(b")")

    trainer._save_checkpoint = reporting_save


def never(child: int, begun: int) -> bool:
    return False


def after_cpu_seconds(limit: float) -> Callable[[int, int], bool]:
    """Kill after CPU seconds of the child, so that the load of the machine does not matter."""

    def kill(child: int, begun: int) -> bool:
        try:
            return time.clock_gettime((~child << 3) | 2) >= limit  # CPUCLOCK_SCHED of another process
        except OSError:
            return False

    return kill


def inside_save(number: int, seconds: float) -> Callable[[int, int], bool]:
    """Kill `seconds` after the start of the child's n-th save."""
    since: list[float] = []

    def kill(child: int, begun: int) -> bool:
        if begun >= number and not since:
            since.append(time.monotonic() + seconds)
        return bool(since) and time.monotonic() >= since[0]

    return kill


def in_two(command: list[str]) -> int:
    """Run the command in this process and a second one, as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    other = os.fork()
    rank = "0" if other else "1"
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_PORT=str(port))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    code = cli.main(command)
    if not other:
        os._exit(code)
    return code or os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])


class Sandbox:
    """A folder with a tiny model, data and, for each of RUNS, a folder with prepared data."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        self.model = folder / "model"
        tiny_llama(self.model, len(byte_level_tokenizer(self.model)))
        write_rows(folder / "data.jsonl", dialogues(32))
        write_rows(folder / "text.jsonl", [{"text": f"第 {row} 天，天气很好。" * 3} for row in range(32)])
        for method, section in RUNS.items():
            data = "documents: text.jsonl" if method == "phases" else "dialogues: data.jsonl"
            held_out = 6 if method == "patience" else 0
            self.recipe(method).write_text(
                f"name: {method}\nbase: {self.model}\nout: {self.out(method)}\n"
                f"prepare: {{{data.replace(': ', f': {folder}/')}, held_out: {held_out}}}\n{section}\n"
            )
            assert forked(lambda method=method: self.run(method, "--only", "prepare"), self.log, never).code == 0
            shutil.copytree(self.out(method), folder / f"{method}.prepared")

    def recipe(self, method: str) -> Path:
        return self.folder / f"{method}.yaml"

    def out(self, method: str) -> Path:
        return self.folder / method

    def run(self, method: str, *arguments: str) -> int:
        command = ["run", str(self.recipe(method)), *arguments]
        return in_two(command) if method == "processes" and not arguments else cli.main(command)

    def reset(self, method: str) -> None:
        shutil.rmtree(self.out(method), ignore_errors=True)
        shutil.copytree(self.folder / f"{method}.prepared", self.out(method))

    def result(self, method: str) -> tuple[str, list[float]]:
        """Return what must be equal: a hash of the weights, and every logged loss."""
        done = self.out(method) / ("pretrain" if method == "phases" else "sft")
        weights = artifact.fingerprint_hashes(
            {file.name: artifact.hash_file(file) for file in done.glob("*.safetensors")}
        )
        return weights, [json.loads(line)["loss"] for line in (done / "metrics.jsonl").read_text().splitlines()]


def storm(sandbox: Sandbox, method: str, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill a run again and again until it is done, then start the next, until there were enough kills."""
    sandbox.reset(method)
    before = os.times().children_user
    whole = forked(lambda: sandbox.run(method), sandbox.log, never)
    seconds = os.times().children_user - before
    wanted = sandbox.result(method)
    found: Counter[str] = Counter(kills=0, inside_a_commit=0, runs=0, diverged=0, hand_repairs=0)
    while found["kills"] < kills:
        sandbox.reset(method)
        for attempt in range(1000):
            if attempt > 12:
                kill = never
            elif found["inside_a_commit"] < 0.3 * (found["kills"] + 1):
                number = rng.randint(1, STEPS // EVERY if attempt == 0 else 1)
                kill = inside_save(number, rng.uniform(0, median(whole.saves)))
            else:
                kill = after_cpu_seconds(rng.uniform(0.02, 1.1) * seconds)
            outcome = forked(lambda: sandbox.run(method), sandbox.log, kill)
            if not outcome.killed:
                break
            found["kills"] += 1
            found["inside_a_commit"] += outcome.in_commit
        found["runs"] += 1
        found["hand_repairs"] += outcome.code != 0
        found["diverged"] += outcome.code == 0 and sandbox.result(method) != wanted
        print(method, dict(found), flush=True)
    return {**found, "cpu_seconds_of_a_whole_run": round(seconds, 2)}


def by_the_command_line(sandbox: Sandbox, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill whole processes, started as a user does."""
    command = [sys.executable, "-m", "tongwen", "run", str(sandbox.recipe("lora"))]
    log = sandbox.log.open("a")
    sandbox.reset("lora")
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=log, stderr=log)
    seconds, wanted = time.monotonic() - began, sandbox.result("lora")
    found: Counter[str] = Counter(kills=0, runs=0, diverged=0, hand_repairs=0)
    while found["kills"] < kills:
        sandbox.reset("lora")
        for attempt in range(4):
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                process.wait(None if attempt == 3 else rng.uniform(0.3, 1.0) * seconds)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                found["kills"] += 1
        found["runs"] += 1
        found["hand_repairs"] += process.returncode != 0
        found["diverged"] += process.returncode == 0 and sandbox.result("lora") != wanted
        print("command line", dict(found), flush=True)
    return dict(found)


def every_call(sandbox: Sandbox, method: str, selection: slice = slice(None), keep: int = 2) -> dict[str, Any]:
    """Trace one save; at each call that changes the run's folder kill the run once, and let the call fail once.

    keep: number of checkpoints kept; 1: the save also deletes the previous one
    """
    short = (f"sft.stop_after={2 * EVERY} steps", f"sft.keep_checkpoints={keep}")
    sandbox.reset(method)
    assert forked(lambda: sandbox.run(method, *short), sandbox.log, never).code == 0
    wanted = sandbox.result(method)
    sandbox.reset(method)
    before = inside_save(2, 0.0)
    assert forked(
        lambda: sandbox.run(method, *short), sandbox.log, before
    ).killed  # one checkpoint exists, none is half written
    snapshot = sandbox.folder / "snapshot"
    shutil.copytree(sandbox.out(method), snapshot)
    trace = sandbox.folder / "trace.txt"

    def attempt(inject: str) -> int:
        shutil.rmtree(sandbox.out(method))
        shutil.copytree(snapshot, sandbox.out(method))
        return _traced(lambda: sandbox.run(method, *short), sandbox.log, trace, inject)

    attempt("")
    points = _changing_calls(trace, str(sandbox.out(method)))
    found: Counter[str] = Counter(calls=len(points), killed=0, killed_exact=0, failed=0, failed_exact=0)
    codes: Counter[str] = Counter()
    for call, number in points[selection]:
        for kind, how in (("killed", "signal=KILL"), ("failed", "error=EIO")):
            code = attempt(f"{call}:{how}:when={number}")
            codes[f"{kind} {code}"] += 1
            found[kind] += 1
            done = forked(lambda: sandbox.run(method, *short), sandbox.log, never)
            found[f"{kind}_exact"] += done.code == 0 and sandbox.result(method) == wanted
        print("system calls", dict(found), flush=True)
    kinds = Counter(call for call, _ in points)
    shutil.rmtree(snapshot)
    return {**found, "by_call": dict(kinds), "exit_codes": dict(codes)}


def _traced(work: Callable[[], int], log: Path, trace: Path, inject: str) -> int:
    """Run a child and trace its first save with strace; return its exit code, negative for a signal."""
    child = os.fork()
    if not child:
        _redirect_output(log)
        save = PlannedTrainer._save_checkpoint
        seen: list[int] = []

        def watched(self: Any, *arguments: Any, **options: Any) -> None:
            seen.append(1)
            if len(seen) == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            save(self, *arguments, **options)
            if len(seen) == 1:
                Path("/the save is over").mkdir()

        PlannedTrainer._save_checkpoint = watched  # type: ignore[method-assign]
        try:
            os._exit(work())
        except FileExistsError:
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(99)
    return trace_child(child, trace, CALLS, inject)


def trace_child(child: int, trace: Path, calls: str, inject: str) -> int:
    """Trace a child with strace from where it stops itself; return its exit code, negative for a signal.

    calls: those to trace; inject: a fault for one of them; "" for none.
    """
    os.waitpid(child, os.WUNTRACED)
    command = ["strace", "-f", "-y", "-s0", "-o", str(trace), "-p", str(child), "-e", f"trace={calls}"]
    tracer = subprocess.Popen([*command, *(["-e", f"inject={inject}"] if inject else [])], stderr=subprocess.PIPE)
    assert tracer.stderr and b"attached" in tracer.stderr.readline()
    os.kill(child, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.wait()
    return code


def _changing_calls(trace: Path, folder: str) -> list[tuple[str, int]]:
    """Return (call, its number among the calls of that name) for each call of the save that changes the folder."""
    seen: Counter[str] = Counter()
    points = []
    for line in trace.read_text().splitlines():
        match = re.match(r"\d+\s+(\w+)\((.*)", line)
        if not match:
            continue
        call, rest = match.groups()
        if "the save is over" in rest:
            break
        seen[call] += 1
        reads = call == "openat" and not re.search(r"O_(WRONLY|RDWR|CREAT)", rest)
        if folder in rest and not reads:
            points.append((call, seen[call]))
    return points


def flipped_bits(sandbox: Sandbox, flips: int, rng: random.Random) -> dict[str, int]:
    """Flip one bit of one file of a committed checkpoint; count how often it is detected."""
    found: Counter[str] = Counter(flips=0, detected=0)
    for method in FLIPPED:
        sandbox.reset(method)
        forked(lambda method=method: sandbox.run(method), sandbox.log, never)
        checkpoints = sorted((sandbox.out(method) / "sft" / "checkpoints").glob("checkpoint-*"))
        assert all(damage(path) is None for path in checkpoints)
        for _ in range(flips // len(FLIPPED)):
            checkpoint = rng.choice(checkpoints)
            file = rng.choice([file for file in checkpoint.rglob("*") if file.is_file()])
            place, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
            for expected in (True, False):  # flipped, and back
                whole = bytearray(file.read_bytes())
                whole[place] ^= bit
                file.write_bytes(whole)
                if expected:
                    found["flips"] += 1
                    found["detected"] += damage(checkpoint) is not None
            assert damage(checkpoint) is None
    return dict(found)


def changed_recipes(sandbox: Sandbox) -> dict[str, Any]:
    """Continue an interrupted run with a changed recipe: it must be refused with both values, without any change."""
    sandbox.reset("lora")
    assert forked(lambda: sandbox.run("lora"), sandbox.log, inside_save(3, 0.0)).killed
    found: dict[str, Any] = {"changes": len(CHANGES), "refused": 0, "accepted": []}

    def state() -> tuple[str, str]:
        out = sandbox.out("lora")
        return (out / "recipe.yaml").read_text(), artifact.fingerprint_files(artifact.partial_of(out / "sft"))

    for change in CHANGES:
        before = state()
        output = sandbox.folder / "output.txt"
        output.unlink(missing_ok=True)
        code = forked(lambda change=change: sandbox.run("lora", change), output, never).code
        refused = code == 2 and "→" in output.read_text() and before == state()
        found["refused"] += refused
        if not refused:
            found["accepted"].append(change)
    return found


def plain_trainer(sandbox: Sandbox, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill transformers' own save in the same way, then try `resume_from_checkpoint`."""
    from transformers import LlamaForCausalLM

    out = sandbox.folder / "plain"
    rows = [{"input_ids": torch.arange(8) + row, "labels": torch.arange(8) + row} for row in range(STEPS)]

    def work() -> int:
        torch.manual_seed(0)
        model = LlamaForCausalLM.from_pretrained(str(sandbox.model), attention_dropout=0.1)
        arguments = TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=1,
            max_steps=STEPS,
            save_steps=EVERY,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
        trainer.save_model(str(sandbox.folder / "plain.done"))
        return 0

    def result() -> dict[str, bytes]:
        return {name: part.numpy().tobytes() for name, part in tensors(sandbox.folder / "plain.done").items()}

    shutil.rmtree(out, ignore_errors=True)
    whole = forked(work, sandbox.log, never, Trainer)
    assert whole.code == 0
    wanted = result()
    found: Counter[str] = Counter(kills_inside_a_save=0, hand_repairs=0, diverged=0)
    while found["kills_inside_a_save"] < kills:
        shutil.rmtree(out)
        kill = inside_save(rng.randint(1, STEPS // EVERY), rng.uniform(0, median(whole.saves)))
        outcome = forked(work, sandbox.log, kill, Trainer)
        if outcome.killed and outcome.in_commit:
            found["kills_inside_a_save"] += 1
            again = forked(work, sandbox.log, never, Trainer)
            found["hand_repairs"] += again.code != 0
            found["diverged"] += again.code == 0 and result() != wanted
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of: " + ", ".join(PARTS))
    parser.add_argument(
        "--kills", type=int, default=200, help="of full and of lora, and four times those of the others"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(Path(folder))
        for part in args.parts or PARTS:
            began, rng = time.monotonic(), random.Random(f"{args.seed} {part}")
            result = PARTS[part](sandbox, args.kills, rng)
            minutes = round((time.monotonic() - began) / 60, 1)
            found[part] = {**result, "seed": args.seed, "minutes": minutes, "commit": commit()}
            print(part, json.dumps(found[part]), flush=True)
            if args.out:
                args.out.write_text(json.dumps({**found, **machine()}, indent=1) + "\n", encoding="utf-8")


PARTS: dict[str, Callable[[Sandbox, int, random.Random], dict[str, Any]]] = {
    "changed_recipes": lambda sandbox, kills, rng: changed_recipes(sandbox),
    "flipped_bits": lambda sandbox, kills, rng: flipped_bits(sandbox, 400, rng),
    "plain_trainer": lambda sandbox, kills, rng: plain_trainer(sandbox, 40, rng),
    "system_calls": lambda sandbox, kills, rng: every_call(sandbox, "lora"),
    "system_calls_full": lambda sandbox, kills, rng: every_call(sandbox, "full", keep=1),
    "full": lambda sandbox, kills, rng: storm(sandbox, "full", kills, rng),
    "lora": lambda sandbox, kills, rng: storm(sandbox, "lora", kills, rng),
    "phases": lambda sandbox, kills, rng: storm(sandbox, "phases", kills // 4, rng),
    "patience": lambda sandbox, kills, rng: storm(sandbox, "patience", kills // 4, rng),
    "processes": lambda sandbox, kills, rng: storm(sandbox, "processes", kills // 4, rng),
    "command_line": lambda sandbox, kills, rng: by_the_command_line(sandbox, 10, rng),
}


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()


def machine() -> dict[str, Any]:
    import platform

    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, shared and busy, one thread",
        "python": platform.python_version(),
        "versions": artifact.versions(),
    }


if __name__ == "__main__":
    main()
