"""Chat in the terminal: streamed characters, history, settings and commands."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CORPUS, byte_level_tokenizer, sentencepiece_tokenizer, type_lines
from tongwen.cli.main import main
from tongwen.commands.chat import read_tools
from tongwen.core.answer_form import find_answer_form
from tongwen.core.chat_template import Template
from tongwen.core.errors import DataError, ModelError
from tongwen.core.records import Origin
from tongwen.core.tool_parser import ToolParser
from tongwen.data.formats import read_dialogue
from tongwen.infer.generation import Sampling, StreamDecoder, TextGenerator
from tongwen.recipe.data import SourceConfig
from tongwen.serving.last_turns import last_turns
from tongwen.serving.stream_split import StreamPart, split_thinking, until
from tongwen.serving.terminal import TerminalChat, converse, visible


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_streamed_pieces_are_whole_characters_and_add_up(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path) if kind == "bytes" else sentencepiece_tokenizer(tmp_path)
    rng = random.Random(0)
    texts = ["😀👍🏽 混合 text，代码 `x = 1`\n\n二", "龘靐", "a b  c", *CORPUS[:4]]
    samples = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    samples += [
        [rng.randrange(3, len(tokenizer)) for _ in range(30)] for _ in range(60)
    ]  # also bytes that are no character
    for ids in samples:
        incremental = StreamDecoder(tokenizer)
        pieces = [incremental.add(index) for index in ids]
        assert "".join([*pieces, incremental.rest()]) == tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if "\ufffd" not in tokenizer.decode(ids):
            assert not any("\ufffd" in piece for piece in pieces)


class ScriptedModel:
    """A model with scripted answers that records its requests."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.requests, self.settings = list(answers), list[Any](), list[Any]()

    def reply(self, messages: list[dict[str, Any]], settings: dict[str, Any], heard: Any) -> Iterator[str]:
        self.requests.append([dict(message) for message in messages])
        self.settings.append(settings)
        pieces = self.answers.pop(0) if self.answers else [f"答{len(self.requests)}"]
        for piece in pieces:
            if piece == "^C":
                raise KeyboardInterrupt
            if piece == "too long":
                raise ModelError(piece)
            heard(0)
            yield piece


def conversation(
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    scripted_model: ScriptedModel | None = None,
    system: str = "",
    **options: Any,
) -> ScriptedModel:
    scripted_model = scripted_model or ScriptedModel()
    type_lines(lines, monkeypatch)
    choices: dict[str, Any] = {
        "count": lambda messages: 0,
        "check": lambda settings: Sampling().override(**settings),
        "context": 100,
        "settings": {"max_new_tokens": 1, "temperature": 0.0},
    } | options
    assert converse(TerminalChat(reply=scripted_model.reply, **choices), name="m", system=system) == 0
    return scripted_model


def test_turns_are_remembered_and_commands_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    requests = conversation(
        [
            "问1",
            "",
            "问2",
            "/retry",
            "/system 简短",
            "问3",
            f"/save {file}",
            "/clear",
            "问4",
            "/nonsense",
            "/exit",
            "问5",
        ],
        monkeypatch,
    ).requests
    assert [message["content"] for message in requests[1]] == ["问1", "答1", "问2"]
    assert requests[2] == requests[1], "/retry asks the same again"
    assert [message["content"] for message in requests[3]] == ["简短", "问3"]
    assert [message["role"] for message in requests[4]] == ["system", "user"]
    assert len(requests) == 5
    assert "答4" in file.read_text(encoding="utf-8")


CALL = '<tool_call>\n{{"name": "{}", "arguments": {{"city": "北京"}}}}\n</tool_call>'


def test_user_answers_for_the_called_tools(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, saved = tmp_path / "tools.json", tmp_path / "chat.json"
    file.write_text(json.dumps([{"name": name} for name in ("weather", "time")]), encoding="utf-8")
    template = Template.make("chatml", None, {}, ["<|im_start|>", "<|im_end|>"])
    parser = find_answer_form(template).tools
    assert isinstance(parser, ToolParser)
    answers = ["好。\n" + CALL.format("weather"), "\n" + CALL.format("time")], ["晴，八点。"], [CALL.format("time")]
    requests = conversation(
        ["/tool x", "问", "晴", "/tool /八点", f"/save {saved}", "再问", "/clear", "新问"],
        monkeypatch,
        ScriptedModel(*answers),
        tools=read_tools(file),
        parser=parser,
    ).requests
    printed = capsys.readouterr().out
    assert '→ weather {"city": "北京"}' in printed and "<tool_call>" not in printed
    assert [turn["role"] for turn in requests[1]] == ["user", "assistant", "tool", "tool"]
    _question, called, weather, clock = requests[1]
    assert called["content"] == "好。" and [one["function"]["name"] for one in called["tool_calls"]] == [
        "weather",
        "time",
    ]
    assert [weather["tool_call_id"], clock["tool_call_id"]] == [one["id"] for one in called["tool_calls"]]
    assert (weather["content"], clock["content"]) == ("晴", "/八点")
    assert [turn["content"] for turn in requests[3]] == ["新问"], "calls that nobody answered are forgotten"
    kept = json.loads(saved.read_text(encoding="utf-8"))
    assert [turn["role"] for turn in kept["messages"]] == ["user", "assistant", "tool", "tool", "assistant"]
    record = read_dialogue(kept, "messages", SourceConfig(path="x"), {}, Origin("x", 1))
    assert len(record.tools) == 2 and record.messages[1].tool_calls, "`prepare` reads a saved chat"
    template.samples(record)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a list of tools"),
        ('[{"x": 1}]', "0: a tool needs a name"),
        ('[{"name": "f", "parameters": {"properties": {"x": {"type": "text"}}}}]', "parameters.properties.x.type"),
    ],
)
def test_broken_tools_file_is_refused(tongwen: Any, tmp_path: Path, text: str, rule: str) -> None:
    file = tmp_path / "tools.json"
    file.write_text(text, encoding="utf-8")
    code, _out, err = tongwen("chat", tmp_path, "--tools", file)
    assert code == 2 and rule in err and str(file) in err


def test_history_is_cut_by_whole_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = conversation(["问1", "问2", "问3"], monkeypatch, system="s", count=len, context=5).requests
    assert [message["content"] for message in requests[2]] == ["s", "问2", "答2", "问3"]


def test_history_is_cut_before_a_question_never_between_a_call_and_its_answer() -> None:
    roles = ["system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant", "user"]
    messages = [{"role": role} for role in roles]
    assert [turn["role"] for turn in last_turns(messages, len, 8)] == ["system", "user", "assistant", "user"]
    assert [turn["role"] for turn in last_turns(messages, len, 1)] == ["system", "user"]
    assert last_turns(messages, len, 9) == messages


def test_oversized_question_leaves_the_history_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(messages: list[dict[str, Any]]) -> int:
        return sum(len(message["content"]) for message in messages)

    scripted_model = conversation(
        ["问1", "长" * 1000, "问3"], monkeypatch, ScriptedModel(["答1"], ["too long"]), count=count
    )
    assert [message["content"] for message in scripted_model.requests[2]] == ["问1", "答1", "问3"]


class Says:
    """A network that says these ids."""

    device = "cpu"

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def generate(self, input_ids: torch.Tensor, streamer: Any, **_: Any) -> None:
        streamer.put(input_ids)
        for index in self.ids:
            streamer.put(torch.tensor([index]))


def test_answer_ends_with_a_whole_character(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    voice = TextGenerator(None, tokenizer, (0,), 100)
    ids = tokenizer("好龘", add_special_tokens=False)["input_ids"]
    assert voice.decode(ids) == "好龘"
    assert voice.decode(ids[:-1]) == "好"
    for output_ids in (ids, ids[:-1], [*ids[:-1], *ids]):
        assert "".join(replace(voice, model=Says(output_ids)).stream([1], Sampling())) == voice.decode(output_ids)


def test_settings_are_changed_and_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["/set temperature 0.7", "/set temperature 7", "/set warmth 1", "/set top_p x", "问"]
    scripted_model = conversation(lines, monkeypatch)
    assert scripted_model.settings == [{"max_new_tokens": 1, "temperature": 0.7}]
    err = capsys.readouterr().err
    assert "temperature: 7 is out of range" in err and "0 … 2" in err
    assert "unknown option: warmth" in err and "'x' is not a number" in err


def test_invalid_setting_is_refused_and_the_chat_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [
        "1" + "0" * 23,
        "-1" + "0" * 23,
        "1e400",
        "NaN",
        "-Infinity",
        "2.5",
        "9" * 5000,
        "[" * 100_000,
        "null",
        "",
    ]
    lines = [f"/set {name} {value}" for name in ("seed", "max_new_tokens", "top_k") for value in values]
    scripted_model = conversation([*lines, "/save a\0b", "/set seed 7", "问"], monkeypatch)
    assert scripted_model.settings == [{"max_new_tokens": 1, "temperature": 0.0, "seed": 7}]
    assert capsys.readouterr().err.count("✗ ") == len(lines) + 1


def test_stopped_answer_stays_in_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted_model = conversation(["问1", "问2", "问3"], monkeypatch, ScriptedModel(["一", "^C", "二"], ["^C"], ["三"]))
    contents = [message["content"] for message in scripted_model.requests[2]]
    assert contents == ["问1", "一", "问3"], "half an answer is remembered; a question without any is not"


def test_error_drops_only_its_question(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    counted: list[int] = []

    def count(messages: list[dict[str, Any]]) -> int:
        counted.append(len(messages))
        if len(counted) == 1:
            raise DataError("the template refuses this dialogue")
        return 0

    scripted_model = conversation(["问1", "问2", "问3"], monkeypatch, count=count)
    assert [message["content"] for message in scripted_model.requests[1]] == ["问1", "答1", "问3"]
    assert "the template refuses this dialogue" in capsys.readouterr().err


def test_thinking_is_folded_and_can_be_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chat.json"
    scripted_model = ScriptedModel(["<thi", "nk>\n想想", "</th", "ink>\n\n", "答"])
    conversation(["问", f"/save {file}"], monkeypatch, scripted_model)
    out = capsys.readouterr().out
    assert "想想" not in out and "thinking, 2 characters" in out and out.count("答") == 1
    assert json.loads(file.read_text("utf-8"))["messages"][1] == {
        "role": "assistant",
        "content": "答",
        "reasoning_content": "想想",
    }
    conversation(["问", "/thinking"], monkeypatch, ScriptedModel(["<think>想想</think>答"]))
    assert "想想" in capsys.readouterr().out


def test_terminal_control_sequences_are_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07\x1b]8;;http://x\x1b\\\x1b]52;c;aGk=\x07\r\x9b31m\u202e\ud800"
    for stream in (True, False):
        conversation(["问"], monkeypatch, ScriptedModel(list(evil + "好\n\t")), stream=stream)
        out = capsys.readouterr().out
        assert not set(out) & set("\x1b\x07\r\x9b\u202e\ud800"), "nothing is obeyed"
        assert "\\x1b]0;title\\x07" in out and "好\n\t" in out
    assert visible("龘👩‍👩‍👧 `x`\n\t") == "龘👩‍👩‍👧 `x`\n\t"


def test_markers_are_found_across_stream_pieces() -> None:
    rng = random.Random(0)
    texts = [
        "<think>想 < 想</thin</think>\n\n答 </think>",
        "答<think>不是</think>",
        " <think>没完</thi",
        "<thi",
        "  答",
        "",
    ]
    for text in texts * 40:
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        parts = list(split_thinking(iter(pieces)))
        whole = list(split_thinking(iter([text])))
        for thinking in (True, False):
            assert _joined(parts, thinking) == _joined(whole, thinking)
        assert "".join(until(iter(pieces), ["</think>", "完"])) == text.split("</think>")[0].split("完")[0]
    assert _joined(list(split_thinking(iter([texts[0]]))), True) == "想 < 想</thin"
    assert _joined(list(split_thinking(iter([texts[0]]))), False) == "答 </think>"
    assert _joined(list(split_thinking(iter([texts[4]]))), False) == "  答", "an answer is shown as it is"


class Terminal:
    """A terminal of 100 columns in which a command runs."""

    def __init__(self, *arguments: str) -> None:
        self.out = b""
        self.process, self.handle = pty.fork()
        if not self.process:
            try:
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
                os.environ["TERM"] = "xterm"
                os._exit(main(arguments))
            except BaseException:
                os._exit(99)

    def until(self, text: str) -> str:
        """What comes out up to this text; what follows it is kept for the next time."""
        while text.encode() not in self.out:
            assert select.select([self.handle], [], [], 60)[0], f"no {text!r} in {self.out.decode()!r}"
            self.out += os.read(self.handle, 65536)
        before, found, self.out = self.out.partition(text.encode())
        return (before + found).decode(errors="replace")

    def write(self, text: str) -> None:
        data = text.encode("utf-8", "surrogateescape")
        while data:
            data = data[os.write(self.handle, data[:4096]) :]

    def close(self) -> int:
        status = os.waitpid(self.process, 0)[1]
        os.close(self.handle)
        return os.waitstatus_to_exitcode(status)


def test_typing_in_a_real_terminal(chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    terminal = Terminal("chat", str(chat_model), "--template", "chatml", "--max-new-tokens", "60", "--temperature", "1")
    terminal.until("you ›")
    terminal.write("你龘\x7f好\udcff\r")  # a wide character taken back, and a byte that is no text
    terminal.until("characters/s")
    terminal.until("you ›")
    terminal.write("\x1b[200~" + "长\n" * 50_000 + "\x1b[201~\r")  # a paste of many lines is one question
    terminal.until("the model sees at most 512")
    terminal.until("you ›")
    terminal.write("再说\r")
    terminal.until("再说")
    time.sleep(0.2)
    terminal.write("\x03")
    terminal.until("characters/s")
    terminal.until("you ›")
    terminal.write(f"/save {file}\r")
    terminal.until(file.name)
    terminal.until("you ›")
    terminal.write("\x04")
    assert terminal.close() == 0
    messages = json.loads(file.read_text("utf-8"))["messages"]
    assert messages[0]["content"] == "你好\ufffd"
    assert messages[1]["role"] == "assistant" and len(messages) in (2, 4), "the paste left no trace"


def _joined(parts: list[StreamPart], thinking: bool) -> str:
    return "".join(part.text for part in parts if part.thinking == thinking)
