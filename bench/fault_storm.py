"""Failing disks and killed parents: nothing is lost, no original is touched, the same command continues, no process stays.

    python bench/fault_storm.py --out bench/results/fault_storm.json        (or: make storms)

Faults: strace lets each system call of a command that changes a file fail once with EIO and once with ENOSPC. Then the same
command runs again without a fault, and its result must be that of an undisturbed one.
Kills: SIGKILL at a random moment for the parent of a training in two processes; five seconds later none of them may run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # not bench/, whose gguf.py is another

from bench.crash_storm import trace_child  # noqa: E402
from bench.sandbox import Input, Sandbox, changed_files, run_command, snapshot  # noqa: E402

from tongwen.core import artifact  # noqa: E402

CALLS = "openat,write,writev,pwrite64,fsync,fdatasync,ftruncate,fallocate,copy_file_range,rename,renameat,renameat2,link,linkat,mkdir,unlink,unlinkat,rmdir"
COMMANDS = {
    "merge": ["merge", "--base", "base", "--adapter", "adapter", "--out", "out"],
    "export": ["run", "export.yaml", "--from", "export"],
    "convert": ["convert", "base", "--to", "gguf", "--out", "out"],
    "generate": ["generate", "--model", "base", "--template", "chatml", "--prompts", "prompts.txt", "--out", "out/answers.jsonl", "--max-new-tokens", "2"],
    "vocab": ["tokenizer", "extend", "--base", "base", "--corpus", "prompts.txt", "--pieces", "1", "--out", "out"],
}  # fmt: skip
CHANGING = ("manifest.json", "report.json", "recipe.yaml")  # hold times
ORPHAN_SECONDS = 5.0


class Storm:
    """One command in a fresh folder, again and again."""

    def __init__(self, sandbox: Sandbox, name: str) -> None:
        self.sandbox, self.command, self.trace = sandbox, COMMANDS[name], sandbox.log.with_name("trace.txt")
        self.given = Input(self.command, {"base/x": b"", "adapter/x": b""})
        if name == "export":
            self.given = Input(self.command, self._exporting())

    def _exporting(self) -> dict[str, bytes]:
        recipe = (self.sandbox.models / "run" / "recipe.yaml").read_bytes()
        return {"export.yaml": recipe + b"export: {formats: [gguf]}\n", "out/x": b""}

    def fresh(self) -> dict[str, Any]:
        self.sandbox.prepare(self.given)
        return snapshot(self.sandbox.work)

    def run(self, inject: str | None = None) -> int:
        """Run the command in a fork. inject: a fault for strace; "" only traces; None runs without it."""
        child = os.fork()
        if not child:
            os.chdir(self.sandbox.work)
            if inject is not None:
                os.kill(os.getpid(), signal.SIGSTOP)
            self.sandbox.run_child(lambda: run_command(self.command))
        if inject is None:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return trace_child(child, self.trace, CALLS, inject)

    def points(self) -> list[tuple[str, int]]:
        """Return (call, its number among the calls of that name) for each that changes a file in the folder."""
        seen: Counter[str] = Counter()
        found = []
        for line in self.trace.read_text().splitlines():
            match = re.match(r"\d+\s+(\w+)\((.*)", line)
            if not match:
                continue
            call, rest = match.groups()
            seen[call] += 1
            reads = call == "openat" and not re.search(r"O_(WRONLY|RDWR|CREAT)", rest)
            if str(self.sandbox.work) in rest and not reads and self.sandbox.log.name not in rest:
                found.append((call, seen[call]))
        return found

    def result(self) -> dict[str, str]:
        """Return a hash of each file of the output, without those that hold times."""
        out = self.sandbox.work / "out"
        files = [out] if out.is_file() else sorted(file for file in out.rglob("*") if file.is_file())
        return {
            str(file.relative_to(self.sandbox.work)): artifact.hash_file(file)
            for file in files
            if file.name not in CHANGING
        }

    def text(self) -> str:
        return self.sandbox.log.read_text(encoding="utf-8", errors="replace")


def faults(sandbox: Sandbox, name: str, every: int) -> dict[str, Any]:
    """Let every `every`-th changing call of a command fail, once with each error."""
    storm = Storm(sandbox, name)
    storm.fresh()
    assert storm.run() == 0, storm.text()
    wanted = storm.result()
    storm.fresh()
    assert storm.run("") == 0
    points = storm.points()
    found: Counter[str] = Counter(
        calls=len(points), faults=0, tracebacks=0, originals_touched=0, not_continued=0, other_result=0
    )
    codes: Counter[str] = Counter()
    examples: dict[str, Any] = {}
    for call, number in points[::every]:
        for error in ("EIO", "ENOSPC"):
            before = storm.fresh()
            code = storm.run(f"{call}:error={error}:when={number}")
            codes[str(code)] += 1
            said = storm.text()
            touched = changed_files(before, snapshot(sandbox.work))
            again = storm.run()
            wrong = {
                "tracebacks": "Traceback" in said or code not in (0, 5),
                "originals_touched": bool(touched or changed_files(before, snapshot(sandbox.work))),
                "not_continued": again != 0 and not (again == 2 and storm.result() == wanted),  # done, and so refused
                "other_result": (again == 0 or code == 0) and storm.result() != wanted,
            }
            found["faults"] += 1
            for kind, is_wrong in wrong.items():
                found[kind] += is_wrong
                if is_wrong:
                    examples.setdefault(kind, {"call": f"{call} {number} {error}", "code": code, "again": again, "said": said[-1500:], "said_again": storm.text()[-1500:]})  # fmt: skip
    print(name, dict(found), flush=True)
    kinds = Counter(call for call, _number in points)
    return {**found, "by_call": dict(kinds), "exit_codes": dict(codes), **({"examples": examples} if examples else {})}


def marked(mark: str) -> list[int]:
    """Return the processes with this mark in their environment."""
    found = []
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        try:
            if (
                mark.encode() in (place / "environ").read_bytes()
                and "Z" not in (place / "stat").read_text().rpartition(")")[2][:3]
            ):
                found.append(int(place.name))
        except OSError:
            continue
    return found


def orphans(sandbox: Sandbox, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill the parent of two processes at random moments; count those that still run after five seconds."""
    found: Counter[str] = Counter(kills=0, with_two_processes=0, orphans=0)
    longest = 0.0
    seconds = 0.0
    log = sandbox.log.open("w")
    while found["kills"] < kills:
        sandbox.prepare(Input([], {"out/x": b""}))
        shutil.rmtree(sandbox.work / "out")
        mark = f"STORM={os.getpid()}-{found['kills']}-{rng.random()}"
        environment = {**os.environ, "STORM": mark.partition("=")[2]}
        command = [sys.executable, "-m", "tongwen", "run", "recipe.yaml", "--devices", "2"]
        began = time.monotonic()
        parent = subprocess.Popen(command, cwd=sandbox.work, env=environment, stdout=log, stderr=log)
        if not seconds:
            assert parent.wait() == 0, sandbox.log.read_text()
            seconds = time.monotonic() - began
            continue
        try:
            parent.wait(rng.uniform(0.1, 1.0) * seconds)
            continue  # it was done before the kill
        except subprocess.TimeoutExpired:
            pass
        found["with_two_processes"] += len(marked(mark)) >= 3
        parent.kill()
        parent.wait()
        found["kills"] += 1
        killed = time.monotonic()
        while (left := marked(mark)) and time.monotonic() < killed + ORPHAN_SECONDS:
            time.sleep(0.02)
        longest = max(longest, time.monotonic() - killed)
        found["orphans"] += len(left)
        for process in left:
            os.kill(process, signal.SIGKILL)
    print("orphans", dict(found), flush=True)
    return {**found, "longest_seconds": round(longest, 2), "seconds_of_a_whole_run": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every n-th system call")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--parts", nargs="*", default=[*COMMANDS, "orphans"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out.absolute() if args.out else None
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    known = json.loads(out.read_text()) if out and out.is_file() else {}
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    known |= {"cpus": os.cpu_count(), "python": sys.version.split()[0], "versions": artifact.versions()}
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        sandbox = Sandbox(Path(folder))
        for part in args.parts:
            made = orphans(sandbox, args.kills, random.Random(0)) if part == "orphans" else {"every": args.every, **faults(sandbox, part, args.every)}  # fmt: skip
            known[part] = {"commit": commit, **made}
            if out:
                out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
