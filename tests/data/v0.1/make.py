"""Regenerate this folder: interrupted and finished runs of version 0.1, and its other files.

    python tests/data/v0.1/make.py FOLDER

It was run at commit 995d1c5, on a CPU. FOLDER must not exist. Every path is relative to it, so that it can lie anywhere.
A command is killed when it has done enough. One that ends before is an error: run this again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

MTIME = 1_700_000_000  # when every file here was changed last: git keeps no times, and some records name them
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NEEDLESS = ("report.html", "loss.png", "*.lock")  # what no command resumes from
EXPECTED = ("*.safetensors", "metrics.jsonl")  # what is compared of a run that was never stopped

RECIPES = {
    "sft": """
name: sft
base: base
out: sft
prepare: {dialogues: dialogues.jsonl, held_out: 4}
sft:
  template: chatml
  adapter: {rank: 2, dropout: 0.1}
  max_length: 160
  batch_size: 4
  micro_batch_tokens: 256
  learning_rate: 1e-3
  stop_after: 10 steps
  save_every: 4
  evaluate_every: 2
  samples: 1
  precision: fp32
merge: {}
""",
    "pretrain": """
name: pretrain
base: base
out: pretrain
prepare: {documents: documents.jsonl, held_out: 8, dedup: {documents: 'off'}}
pretrain:
  train: full
  documents: concatenated
  max_length: 64
  batch_tokens: 256
  micro_batch_tokens: 128
  learning_rate: 1e-3
  schedule: wsd
  stop_after: 12 steps
  save_every: 3
  keep_checkpoints: 1
  evaluate_every: 4
  samples: 1
  precision: fp32
""",
    "phases": """
name: phases
base: base
out: phases
prepare: {documents: documents.jsonl, held_out: 8, dedup: {documents: 'off'}}
vocab: {pieces: 8, pad_to_multiple: 1}
pretrain:
  phases: [{train: new_rows, stop_after: 4 steps}, {train: lora+embeddings, stop_after: 8 steps}]
  adapter: {rank: 2}
  max_length: 64
  batch_size: 4
  micro_batch_tokens: 128
  learning_rate: 1e-3
  save_every: 2
  keep_checkpoints: 1
  samples: 1
  precision: fp32
""",
    "pieces": """
name: pieces
base: base
out: pieces
prepare: {documents: texts/*.jsonl, held_out: 4, dedup: {documents: 'off'}}
""",
    "encode": """
name: encode
base: base
out: encode
prepare: {dialogues: many.jsonl.gz, held_out: 2, dedup: {dialogues: 'off'}}
sft: {template: chatml, max_length: 64, stop_after: 1 steps, micro_batch_tokens: 128, samples: 0, precision: fp32}
""",
    "synthesize": """
name: synthesize
base: base
out: synthesize
synthesize: {endpoint: http://127.0.0.1:1/v1, model: m, method: topics, rows: 6, concurrency: 1}
""",
    "hub": """
name: hub
base: base
out: hub
prepare: {dialogues: hub:tiny/rows, held_out: 4}
""",
}


def documents(count: int) -> list[dict[str, str]]:
    """Texts of different lengths; every fourth is English."""
    return [
        {"text": f"The quick brown fox number {number} jumps over the lazy dog. " * (1 + number % 2)}
        if number % 4 == 0
        else {"text": f"第{number}天，月亮自己不会发光，它反射太阳的光。" * (1 + number % 3)}
        for number in range(count)
    ]


def dialogues(count: int) -> list[dict[str, str]]:
    """Questions with answers of different lengths."""
    return [
        {
            "instruction": f"问题{number}：你好吗？",
            "input": "",
            "output": "今天天气很好。" * (1 + number % 3) + str(number),
        }
        for number in range(count)
    ]


def make_base(folder: Path) -> None:
    """A Llama of 15,000 weights, with a byte-level tokenizer that knows ChatML's tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    english = [row["text"] for row in documents(40)[::4]]  # what Chinese needs, the stage `vocab` will find
    backend.train_from_iterator(english, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=TOKENS[2], pad_token=TOKENS[2], bos_token=TOKENS[1]
    )
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,  # so large that it does not only repeat what it reads
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))


def write_rows(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class Quiet(BaseHTTPRequestHandler):
    """A local server without a log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None: ...

    def say(self, body: bytes, kind: str, status: int = 200, length: int = -1, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


class Endpoint(Quiet):
    """OpenAI's streamed chat: to each prompt the same answer always, one that no other prompt gets."""

    requests: list[str]

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        self.requests.append(prompt)
        drawn = hashlib.sha256(prompt.encode()).digest()
        characters = "".join(chr(0x4E00 + 80 * byte) for byte in drawn)
        text = json.dumps(
            {"items": [{"instruction": characters[:12], "input": "", "output": characters}]}, ensure_ascii=False
        )
        told = [
            {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}},
        ]
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        lines = [f"data: {json.dumps({**chunk, **one}, ensure_ascii=False)}\n\n" for one in told]
        self.say("".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream")


class Hub(Quiet):
    """A hub with the model tiny/model and the data set tiny/rows. Of `broken` only the first half ever comes."""

    requests: list[str]
    files: dict[str, dict[str, bytes]]
    broken = ""
    commit = "c0ffee" + "0" * 34

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.requests.append(f"{path} {self.headers.get('Range', '')}".strip())
        if listed := re.fullmatch(r"/api/(?:model|dataset)s/(tiny/\w+)(?:/revision/.+)?", path):
            siblings = [
                {
                    "rfilename": name,
                    "size": len(body),
                    "blobId": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest(),
                }
                for name, body in self.files[listed[1]].items()
            ]
            told = {"id": listed[1], "sha": self.commit, "siblings": siblings}
            return self.say(json.dumps(told).encode(), "application/json")
        found = re.fullmatch(r"/(?:datasets/)?(tiny/\w+)/resolve/[^/]+/(.+)", path)
        if found is None:
            return self.say(b"", "text/plain", 404)
        whole = self.files[found[1]][found[2]]
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        body = whole[begin : len(whole) // 2] if found[2] == self.broken else whole[begin:]
        self.close_connection = len(body) < len(whole) - begin
        ranges = {"Content_Range": f"bytes {begin}-{len(whole) - 1}/{len(whole)}"} if begin else {}
        return self.say(body, "application/octet-stream", 206 if begin else 200, len(whole) - begin, **ranges)


@contextmanager
def serving(handler: type[Quiet], **attributes: Any) -> Iterator[tuple[str, list[str]]]:
    """(the address of such a server, its requests)"""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (handler,), {**attributes, "requests": requests}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def hub_files(folder: Path) -> dict[str, dict[str, bytes]]:
    """What the hub holds."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return {
        "tiny/model": {name: (folder / "base" / name).read_bytes() for name in names},
        "tiny/rows": {"rows.jsonl": (folder / "dialogues.jsonl").read_bytes()},
    }


class RunRecorder:
    """The folder, and the commands that are run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "TONGWEN_LANG": "en",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def start(self, *argv: str, **environment: str) -> subprocess.Popen[bytes]:
        self.set_equal_mtimes()
        command = [sys.executable, "-m", "tongwen", *argv]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment | environment, stdin=subprocess.PIPE)

    def set_equal_mtimes(self) -> None:
        """Give every file the same time."""
        for file in self.folder.rglob("*"):
            os.utime(file, (MTIME, MTIME))

    def run(self, *argv: str, code: int = 0, typed: str = "", **environment: str) -> None:
        process = self.start(*argv, **environment)
        process.communicate(typed.encode())
        if process.returncode != code:
            raise SystemExit(f"{argv}: exit code {process.returncode} instead of {code}")

    def kill(self, *argv: str, when: Callable[[], bool], by: int = signal.SIGKILL, **environment: str) -> None:
        """Run a command until it has done enough."""
        process = self.start(*argv, **environment)
        while process.poll() is None and not when():
            time.sleep(0.0005)
        process.send_signal(by)
        process.wait()
        if process.returncode not in (-by, 130):
            raise SystemExit(f"{argv}: it ended before it was stopped, with exit code {process.returncode}")

    def lines(self, name: str) -> int:
        """Whole lines of the files of such a name."""
        return sum(file.read_bytes().count(b"\n") for file in self.folder.glob(name))

    def keep(self, run: str, stage: str, name: str, patterns: Sequence[str] = EXPECTED) -> None:
        """Of a stage that was never stopped, what is compared; the rest of that run goes."""
        target = self.folder / "expected" / name
        target.mkdir(parents=True)
        for pattern in patterns:
            for file in (self.folder / run / stage).glob(pattern):
                shutil.copyfile(file, target / file.name)
        shutil.rmtree(self.folder / run)


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    make_base(folder / "base")
    write_rows(folder / "documents.jsonl", documents(48))
    write_rows(folder / "dialogues.jsonl", dialogues(28))
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text.lstrip(), encoding="utf-8")
    recorder = RunRecorder(folder)
    make_trainings(recorder)
    make_pieces(recorder)
    make_encoded(recorder)
    make_answers(recorder)
    make_synthesized(recorder)
    make_fetched(recorder)
    make_saved_chats(recorder)
    clear(folder)


def make_trainings(recorder: RunRecorder) -> None:
    """Each training stage stopped and never stopped; what was never stopped by sft stays as a finished run, with its merge."""
    recorder.run("run", "sft.yaml", "out=finished")
    recorder.kill("run", "sft.yaml", when=lambda: recorder.lines("sft/sft.partial/metrics.jsonl") >= 6)
    recorder.run("run", "pretrain.yaml", "out=whole")
    recorder.keep("whole", "pretrain", "pretrain")
    metrics = "pretrain/pretrain.partial/metrics.jsonl"
    recorder.kill("run", "pretrain.yaml", when=lambda: recorder.lines(metrics) >= 5, by=signal.SIGTERM)
    recorder.run("run", "phases.yaml", "out=whole")
    recorder.keep("whole", "pretrain", "phases")
    recorder.kill("run", "phases.yaml", when=lambda: recorder.lines("phases/pretrain.partial/metrics.jsonl") >= 7)


def make_pieces(recorder: RunRecorder) -> None:
    """`prepare`, killed among its files."""
    (recorder.folder / "texts").mkdir()
    for number in range(8):
        write_rows(recorder.folder / "texts" / f"{number:02}.jsonl", documents(20 + number))
    recorder.run("run", "pieces.yaml", "out=whole")
    recorder.keep("whole", "prepare", "pieces", ("*.jsonl",))
    scans = "pieces/prepare.partial/parts/*/scan.json"
    recorder.kill("run", "pieces.yaml", when=lambda: len(list(recorder.folder.glob(scans))) > 2)


def make_encoded(recorder: RunRecorder) -> None:
    """The encoding of dialogues, killed after its first batch of a thousand."""
    many = [{"instruction": str(number), "output": "一"} for number in range(1100)]
    with gzip.open(recorder.folder / "many.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in many)
    recorder.run("run", "encode.yaml", "out=whole")
    recorder.keep("whole", "tokens/sft", "encode", ("*/store.json",))
    recorder.kill("run", "encode.yaml", when=lambda: recorder.lines("encode/tokens/sft/*.partial/journal.jsonl") >= 1)


def make_answers(recorder: RunRecorder) -> None:
    """A conversation that was saved; answers to a file and to an examination, killed among them."""
    recorder.run("chat", "finished/merge", "--max-new-tokens", "8", typed="你好\n今天天气很好。\n/save chat.json\n")
    questions = [{"prompt": row["instruction"]} for row in dialogues(12)]
    write_rows(recorder.folder / "prompts.jsonl", questions)
    argv = ["generate", "--model", "base", "--template", "chatml", "--prompts", "prompts.jsonl"]
    argv += ["--max-new-tokens", "40", "--batch-size", "1"]
    recorder.run(*argv, "--out", "expected/answers.jsonl")
    recorder.kill(*argv, "--out", "answers.jsonl", when=lambda: recorder.lines("answers.jsonl.answers") >= 4)
    argv = ["evaluate", "--model", "base", "--template", "chatml", "--task", "exact_match", "--limit", "12"]
    argv += ["--data", "dialogues.jsonl", "--max-new-tokens", "20", "--batch-size", "1", "--out", "scores"]
    recorder.kill(*argv, when=lambda: recorder.lines("scores.answers/*.jsonl") >= 4)


def make_synthesized(recorder: RunRecorder) -> None:
    """Replies that were paid for, up to a cap."""
    with serving(Endpoint) as (url, _):
        argv = ["run", "synthesize.yaml", f"synthesize.endpoint={url}/v1"]
        recorder.run(*argv, "out=whole")
        recorder.keep("whole", "synthesize", "synthesize", ("dialogues.jsonl",))
        recorder.run(*argv, "synthesize.at_most={requests: 3}", code=5)


def make_fetched(recorder: RunRecorder) -> None:
    """A data set in the cache, and a model of which half has come."""
    with serving(Hub, files=hub_files(recorder.folder), broken="model.safetensors") as (url, _):
        there = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "none"}
        recorder.run("run", "hub.yaml", **there)
        shutil.rmtree(recorder.folder / "hub")
        half = len((recorder.folder / "base" / "model.safetensors").read_bytes()) // 2
        parts = recorder.folder / "fetched.partial" / ".fetch"
        argv = ["fetch", "tiny/model", "--kind", "model", "--out", "fetched"]
        recorder.kill(*argv, when=lambda: any(part.stat().st_size == half for part in parts.glob("*.part")), **there)


def make_saved_chats(recorder: RunRecorder) -> None:
    """A conversation as the page gives it to the browser to keep."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    argv = ["chat", "base", "--template", "chatml", "--web", "--port"]
    process = recorder.start(*argv, address.rpartition(":")[2], TONGWEN_API_KEY="a-token-that-is-long-enough")
    with httpx.Client(
        base_url=address, headers={"authorization": "Bearer a-token-that-is-long-enough", "origin": address}
    ) as web:
        while process.poll() is None:
            with suppress(httpx.TransportError):
                events = web.get("/en/config").json()["dependencies"]
                break
            time.sleep(0.2)
        else:
            raise SystemExit("chat --web: it ended before it was asked")
        keep = next(one["id"] for one in events if one["api_name"] == "_keep")
        turns = [("user", "你好 <b> & `<i>`"), ("assistant", "今天天气很好。")]
        board = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        body = {"data": [[], 0, board, [], "简短"], "fn_index": keep, "session_hash": "v01"}
        kept = web.post("/en/gradio_api/run/predict", json=body).json()["data"][0]
    process.terminate()
    process.wait()
    (recorder.folder / "shelf.json").write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def clear(folder: Path) -> None:
    """Delete what no command resumes from."""
    for pattern in NEEDLESS:
        for file in folder.rglob(pattern):
            file.unlink()
    shutil.rmtree(folder / "finished" / "sft" / "checkpoints")
    shutil.rmtree(folder / "finished" / "tokens")
    shutil.rmtree(folder / "cache" / "matplotlib")


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
