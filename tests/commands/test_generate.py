"""Answers for a file of prompts: the same text by every engine, each prompt once, and in the forms that older projects wrote."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import byte_level_tokenizer, tiny_llama, write_rows
from tongwen.cli.main import main
from tongwen.infer.answer_log import AnswerJournal
from tongwen.infer.generation import PAGE, Sampling, cache_bytes, cache_tokens, make_batches
from tongwen.infer.presets import PRESETS

ROWS = [
    {
        "instruction": f"问题{number}：" + "今天天气很好。" * (number % 4),
        "input": "二" * (number % 2),
        "output": f"答{number}",
    }
    for number in range(7)
]


def read(file: Path) -> Any:
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)


@pytest.mark.sample()
def test_engines_and_batch_sizes_give_the_same_greedy_text(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    argv = ["generate", "--model", chat_model, "--prompts", data, "--template", "chatml", "--max-new-tokens", 12]
    ways = {"one": ["--batch-size", 1], "three": ["--batch-size", 3], "paged": ["--engine", "paged"]}
    found = {}
    for name, way in ways.items():
        code, _, err = tongwen(*argv, *way, "--out", tmp_path / f"{name}.jsonl")
        assert code == 0, err
        found[name] = [row["answer"] for row in read(tmp_path / f"{name}.jsonl")]
    assert found["one"] == found["three"] == found["paged"]
    rows = read(tmp_path / "one.jsonl")
    assert [row["target"] for row in rows] == [row["output"] for row in ROWS]
    assert rows[1]["prompt"] == "问题1：今天天气很好。\n二"


def test_gguf_file_is_generated_by_llama_cpp(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    code, _, err = tongwen("convert", chat_model, "--to", "gguf", "--quantize", "f32", "--out", tmp_path / "gguf")
    assert code == 0, err
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    argv = ["generate", "--prompts", data, "--template", "chatml", "--max-new-tokens", 12]
    assert tongwen(*argv, "--model", chat_model, "--out", tmp_path / "plain.jsonl")[0] == 0
    code, _, err = tongwen(*argv, "--model", file, "--out", tmp_path / "cpp.jsonl")
    assert code == 0, err
    plain, cpp = ([row["answer"] for row in read(tmp_path / f"{name}.jsonl")] for name in ("plain", "cpp"))
    assert sum(one == two for one, two in zip(plain, cpp, strict=True)) >= 5, "its own kernels round otherwise"


def test_output_formats_of_older_projects(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", ROWS[:2])
    argv = ["generate", "--model", chat_model, "--prompts", data, "--template", "chatml", "--preset", "belle"]
    argv += ["--max-new-tokens", 4]
    assert tongwen(*argv, "--form", "belle", "--out", tmp_path / "belle.json")[0] == 0
    belle = read(tmp_path / "belle.json")
    assert [set(row) for row in belle] == [{"input", "predict", "target"}] * 2
    assert belle[0]["input"] == "<|im_start|>user\n问题0：<|im_end|>\n<|im_start|>assistant\n"
    assert belle[0]["target"] == "答0"
    assert tongwen(*argv, "--form", "chinese-llama-alpaca", "--out", tmp_path / "ymcui" / "p.json")[0] == 0
    assert [set(row) for row in read(tmp_path / "ymcui" / "p.json")] == [{"Input", "Output"}] * 2
    kept = read(tmp_path / "ymcui" / "generation_config.json")
    assert kept["beams"] == 4 and kept["max_new_tokens"] == 4, "options override the preset"
    again = [*argv, "--form", "chinese-llama-alpaca", "--out", tmp_path / "ymcui" / "p.json", "--again", "--beams", 2]
    assert tongwen(*again)[0] == 0, "the options beside the answers are its own"
    assert read(tmp_path / "ymcui" / "generation_config.json")["beams"] == 2
    assert read(tmp_path / "ymcui" / "generation_config.json.old-1") == kept
    (tmp_path / "ymcui" / "generation_config.json").write_text('{"beams": 2}')
    assert tongwen(*again)[0] == 2, "these are somebody's"


def test_killed_run_resumes_and_refuses_other_settings(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.answers"
    argv = ["generate", "--model", chat_model, "--prompts", data, "--template", "chatml"]
    argv = [*map(str, argv), "--max-new-tokens", "80", "--batch-size", "1", "--out", str(out)]
    child = os.fork()
    if child == 0:
        with contextlib.redirect_stdout(io.StringIO()):
            os._exit(main(argv))
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 3:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    kept = dict(json.loads(line) for line in journal.read_text().splitlines()[1:] if line.endswith("]"))
    assert 2 <= len(kept) < len(ROWS) and not out.exists()
    code, _, err = tongwen(*argv, "--temperature", "0.5")
    assert code == 2 and "sampling.temperature: 0.0 → 0.5" in err and "--again" in err
    first = next(iter(kept))
    marked = journal.read_text().replace(json.dumps([first, kept[first]], ensure_ascii=False), f'[{first}, "kept"]')
    journal.write_text(marked + '[9, "torn', encoding="utf-8")
    code, stdout, err = tongwen(*argv)
    assert code == 0, err
    assert f"{len(kept)} answers already exist" in stdout
    assert read(out)[first]["answer"] == "kept", "it was not generated again"
    assert not journal.exists()
    code, _, err = tongwen(*argv)
    assert code == 2 and "--again" in err
    assert tongwen(*argv, "--again")[0] == 0 and (tmp_path / "out.jsonl.old-1").is_file()


def test_journal_without_a_complete_line_restarts(tmp_path: Path) -> None:
    file = tmp_path / "j"
    file.write_text('{"a"')
    journal = AnswerJournal(file, {"a": 1}, "")
    journal.add(0, "二\n")
    journal.close()
    assert AnswerJournal(file, {"a": 1}, "").answers == {0: "二\n"}


def test_batches_hold_each_prompt_once_within_the_token_limit(chat_model: Path) -> None:
    lengths = [5, 90, 7, 30, 31, 8, 200, 6]
    batches = list(make_batches(lengths, Sampling(max_new_tokens=10), 4, 200))
    assert sorted(place for batch in batches for place in batch) == list(range(8))
    assert batches[0] == [6], "longer than the room: alone"
    for batch in batches[1:]:
        assert len(batch) <= 4 and (max(lengths[place] for place in batch) + 10) * len(batch) <= 200
    assert all(len(batch) == 1 for batch in make_batches([90, 80], Sampling(max_new_tokens=10, beams=2), 4, 200))
    from tongwen.workflows.chat_model import open_chat_model

    model = open_chat_model(str(chat_model), template="completion", precision="fp32").generator.model
    assert cache_tokens(model) == (1 << 30) // (2 * 2 * 2 * 8 * 4), "keys and values, layers, heads, width, bytes"
    assert cache_tokens(model) > PAGE
    from transformers import Gemma4TextConfig, Mamba2Config

    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_key_value_heads": 2}
    by_layer = Gemma4TextConfig(**layers, head_dim=16, global_head_dim=32, num_kv_shared_layers=0)
    assert cache_bytes(by_layer, 4) == sum(2 * 2 * width * 4 for width in (16, 32))
    assert cache_bytes(Mamba2Config(), 4) == 1, "its state does not grow"


def test_presets_match_the_published_settings() -> None:
    wanted = Sampling().override(**PRESETS["chinese-llama-alpaca"]).generation_kwargs()
    assert wanted == {
        "max_new_tokens": 400, "do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.3
    }  # fmt: skip
    assert Sampling().override(**PRESETS["belle"]).generation_kwargs() == {
        "max_new_tokens": 512, "do_sample": False, "num_beams": 4, "early_stopping": True, "min_new_tokens": 1
    }  # fmt: skip
    assert (
        Sampling().override(**PRESETS["chatglm"]).top_p == 0.7
        and Sampling().override(**PRESETS["chinese-llm-chat"]).top_k == 50
    )


class FakeEndpoint(http.server.BaseHTTPRequestHandler):
    requests: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer secret-key":
            self.send_response(401)
            self.end_headers()
            return
        self.requests.append({"path": self.path, **body})
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "text": text[::-1],
            "message": {"role": "assistant", "content": text[::-1]},
        }
        answer = json.dumps({"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice]}).encode()
        self.send_response(404 if body["model"] == "nobody" else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: Any) -> None: ...


def test_endpoint_is_called_with_the_openai_client(
    tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeEndpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    argv = ["generate", "--prompts", data, "--endpoint", url, "--top-k", 40]
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    code, stdout, err = tongwen(*argv, "--model", "m", "--out", tmp_path / "out.jsonl")
    assert code == 0, err
    rows = read(tmp_path / "out.jsonl")
    assert [row["answer"] for row in rows] == [row["prompt"][::-1] for row in rows], "in their order"
    assert FakeEndpoint.requests[0]["path"] == "/v1/chat/completions" and FakeEndpoint.requests[0]["top_k"] == 40
    assert "secret-key" not in stdout + err + (tmp_path / "out.jsonl").read_text()
    assert tongwen(*argv, "--model", "m", "--template", "completion", "--out", tmp_path / "c.jsonl")[0] == 0
    assert FakeEndpoint.requests[-1]["path"] == "/v1/completions"
    code, _, err = tongwen(*argv, "--model", "nobody", "--out", tmp_path / "n.jsonl")
    assert code == 4 and "/v1/models" in err
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    code, _, err = tongwen(*argv, "--model", "m", "--out", tmp_path / "w.jsonl")
    assert code == 5 and "OPENAI_API_KEY" in err and "wrong" not in err
    server.shutdown()
    server.server_close()


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "查天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def test_tools_of_a_row_are_in_its_prompt(tongwen: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_llama(model, len(byte_level_tokenizer(model)), max_position_embeddings=1024)
    rows = [{"prompt": "北京的天气？", "tools": [TOOL], "level": 3}, {"prompt": "你好"}]
    data, out = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "out.json"
    words = ["generate", "--model", model, "--prompts", data, "--max-new-tokens", 2]
    code, said, err = tongwen(*words, "--template", "chatml", "--form", "belle", "--out", out)
    assert code == 0 and "level (1 rows)" in said + err, err
    asked = [row["input"] for row in read(out)]
    assert "查天气" in asked[0] and asked[0].index("get_weather") < asked[0].index("北京") and "查" not in asked[1]
    code, _, err = tongwen(*words, "--template", "completion", "--out", tmp_path / "c.jsonl")
    assert code == 3 and "tools" in err, "a text that is continued has no place for them"
    assert tongwen(*words, "--template", "chatml", "--out", tmp_path / "o.jsonl")[0] == 0
    assert [row.get("tools") for row in read(tmp_path / "o.jsonl")] == [[TOOL], None]


def test_endpoint_gets_the_tools_and_its_calls_are_kept(
    tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
    requests: list[dict[str, Any]] = []

    class Caller(FakeEndpoint):
        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
            choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"id": "1", "object": "x", "choices": [choice]}).encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Caller)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "北京？", "tools": [TOOL]}])
    words = ["generate", "--prompts", data, "--endpoint", f"http://127.0.0.1:{server.server_port}/v1", "--model", "m"]
    code, _, err = tongwen(*words, "--out", tmp_path / "out.jsonl")
    server.shutdown()
    server.server_close()
    assert code == 0, err
    assert requests[0]["tools"] == [TOOL]
    said = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert read(tmp_path / "out.jsonl")[0]["answer"] == said


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
@pytest.mark.parametrize("body", ["<html>please log in</html>", "{}", '{"choices": [{}]}', '"hello"'])
@pytest.mark.parametrize("template", ["own", "completion"])
def test_unreadable_reply_is_an_error(kind: str, body: str, template: str, tongwen: Any, tmp_path: Path) -> None:
    """A login page, a portal, an address without /v1: the client takes anything."""
    pytest.importorskip("openai")

    class Page(FakeEndpoint):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "一"}])
    argv = ["generate", "--prompts", prompts, "--endpoint", url, "--model", "m", "--template", template]
    code, _, err = tongwen(*argv, "--out", tmp_path / "a.jsonl")
    assert "/v1" in err
    if kind == "text/html":
        assert code == 2 and "--endpoint" in err and "web page" in err
    else:
        assert code == 4 and url in err and "no answer" in err
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [("", "p.jsonl", ""), ('{"x": 1}\n', "p.jsonl:1", "columns"), ('{"prompt": "一"}\n{"prompt": ', "p.jsonl:2", "JSON"),
     ('{"prompt": "一"}\n{"messages": [{"role": "user", "content": "拒绝"}]}\n', "prompt 2", "refused")],
)  # fmt: skip
def test_invalid_prompts_are_refused(
    text: str, place: str, word: str, chat_model: Path, tongwen: Any, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for turn in messages %}{% if turn.content == '拒绝' %}{{ raise_exception('refused') }}{% endif %}"
        "<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    argv = ["--prompts", tmp_path / "p.jsonl", "--template", template, "--out", tmp_path / "o.jsonl"]
    code, _, err = tongwen("generate", "--model", chat_model, *argv)
    assert code == 3 and place in err and word in err, err
    assert not (tmp_path / "o.jsonl").exists()


def test_unsupported_engine_options_are_refused(chat_model: Path, tongwen: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", ROWS[:1])
    argv = [
        "generate",
        "--model",
        chat_model,
        "--prompts",
        data,
        "--template",
        "chatml",
        "--out",
        tmp_path / "o.jsonl",
    ]
    code, _, err = tongwen(*argv, "--engine", "paged", "--beams", 2, "--again")
    assert code == 4 and "--engine batched" in err
    code, _, err = tongwen(*argv, "--engine", "llama.cpp", "--again")
    assert code == 4 and "tongwen convert" in err
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    code, _, err = tongwen(*argv, "--engine", "vllm", "--adapter", tmp_path / "adapter", "--again")
    assert code == 4 and "tongwen merge" in err
    code, _, err = tongwen(*argv, "--temperature", 9, "--again")
    assert code == 2 and "temperature" in err
    code, _, err = tongwen(*argv, "--max-new-tokens", 4, "--again", "--template", "none")
    assert code == 4


@pytest.mark.parametrize("weights", ["4bit", "8bit"])
def test_quantised_base_generates_with_an_adapter(
    weights: str, chat_model: Path, tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tongwen.workflows.chat_model import open_chat_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(str(chat_model))
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    plain = open_chat_model(str(chat_model), template="chatml", precision="fp32", weights=weights).generator.model
    assert any("bit" in type(part).__name__.lower() for part in plain.modules())
    speaker = open_chat_model(str(chat_model), [str(tmp_path / "adapter")], "chatml", precision="fp32", weights=weights)
    ids = torch.tensor([speaker.prompt_ids([{"role": "user", "content": "你好"}])])
    with torch.no_grad():
        assert not torch.equal(speaker.generator.model(ids).logits, plain(ids).logits), "the adapter counts"
    assert isinstance(speaker.chat([{"role": "user", "content": "你好"}], max_new_tokens=2), str)


def test_auto_picks_the_most_bits_that_fit(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from tongwen.core.errors import MachineError
    from tongwen.model.loading import device_map
    from tongwen.model.loading.architecture import build_on_meta, load_config
    from tongwen.model.loading.locate import locate

    place = locate(str(chat_model))
    numbers = sum(part.numel() for part in build_on_meta(load_config(place)).parameters())
    for free, wanted in ((10, ""), (2, "int8"), (1, "nf4")):
        monkeypatch.setattr(
            device_map.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free * numbers)
        )
        assert device_map.choose(place, "auto", "cpu", torch.float32) == (False, wanted)
    monkeypatch.setattr(device_map.psutil, "virtual_memory", lambda: SimpleNamespace(available=numbers // 2))
    with pytest.raises(MachineError, match=r"not enough memory"):
        device_map.choose(place, "auto", "cpu", torch.float32)


def test_large_model_is_split_across_gpus(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tongwen.model.loading import device_map, load
    from tongwen.model.loading.architecture import build_on_meta, load_config
    from tongwen.model.loading.locate import locate

    place = locate(str(chat_model))
    numbers = sum(part.numel() for part in build_on_meta(load_config(place)).parameters())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for free, spread in ((3 * numbers, True), (9 * numbers, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index, free=free: (free, free))
        assert device_map.choose(place, "full", "cuda", torch.float32) == (spread, "")
    model = load.load_model(place, torch.float32, device_map="auto")
    plain = load.load_model(place, torch.float32)
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)


def test_vllm_gets_ids_and_stops_at_the_stop_token(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the package, which needs a GPU: what it is given, and what is made of what it gives."""
    from types import SimpleNamespace

    from tongwen.workflows.chat_model import open_chat_model

    given: list[Any] = []

    class Engine:
        def __init__(self, model: str) -> None:
            given.append(model)

        def generate(self, inputs: list[Any], params: dict[str, Any], use_tqdm: bool) -> list[Any]:
            given.append((inputs, params))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[9, 8, params["stop_token_ids"][0], 7])])] * len(
                inputs
            )

    fake_vllm = SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)  # type: ignore[arg-type]
    speaker = open_chat_model(str(chat_model), template="chatml", engine="vllm")
    answers: dict[int, list[int]] = {}
    prompts = [[5] * (1 + number % 3) for number in range(1030)]
    speaker.generator.answer_all(prompts, Sampling(max_new_tokens=4, temperature=0.5, seed=3), answers.__setitem__)
    assert answers == {place: [9, 8] for place in range(1030)}
    assert given[0] == str(chat_model)
    assert [row["prompt_token_ids"] for inputs, _ in given[1:] for row in inputs] == prompts
    assert given[1][1]["seed"] == 3 and given[1][1]["max_tokens"] == 4
