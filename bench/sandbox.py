"""Run one input in a fork on a tiny model, and say which law it broke.

The laws: an exit code of the contract, no traceback, at most 30 seconds of CPU time, at most 3 GB, no file changed outside the
output, no terminal escape in the output; and a request is never answered with a status of 500 or more.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: F401 (imported here, once for all forks)
import transformers  # noqa: F401
import yaml
from tests.conftest import byte_level_tokenizer, dialogues, tiny_llama, write_recipe, write_rows

import tongwen
from tongwen.cli import main as cli
from tongwen.cli import parser as cli_parser

SECONDS, MEMORY = 30, 3 << 30  # the limits of one input: CPU time, and resident memory
CODES = {0, 2, 3, 4, 5, 6, 130}
ENDLESS = {
    "serve",
    "web",
    "demo",
    "fetch",
}  # listen, train for minutes, or ask a network: only their arguments are read
RECIPE = {
    "name": "tiny", "base": "base", "out": "out", "seed": 1,
    "prepare": {"dialogues": ["data.jsonl"], "held_out": 4},
    "sft": {"template": "chatml", "adapter": {"rank": 4}, "max_length": 256, "batch_size": 4, "learning_rate": 1e-2, "samples": 0, "precision": "fp32", "stop_after": "1 steps"},
}  # fmt: skip


@dataclass
class Input:
    """Files to write into a folder, and the command that reads them. gone: files that are removed first."""

    command: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    lines: str = ""  # typed at the terminal
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    gone: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        shown = {name: repr(content[:2000]) for name, content in self.files.items()}
        return {"command": self.command, "files": shown, "lines": self.lines, "requests": [repr(one) for one in self.requests]}  # fmt: skip


@dataclass
class Outcome:
    """How a fork ended. fault: the law that it broke, with the place; "" for none."""

    code: int
    seconds: float
    memory: int
    fault: str = ""
    text: str = ""


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def recipe_with(**changes: Any) -> dict[str, bytes]:
    return {"recipe.yaml": yaml.safe_dump({**RECIPE, **changes}).encode()}


def import_all() -> None:
    """Import every module of the package here, once for all forks."""
    for module in pkgutil.walk_packages(tongwen.__path__, "tongwen."):
        with suppress(Exception):  # of an extra that is not installed
            importlib.import_module(module.name)
    with suppress(ImportError):
        importlib.import_module("starlette.testclient")
    gc.freeze()  # a collection would copy the parent's pages


class Sandbox:
    """A folder with a tiny model, its adapter and a finished run, copied anew for each input."""

    def __init__(self, folder: Path) -> None:
        self.models, self.work, self.log = folder / "models", folder / "work", folder / "log.txt"
        import_all()
        base = self.models / "base"
        tiny_llama(base, len(byte_level_tokenizer(base)))
        run = self.models / "run"
        run.mkdir()
        os.chdir(run)
        shutil.copytree(base, run / "base")
        write_recipe(run, Path("base"), dialogues(12), sft=", save_every: 1, stop_after: 2 steps")
        file = run / "recipe.yaml"
        file.write_text(file.read_text().replace(f"{run}/", ""))
        code = self._fork(lambda: cli.main(["run", "recipe.yaml"]))
        assert code == 0, self.log.read_text()
        shutil.copytree(run / "out" / "sft", self.models / "adapter", ignore=shutil.ignore_patterns("checkpoints"))
        config = json.loads((self.models / "adapter" / "adapter_config.json").read_text())
        (self.models / "adapter" / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": "base"})
        )
        for name in ("manifest.json", "report.json", "report.html", "metrics.jsonl"):
            (self.models / "adapter" / name).unlink(missing_ok=True)
        write_rows(self.models / "data.jsonl", dialogues(12))
        (self.models / "prompts.txt").write_text("鲲鹏展翅，鲲鹏展翅\n" * 2, encoding="utf-8")
        (self.models / "recipe.yaml").write_bytes(recipe_with()["recipe.yaml"])
        self.backend: Any = None

    def _fork(self, work: Callable[[], Any]) -> int:
        child = os.fork()
        if not child:
            self._redirect("")
            os._exit(work() or 0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _redirect(self, lines: str) -> None:
        out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (
            os.fdopen(os.dup(out), "w", buffering=1, encoding="utf-8", errors="backslashreplace") for _ in range(2)
        )
        reader, writer = os.pipe()
        os.write(writer, lines.encode("utf-8", "surrogatepass"))
        os.close(writer)
        os.dup2(reader, 0)
        sys.stdin = os.fdopen(0, "r", encoding="utf-8", errors="replace")

    def prepare(self, given_input: Input) -> None:
        """Lay the folder of an input out."""
        os.chdir(self.models)
        shutil.rmtree(self.work, ignore_errors=True)
        has_run = any(name.startswith("out/") for name in given_input.files)  # a finished run, to continue
        if has_run:
            shutil.copytree(self.models / "run", self.work, symlinks=True)
            shutil.copy(self.models / "prompts.txt", self.work)
        else:
            self.work.mkdir()
            for name in ("base", "adapter", "run"):
                if name in "".join(given_input.files) or any(name in word for word in given_input.command):
                    shutil.copytree(self.models / name, self.work / name)
            for name in ("data.jsonl", "prompts.txt", "recipe.yaml"):
                shutil.copy(self.models / name, self.work)
            if not (self.work / "base").exists():
                (self.work / "base").symlink_to(self.models / "base")
        for name in given_input.gone:
            (self.work / name).unlink()
        for name, content in given_input.files.items():
            file = self.work / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def run(self, given_input: Input) -> Outcome:
        self.prepare(given_input)
        before = snapshot(self.work)
        started = time.monotonic()
        child = os.fork()
        if not child:
            self.run_child(
                lambda: self._answer(given_input) if given_input.requests else run_command(given_input.command),
                given_input.lines,
            )
        status, usage = self._wait(child, started + 4 * SECONDS)
        code = os.waitstatus_to_exitcode(status)
        seconds = usage.ru_utime + usage.ru_stime
        text = self.log.read_text(encoding="utf-8", errors="replace")
        outcome = Outcome(code, seconds, usage.ru_maxrss << 10, text=text)
        outcome.fault = fault_of(outcome) or changed_files(before, snapshot(self.work))
        return outcome

    def _wait(self, child: int, deadline: float) -> tuple[int, Any]:
        while True:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                return status, usage
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                _, status, usage = os.wait4(child, 0)
                return status, usage
            time.sleep(0.002)

    def run_child(self, work: Callable[[], int], lines: str = "") -> None:
        """Do the work under the limits and leave the process with its exit code."""
        code = 99
        try:
            os.chdir(self.work)
            os.setpgid(0, 0)
            self._redirect(lines)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 2))
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            code = work()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _answer(self, given_input: Input) -> int:
        """Send the requests to the real routes; a status of 500 or more, or an answer that is no JSON, is a fault."""
        from starlette.testclient import TestClient

        from tongwen.serving import openai_api

        client = TestClient(openai_api.make_app(self.backend, 4), raise_server_exceptions=True)
        for path, body in given_input.requests:
            answer = client.post(path, content=body)
            is_event = answer.headers.get("content-type", "").startswith("text/event-stream")
            if (
                answer.status_code >= 500
                or (not is_event and answer.json() is None)
                or (is_event and "server_error" in answer.text)
            ):
                print(f"Traceback: status {answer.status_code}: {answer.text[:300]}")
                return 1
        return 0

    def open_backend(self) -> None:
        """Load the tiny model once for all requests."""
        from tongwen.commands.serve import make_backend
        from tongwen.infer.generation import Sampling
        from tongwen.workflows.chat_model import open_chat_model

        os.chdir(self.models)
        model = open_chat_model("base", [], "chatml", "off", weights="full", rows=1)
        self.backend = make_backend(model, "m", {**vars(Sampling()), "max_new_tokens": 2})


def run_command(command: list[str]) -> int:
    if command[:1] and command[0] in ENDLESS:
        cli_parser.parse(command)
        return 0
    return cli.main(command)


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return the state of each file that no command may touch: all outside `out`."""
    found = {}
    for root, folders, files in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if not name.startswith("out")]
            files = [name for name in files if not name.startswith("out")]
        for name in [*files, *folders]:
            path = Path(root, name)
            facts = path.lstat()
            is_file = not path.is_dir() or path.is_symlink()
            found[str(path.relative_to(folder))] = (
                facts.st_ino,
                *((facts.st_size, facts.st_mtime_ns) if is_file else ()),
            )
    return found


def changed_files(before: dict[str, Any], after: dict[str, Any]) -> str:
    touched = sorted(name for name in before if before[name] != after.get(name))
    return f"changed: {touched[:3]}" if touched else ""


def fault_of(outcome: Outcome) -> str:
    """Return the broken law with its place; "" when all hold."""
    if outcome.code == -signal.SIGXCPU or outcome.seconds > SECONDS:
        return "takes too long"
    if outcome.code == -signal.SIGKILL:
        return "hangs"
    if "Traceback" in outcome.text or outcome.code not in CODES:
        return f"exit {outcome.code}: {place_of(outcome.text)}"
    if outcome.memory > MEMORY or "out of memory" in outcome.text:
        return f"takes {outcome.memory >> 20} MB: {place_of(outcome.text)}"
    if "\x1b" in outcome.text or "\x9b" in outcome.text:
        return "a terminal escape in the output"
    return ""


def place_of(text: str) -> str:
    """Return the last line of our code in a traceback, and the kind of its error: what makes two faults the same."""
    frames = [line.strip() for line in text.splitlines() if line.strip().startswith("File ")]
    ours = [line for line in frames if "/tongwen/" in line]
    last = text.strip().splitlines()[-1:] or [""]
    error = last[0].split(":")[0][:60]
    return f"{(ours or frames or [''])[-1].rpartition('/tongwen/')[2]} {error}"
