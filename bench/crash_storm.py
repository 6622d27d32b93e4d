"""A storm of crashes: a training killed again and again must end as if nothing had happened, to the bit.

    python bench/crash_storm.py --out bench/results/crash_storm.json        (or: make crash-storm)

torch is imported once; every trial is a fork that runs the real command (`tongwen run`) on a tiny model, on one thread of a
CPU. Parts: SIGKILL at random moments, one in four aimed into a commit, for a full fine-tune and for LoRA with dropout, and
fewer for phases, for early stopping over batches of tokens, and for two processes that die together; the same with whole
processes; every state-changing system call of one save killed once, and failed once with EIO (by strace: what the kernel
sees, whichever library calls it), also of one that drops the checkpoint before; flipped bits in committed checkpoints;
changed recipes; and the same kills against transformers' own Trainer, which must fail, or this harness would be blind.
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
# Thirteen words that decide the result, one of each kind.
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
    """How a child ended. killed: by us; in_commit: while it was saving; saves: seconds of each whole save."""

    code: int
    killed: bool = False
    in_commit: bool = False
    saves: list[float] = field(default_factory=list)


def forked(
    work: Callable[[], Any], log: Path, kill: Callable[[int, int], bool], trainer: type = PlannedTrainer
) -> Outcome:
    """Run `work` in a child, and kill it as soon as kill(its pid, saves that it has begun) says so."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        os.setpgid(0, 0)
        tqdm.set_lock(threading.RLock())  # the one that forks share, a killed one would keep
        _speak_into(log)
        _announce_saves(trainer, lambda mark: os.write(writer, mark))
        try:
            os._exit(work() or 0)
        except BaseException as error:  # a fork must not come back
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(99)
    os.close(writer)
    with suppress(OSError):  # whoever comes first; it may be gone already
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


def _speak_into(log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1, encoding="utf-8")


def _announce_saves(trainer: type, tell_first: Callable[[bytes], Any]) -> None:
    save = trainer._save_checkpoint

    def told(self: Any, *arguments: Any, **options: Any) -> None:
        tell = tell_first if distributed.is_main_process() else len
        tell(b"(")
        save(self, *arguments, **options)
        tell(b")")

    trainer._save_checkpoint = told


def never(child: int, begun: int) -> bool:
    return False


def after_cpu_seconds(limit: float) -> Callable[[int, int], bool]:
    """CPU seconds of the child, so that a busy machine does not move the moment."""

    def kill(child: int, begun: int) -> bool:
        try:
            return time.clock_gettime((~child << 3) | 2) >= limit  # CPUCLOCK_SCHED of another process
        except OSError:
            return False

    return kill


def inside_save(number: int, seconds: float) -> Callable[[int, int], bool]:
    """So long after its n-th save has begun."""
    since: list[float] = []

    def kill(child: int, begun: int) -> bool:
        if begun >= number and not since:
            since.append(time.monotonic() + seconds)
        return bool(since) and time.monotonic() >= since[0]

    return kill


def in_two(command: list[str]) -> int:
    """As a launcher starts it: this process and another one."""
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


class Ground:
    """A folder with a tiny model, data and, for each of RUNS, one whose data are prepared."""

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

    def run(self, method: str, *words: str) -> int:
        command = ["run", str(self.recipe(method)), *words]
        return in_two(command) if method == "processes" and not words else cli.main(command)

    def reset(self, method: str) -> None:
        shutil.rmtree(self.out(method), ignore_errors=True)
        shutil.copytree(self.folder / f"{method}.prepared", self.out(method))

    def result(self, method: str) -> tuple[str, list[float]]:
        """What must be equal: the bytes of the weights, and every logged loss."""
        done = self.out(method) / ("pretrain" if method == "phases" else "sft")
        weights = artifact.fingerprint_hashes(
            {file.name: artifact.hash_file(file) for file in done.glob("*.safetensors")}
        )
        return weights, [json.loads(line)["loss"] for line in (done / "metrics.jsonl").read_text().splitlines()]


def storm(ground: Ground, method: str, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill a run again and again until it is done, and begin the next, until there were enough kills."""
    ground.reset(method)
    before = os.times().children_user
    whole = forked(lambda: ground.run(method), ground.log, never)
    seconds = os.times().children_user - before
    wanted = ground.result(method)
    found: Counter[str] = Counter(kills=0, inside_a_commit=0, runs=0, diverged=0, hand_repairs=0)
    while found["kills"] < kills:
        ground.reset(method)
        for attempt in range(1000):
            if attempt > 12:
                kill = never
            elif found["inside_a_commit"] < 0.3 * (found["kills"] + 1):
                number = chance.randint(1, STEPS // EVERY if attempt == 0 else 1)
                kill = inside_save(number, chance.uniform(0, median(whole.saves)))
            else:
                kill = after_cpu_seconds(chance.uniform(0.02, 1.1) * seconds)
            outcome = forked(lambda: ground.run(method), ground.log, kill)
            if not outcome.killed:
                break
            found["kills"] += 1
            found["inside_a_commit"] += outcome.in_commit
        found["runs"] += 1
        found["hand_repairs"] += outcome.code != 0
        found["diverged"] += outcome.code == 0 and ground.result(method) != wanted
        print(method, dict(found), flush=True)
    return {**found, "cpu_seconds_of_a_whole_run": round(seconds, 2)}


def by_the_command_line(ground: Ground, kills: int, chance: random.Random) -> dict[str, Any]:
    """Whole processes, as a user starts them."""
    command = [sys.executable, "-m", "tongwen", "run", str(ground.recipe("lora"))]
    log = ground.log.open("a")
    ground.reset("lora")
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=log, stderr=log)
    seconds, wanted = time.monotonic() - began, ground.result("lora")
    found: Counter[str] = Counter(kills=0, runs=0, diverged=0, hand_repairs=0)
    while found["kills"] < kills:
        ground.reset("lora")
        for attempt in range(4):
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                process.wait(None if attempt == 3 else chance.uniform(0.3, 1.0) * seconds)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                found["kills"] += 1
        found["runs"] += 1
        found["hand_repairs"] += process.returncode != 0
        found["diverged"] += process.returncode == 0 and ground.result("lora") != wanted
        print("command line", dict(found), flush=True)
    return dict(found)


def every_call(ground: Ground, method: str, chosen: slice = slice(None), keep: int = 2) -> dict[str, Any]:
    """One save under strace: each call that changes something in the run's folder is the last one once, and fails once.
    keep: how many checkpoints stay; 1: the save also drops the one before."""
    short = (f"sft.stop_after={2 * EVERY} steps", f"sft.keep_checkpoints={keep}")
    ground.reset(method)
    assert forked(lambda: ground.run(method, *short), ground.log, never).code == 0
    wanted = ground.result(method)
    ground.reset(method)
    before = inside_save(2, 0.0)
    assert forked(
        lambda: ground.run(method, *short), ground.log, before
    ).killed  # one checkpoint is there, none is being written
    snapshot = ground.folder / "snapshot"
    shutil.copytree(ground.out(method), snapshot)
    trace = ground.folder / "trace.txt"

    def attempt(inject: str) -> int:
        shutil.rmtree(ground.out(method))
        shutil.copytree(snapshot, ground.out(method))
        return _traced(lambda: ground.run(method, *short), ground.log, trace, inject)

    attempt("")
    points = _changing_calls(trace, str(ground.out(method)))
    found: Counter[str] = Counter(calls=len(points), killed=0, killed_exact=0, failed=0, failed_exact=0)
    codes: Counter[str] = Counter()
    for call, number in points[chosen]:
        for kind, how in (("killed", "signal=KILL"), ("failed", "error=EIO")):
            code = attempt(f"{call}:{how}:when={number}")
            codes[f"{kind} {code}"] += 1
            found[kind] += 1
            done = forked(lambda: ground.run(method, *short), ground.log, never)
            found[f"{kind}_exact"] += done.code == 0 and ground.result(method) == wanted
        print("system calls", dict(found), flush=True)
    kinds = Counter(call for call, _ in points)
    shutil.rmtree(snapshot)
    return {**found, "by_call": dict(kinds), "exit_codes": dict(codes)}


def _traced(work: Callable[[], int], log: Path, trace: Path, inject: str) -> int:
    """A child whose first save is watched by strace; returns its exit code, negative for a signal."""
    child = os.fork()
    if not child:
        _speak_into(log)
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
    os.waitpid(child, os.WUNTRACED)
    command = ["strace", "-f", "-y", "-s0", "-o", str(trace), "-p", str(child), "-e", f"trace={CALLS}"]
    tracer = subprocess.Popen([*command, *(["-e", f"inject={inject}"] if inject else [])], stderr=subprocess.PIPE)
    assert tracer.stderr and b"attached" in tracer.stderr.readline()
    os.kill(child, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.wait()
    return code


def _changing_calls(trace: Path, folder: str) -> list[tuple[str, int]]:
    """(call, its number among the calls of that name) of everything in the save that changes the folder."""
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


def flipped_bits(ground: Ground, flips: int, chance: random.Random) -> dict[str, int]:
    """One bit of one file of a committed checkpoint: is it noticed?"""
    found: Counter[str] = Counter(flips=0, detected=0)
    for method in FLIPPED:
        ground.reset(method)
        forked(lambda method=method: ground.run(method), ground.log, never)
        checkpoints = sorted((ground.out(method) / "sft" / "checkpoints").glob("checkpoint-*"))
        assert all(damage(path) is None for path in checkpoints)
        for _ in range(flips // len(FLIPPED)):
            checkpoint = chance.choice(checkpoints)
            file = chance.choice([file for file in checkpoint.rglob("*") if file.is_file()])
            place, bit = chance.randrange(file.stat().st_size), 1 << chance.randrange(8)
            for expected in (True, False):  # flipped, and back
                whole = bytearray(file.read_bytes())
                whole[place] ^= bit
                file.write_bytes(whole)
                if expected:
                    found["flips"] += 1
                    found["detected"] += damage(checkpoint) is not None
            assert damage(checkpoint) is None
    return dict(found)


def changed_recipes(ground: Ground) -> dict[str, Any]:
    """An interrupted run, and a command that says something else: refused with both values, and nothing is touched."""
    ground.reset("lora")
    assert forked(lambda: ground.run("lora"), ground.log, inside_save(3, 0.0)).killed
    found: dict[str, Any] = {"changes": len(CHANGES), "refused": 0, "accepted": []}

    def state() -> tuple[str, str]:
        out = ground.out("lora")
        return (out / "recipe.yaml").read_text(), artifact.fingerprint_files(artifact.partial_of(out / "sft"))

    for change in CHANGES:
        before = state()
        said = ground.folder / "said.txt"
        said.unlink(missing_ok=True)
        code = forked(lambda change=change: ground.run("lora", change), said, never).code
        refused = code == 2 and "→" in said.read_text() and before == state()
        found["refused"] += refused
        if not refused:
            found["accepted"].append(change)
    return found


def plain_trainer(ground: Ground, kills: int, chance: random.Random) -> dict[str, Any]:
    """transformers' own save under the same kills: what `resume_from_checkpoint` makes of it."""
    from transformers import LlamaForCausalLM

    out = ground.folder / "plain"
    rows = [{"input_ids": torch.arange(8) + row, "labels": torch.arange(8) + row} for row in range(STEPS)]

    def work() -> int:
        torch.manual_seed(0)
        model = LlamaForCausalLM.from_pretrained(str(ground.model), attention_dropout=0.1)
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
        trainer.save_model(str(ground.folder / "plain.done"))
        return 0

    def result() -> dict[str, bytes]:
        return {name: part.numpy().tobytes() for name, part in tensors(ground.folder / "plain.done").items()}

    shutil.rmtree(out, ignore_errors=True)
    whole = forked(work, ground.log, never, Trainer)
    assert whole.code == 0
    wanted = result()
    found: Counter[str] = Counter(kills_inside_a_save=0, hand_repairs=0, diverged=0)
    while found["kills_inside_a_save"] < kills:
        shutil.rmtree(out)
        kill = inside_save(chance.randint(1, STEPS // EVERY), chance.uniform(0, median(whole.saves)))
        outcome = forked(work, ground.log, kill, Trainer)
        if outcome.killed and outcome.in_commit:
            found["kills_inside_a_save"] += 1
            again = forked(work, ground.log, never, Trainer)
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
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(chosen.out.read_text()) if chosen.out and chosen.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        for part in chosen.parts or PARTS:
            began, chance = time.monotonic(), random.Random(f"{chosen.seed} {part}")
            result = PARTS[part](ground, chosen.kills, chance)
            minutes = round((time.monotonic() - began) / 60, 1)
            found[part] = {**result, "seed": chosen.seed, "minutes": minutes, "commit": commit()}
            print(part, json.dumps(found[part]), flush=True)
            if chosen.out:
                chosen.out.write_text(json.dumps({**found, **machine()}, indent=1) + "\n", encoding="utf-8")


PARTS: dict[str, Callable[[Ground, int, random.Random], dict[str, Any]]] = {
    "changed_recipes": lambda ground, kills, chance: changed_recipes(ground),
    "flipped_bits": lambda ground, kills, chance: flipped_bits(ground, 400, chance),
    "plain_trainer": lambda ground, kills, chance: plain_trainer(ground, 40, chance),
    "system_calls": lambda ground, kills, chance: every_call(ground, "lora"),
    "system_calls_full": lambda ground, kills, chance: every_call(ground, "full", keep=1),
    "full": lambda ground, kills, chance: storm(ground, "full", kills, chance),
    "lora": lambda ground, kills, chance: storm(ground, "lora", kills, chance),
    "phases": lambda ground, kills, chance: storm(ground, "phases", kills // 4, chance),
    "patience": lambda ground, kills, chance: storm(ground, "patience", kills // 4, chance),
    "processes": lambda ground, kills, chance: storm(ground, "processes", kills // 4, chance),
    "command_line": lambda ground, kills, chance: by_the_command_line(ground, 10, chance),
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
