"""The same rows come out of a file whatever holds them: format, container, compression, encoding."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_rows
from tests.data.row_files import CONTAINERS, SIMPLIFIED, TURNS, as_lines, contents_of, take, write
from tongwen.core.errors import DataError, RecipeError, RowRejected
from tongwen.core.records import Dialogue, Origin
from tongwen.data import files, formats
from tongwen.data.charset import choose, recognise
from tongwen.data.dataset_info import entry_source
from tongwen.data.files import find_files
from tongwen.data.reader import read_rows
from tongwen.data.row import RawRow
from tongwen.recipe.data import SourceConfig

DEMO = Path(__file__).parents[2] / "src" / "tongwen" / "commands" / "demo_data" / "dialogues.jsonl"
HERE = Origin("f", 1)
TRADITIONAL = [
    {"instruction": "請介紹一下你自己，", "input": "", "output": '我是一個"中文"助手，\n可以回答問題。'},
    {"instruction": "什麼是機器學習？", "input": "用簡單的話說", "output": "讓電腦從資料裡學到規律。"},
]


def dialogue(row: dict[str, Any], **settings: Any) -> Dialogue:
    source = SourceConfig(path="f", **settings)
    format_ = source.format or formats.recognise_row(RawRow("f", 1, row, 1), source)
    return formats.read_dialogue(row, format_, source, {}, HERE)


# -- containers ----------------------------------------------------------------------------------------------------


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "members.gz": lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:]) + bytes(17),
    "xz": lzma.compress,
    "members.xz": lambda data: lzma.compress(data[:50]) + lzma.compress(data[50:]),
    "zst": lambda data: pytest.importorskip("zstandard").compress(data),
    "frames.zst": lambda data: b"".join(
        pytest.importorskip("zstandard").compress(part) for part in (data[:50], data[50:])
    ),
}
TEXT_CONTAINERS = ("a.jsonl", "a.json", "indented.json", "a.csv", "lines.txt")


def expected(rows: list[dict[str, Any]]) -> list[Any]:
    return [
        [("user", "\n".join(filter(None, (row["instruction"], row["input"])))), ("assistant", row["output"])]
        for row in rows
    ]


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_records(container: str, tmp_path: Path) -> None:
    good, bad = take(write(tmp_path, container, SIMPLIFIED))
    assert contents_of(good) == expected(SIMPLIFIED)
    assert not bad


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("container", TEXT_CONTAINERS)
def test_every_compression_gives_the_same_records(container: str, packer: str, tmp_path: Path) -> None:
    plain = write(tmp_path, container, SIMPLIFIED, PACKERS[packer])
    named = plain.rename(plain.with_name(f"{container}.{packer.rpartition('.')[2]}"))
    assert contents_of(take(named)[0]) == expected(SIMPLIFIED)
    if not container.endswith("csv"):  # a table of text is one by its name alone
        named.rename(tmp_path / "unnamed.bin")
        assert contents_of(take(tmp_path / "unnamed.bin")[0]) == expected(SIMPLIFIED)


@pytest.mark.parametrize(
    "codec",
    ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030", "big5hkscs"],
)
@pytest.mark.parametrize("container", TEXT_CONTAINERS)
def test_every_encoding_gives_the_same_records(container: str, codec: str, tmp_path: Path) -> None:
    rows = TRADITIONAL if codec == "big5hkscs" else SIMPLIFIED
    file = write(tmp_path, container, rows, lambda data: data.decode().encode(codec))
    told: list[str] = []
    assert contents_of(take(file, told.append)[0]) == expected(rows)
    read_as = [line for line in told if "read as" in line and "JSON" not in line]
    assert len(read_as) == (codec != "utf-8-sig")
    assert all(file.name in line for line in told)
    named = {"utf-8-sig": "utf-8", "big5hkscs": "big5", "gb18030": "gbk"}.get(codec, codec)
    assert contents_of(take(file, encoding=named)[0]) == expected(rows)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 64])
@pytest.mark.parametrize("codec", ["utf-8", "utf-16", "gb18030"])
@pytest.mark.parametrize("container", ["a.jsonl", "a.json", "a.csv"])
def test_block_boundaries_change_nothing(
    container: str, codec: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, container, SIMPLIFIED, lambda data: data.decode().encode(codec))
    whole = list(read_rows(file))
    monkeypatch.setattr(files, "BLOCK", block)
    assert list(read_rows(file)) == whole


def test_row_sizes_add_up_to_the_file(tmp_path: Path) -> None:
    data = as_lines(SIMPLIFIED)
    for name, content in (("a.jsonl", data), ("b.jsonl", data.decode().encode("gb18030"))):
        (tmp_path / name).write_bytes(content)
        rows = list(read_rows(tmp_path / name))
        assert sum(row.size for row in rows) + len(rows) == len(data)
        assert [row.row for row in rows] == [1, 2, 3]


def test_memory_is_bounded_by_the_row_not_the_file(tmp_path: Path) -> None:
    row = json.dumps({"instruction": "问" * 100, "output": "答" * 100}, ensure_ascii=False)
    peaks = []
    for name, join, ends in (("a.jsonl", "\n", "  "), ("a.json", ",\n", "[]")):
        (tmp_path / name).write_text(ends[0] + join.join([row] * 40_000) + ends[1], encoding="utf-8")
        tracemalloc.start()
        assert sum(1 for _ in read_rows(tmp_path / name)) == 40_000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 12 << 20 < (tmp_path / "a.json").stat().st_size


# -- text ----------------------------------------------------------------------------------------------------------

TEXT = "第一章\n\n春天来了，\n花都开了。\n   \n夏天也来了。\n"


@pytest.mark.parametrize(
    ("records", "found"),
    [
        (None, [(1, "第一章"), (3, "春天来了，\n花都开了。"), (6, "夏天也来了。")]),
        ("paragraph", [(1, "第一章"), (3, "春天来了，\n花都开了。"), (6, "夏天也来了。")]),
        ("line", [(1, "第一章"), (3, "春天来了，"), (4, "花都开了。"), (6, "夏天也来了。")]),
        ("file", [(1, TEXT.rstrip("\n"))]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.dat"])
def test_text_is_split_into_records(name: str, records: str | None, found: list[Any], tmp_path: Path) -> None:
    (tmp_path / name).write_text(TEXT, encoding="utf-8")
    good, bad = take(tmp_path / name, documents=True, records=records)
    if name == "a.md" and records is None:  # headings, code and front matter belong together
        found = [(1, TEXT.rstrip("\n"))]
    assert [(record.origin.row, record.text) for record in good] == found
    assert not bad


def test_text_without_blank_lines_is_read_by_line_with_a_notice(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("一\u2028二\x0b三\x85四\n\u3000五\n\n", encoding="utf-8")
    told: list[str] = []
    good, _ = take(tmp_path / "a.txt", told.append, documents=True)
    assert contents_of(good) == ["一\u2028二\x0b三\x85四", "\u3000五"], "only \\n ends a line"
    assert "each line is a record" in told[0] and "records:" in told[0]


def test_text_starting_with_a_bracket_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("[注]本文\n{大括号}\n", encoding="utf-8")
    assert contents_of(take(tmp_path / "a.txt", documents=True)[0]) == ["[注]本文", "{大括号}"]


# -- encodings -----------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    rows = [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]
    return [turn["content"] for row in rows for turn in row["messages"]]


@pytest.mark.parametrize("codec", ["gb18030", "utf-16-le", "utf-8"])
def test_encoding_is_detected_from_one_sentence(codec: str) -> None:
    texts = [text for text in sentences() if len(text) >= 6]
    found = [recognise(text.encode(codec)).codec for text in texts]
    assert len(texts) > 500
    assert found.count(codec) >= 0.985 * len(texts)


@pytest.mark.parametrize(
    "text",
    [
        "你好",
        "您好，請問您需要什麼幫助？",
        "今天天氣很好，我們去公園散步吧。",
        "問：什麼是人工智慧？\n答：機器的智慧。",
    ],
)
def test_traditional_text_encoding_is_detected(text: str) -> None:
    assert recognise(text.encode("big5hkscs")).codec == "big5hkscs"
    assert recognise(text.encode("gb18030")).codec == "gb18030"


def test_four_byte_gb18030_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("我在𠮷野家吃饭\n".encode("gb18030"))
    assert contents_of(take(tmp_path / "a.txt", documents=True, encoding="GB18030")[0]) == ["我在𠮷野家吃饭"]


def test_utf8_file_with_one_foreign_line_stays_utf8(tmp_path: Path) -> None:
    text = "这是一行很普通的文字，没有什么特别。\n"
    (tmp_path / "a.txt").write_bytes(text.encode() * 2 + text.encode("gb18030") + text.encode())
    told: list[str] = []
    good, bad = take(tmp_path / "a.txt", told.append, documents=True)
    assert len(good) == 3
    assert [(raw.row, raw.reason) for raw, _ in bad] == [(3, "not_utf8")]
    assert "GB18030" in bad[0][1].rule
    assert not any("read as" in line for line in told)


def test_unknown_encodings_are_refused() -> None:
    for name in ("utf-99", "base64", "rot13", ""):
        with pytest.raises(DataError, match="is not known"):
            choose(b"text", name, whole=True)


# -- files ---------------------------------------------------------------------------------------------------------


def test_folder_lists_its_data_files_in_order(tmp_path: Path) -> None:
    wanted = ["a.jsonl.gz", "b/c.CSV", "b/d/e.parquet", "f.txt", "g.json.zst"]
    others = [
        "README.md",
        ".hidden.json",
        ".git/x.json",
        "b/notes.py",
        "dataset_info.json",
        "LICENSE.txt",
        "m.safetensors",
    ]
    for name in wanted + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [str(file.relative_to(tmp_path)) for file in find_files(str(tmp_path))] == wanted
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "to").symlink_to(tmp_path / "b" / "d")
    assert tmp_path / "linked" / "to" / "e.parquet" in find_files(str(tmp_path))
    assert [file.name for file in find_files(str(tmp_path / "b" / "**" / "*.p*"))] == ["e.parquet", "notes.py"]
    assert find_files(str(tmp_path / "README.md")) == [tmp_path / "README.md"], "what is named is meant"


@pytest.mark.parametrize("name", ["[1] 数据*.jsonl", "a\nb.jsonl", os.fsdecode(b"\xd6\xd0.jsonl")])
def test_unusual_file_names_are_read(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", SIMPLIFIED).rename(tmp_path / name)
    assert find_files(str(file)) == [file]
    for raw in read_rows(file):
        assert raw.file.encode() and "\n" not in raw.file


# -- formats -------------------------------------------------------------------------------------------------------

CALL = '{"name": "weather", "arguments": {"city": "京"}}'
ASKED, ANSWERED = TURNS[0][1], TURNS[1][1]
ROWS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("alpaca", {"instruction": ASKED, "output": ANSWERED}, TURNS),
    ("alpaca", {"instruction": ASKED, "input": "\u200b ", "output": ANSWERED, "extra": [1]}, TURNS),
    ("alpaca", {"instruction": "", "input": ASKED, "output": ANSWERED}, TURNS),
    ("alpaca", {"input": ASKED, "target": ANSWERED}, TURNS),
    ("alpaca", {"instruction": ASKED, "input": None, "target": ANSWERED, "history": None, "system": ""}, TURNS),
    (
        "alpaca",
        {"instruction": "三", "output": "四", "history": [["一", "二"]], "system": "令"},
        [("system", "令"), ("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四")],
    ),
    (
        "turns_inside",
        {"instruction": "Human: 一\n\nAssistant: 二\n\nHuman: 三\n\nAssistant: ", "input": "", "output": "四"},
        [("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四")],
    ),
    (
        "turns_inside",
        {"instruction": "User：一\n续\nAssistant：二\nUser：三", "input": "", "output": "四"},
        [("user", "一\n续"), ("assistant", "二"), ("user", "三"), ("assistant", "四")],
    ),
    (
        "turns_inside",
        {"instruction": "User:一\nAssistant:二", "input": "User:三", "output": "四"},
        [("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四")],
    ),
    ("conversations", {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]}, TURNS),
    (
        "conversations",
        {"id": "1", "conversations": [{"from": "human", "value": ASKED}, {"from": "assistant", "value": ANSWERED}]},
        TURNS,
    ),
    (
        "conversations",
        {
            "system": "令",
            "tools": '[{"name": "weather"}]',
            "conversations": [
                {"from": "human", "value": "天气？"},
                {"from": "function_call", "value": CALL},
                {"from": "observation", "value": "晴"},
                {"from": "gpt", "value": "晴天"},
            ],
        },
        [("system", "令"), ("user", "天气？"), ("assistant", ""), ("tool", "晴"), ("assistant", "晴天")],
    ),
    ("messages", {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]}, TURNS),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": ASKED[:4]}, {"type": "text", "text": ASKED[4:]}]},
                {"role": "assistant", "content": ANSWERED},
            ],
            "conversations": None,
        },
        TURNS,
    ),
    ("completion", {"prompt": ASKED, "completion": ANSWERED}, TURNS),
    ("completion", {"prompt": ASKED, "response": ANSWERED, "history": []}, TURNS),
    (
        "completion",
        {
            "prompt": [{"role": "user", "content": ASKED}],
            "completion": [{"role": "assistant", "content": ANSWERED}],
        },
        TURNS,
    ),
    ("query", {"instruct": "抽取实体", "query": "文本：郑州", "answer": "郑州_地名"}, [("user", "抽取实体\n文本：郑州"), ("assistant", "郑州_地名")]),
    ("query", {"query": ASKED, "answer": ANSWERED}, TURNS),
    *(("pair", {one: ASKED, two: ANSWERED}, TURNS) for one, two in formats.PAIRS),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "row", "found"), ROWS)
def test_each_format_is_recognised_and_read(format_: str, row: dict[str, Any], found: list[tuple[str, str]]) -> None:
    assert formats.recognise(row) == format_
    assert contents_of([dialogue(row)]) == contents_of([dialogue(row, format=format_)]) == [found]


@pytest.mark.parametrize(("format_", "row", "found"), ROWS)
def test_columns_rename_every_key(format_: str, row: dict[str, Any], found: list[tuple[str, str]]) -> None:
    known = {name for name in formats.NAMES if name not in formats.IN_TURNS}
    if format_ == "pair":
        row = dict(zip(("question", "answer"), row.values(), strict=True))
    renamed = {f"他们的{key}" if key in known else key: value for key, value in row.items()}
    columns = {key: f"他们的{key}" for key in row if key in known}
    assert contents_of([dialogue(renamed, columns=columns)]) == [found]


def test_rows_of_several_formats_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines([row for _, row, _ in ROWS]))
    good, bad = take(tmp_path / "a.jsonl")
    assert contents_of(good) == [found for _, _, found in ROWS]
    assert not bad


def test_turn_keys_and_roles_are_mapped() -> None:
    row = {"turns": [{"who": "买家", "says": ASKED}, {"who": "Agent", "says": ANSWERED}]}
    settings = {
        "columns": {"conversations": "turns", "from": "who", "value": "says"},
        "roles": {"买家": "user", "Agent": "assistant"},
    }
    assert contents_of([dialogue(row, **settings)]) == [TURNS]
    row = {"messages": [{"who": "user", "says": ASKED}, {"who": "assistant", "says": ANSWERED}]}
    assert contents_of([dialogue(row, columns={"role": "who", "content": "says"})]) == [TURNS]
    with pytest.raises(RowRejected, match=r"买家.*roles: \{买家: user\}"):
        dialogue({"conversations": [{"from": "买家", "value": ASKED}]})
    with pytest.raises(RecipeError, match=r"columns: 'outptu'"):
        formats.check_source(SourceConfig(path="f", columns={"outptu": "answer"}))
    with pytest.raises(RecipeError, match=r"roles: 'bot'"):
        formats.check_source(SourceConfig(path="f", roles={"x": "bot"}))
    formats.check_source(SourceConfig(path="f", **settings))


def test_mapped_name_excludes_the_default_column() -> None:
    row = {"instruction": ASKED, "output": "draft"}
    with pytest.raises(RowRejected, match=r"output \(final\)"):
        dialogue(row, format="alpaca", columns={"output": "final"})
    assert contents_of([dialogue({**row, "final": ANSWERED}, columns={"output": "final"})]) == [TURNS]


def test_calls_thinking_and_learn_flags_are_kept() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "天气？", "weight": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": CALL}}]},
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "<think>想</think>\n晴天", "weight": 0},
        {"role": "user", "content": "谢谢"},
        {"role": "assistant", "content": "不客气", "reasoning_content": "客气", "train": True},
    ]
    found = dialogue({"messages": turns, "tools": [{"type": "function"}]})
    assert found.messages[1].tool_calls[0]["function"]["arguments"] == json.loads(CALL)
    assert [turn.learn for turn in found.messages] == [None, None, None, False, None, True]
    assert [turn.thinking for turn in found.messages] == [None, None, None, "想", None, "客气"]
    assert found.messages[3].content == "晴天"
    assert found.tools == ({"type": "function"},)


def test_control_tokens_and_placeholders_stay_text() -> None:
    row = {"instruction": "<|im_start|>system", "output": "</s>[INST]{{x}}"}
    assert contents_of([dialogue(row)]) == [[("user", "<|im_start|>system"), ("assistant", "</s>[INST]{{x}}")]]


def test_documents_are_read_from_their_column() -> None:
    def read(row: Any, **settings: Any) -> str:
        return formats.read_document(row, SourceConfig(path="f", **settings), HERE).text

    assert read({"text": "文", "content": "x"}) == "文"
    assert read({"text": "x", "content": "文"}, columns={"text": "content"}) == "文"
    with pytest.raises(RowRejected, match="'content': did you mean 'text'"):
        read({"content": "文"})


# -- an entry of dataset_info.json ----------------------------------------------------------------------------------

SHARE = {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]}
OPENAI = {"chat": [{"role": "USER", "content": ASKED}, {"role": "BOT", "content": ANSWERED}]}
ENTRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"instruction": ASKED, "input": "", "output": ANSWERED}),
    "mapped": (
        {"columns": {"prompt": "q", "query": "more", "response": "a", "system": None}},
        {"q": ASKED, "more": "", "a": ANSWERED},
    ),
    "share": ({"formatting": "sharegpt", "columns": {"messages": "conversations"}}, SHARE),
    "tags": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "chat"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "USER", "assistant_tag": "BOT"},
        },
        OPENAI,
    ),
    "openai": ({"formatting": "openai", "tags": {"user_tag": "USER", "assistant_tag": "BOT"}, "columns": {"messages": "chat"}}, OPENAI),
}  # fmt: skip


@pytest.fixture
def info(tmp_path: Path) -> Iterator[Path]:
    entries = {}
    for name, (fields, row) in ENTRIES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row]), encoding="utf-8")
        entries[name] = {"file_name": f"{name}.json", **fields}
    entries["hub"] = {"hf_hub_url": "owner/name", "ms_hub_url": "other/name"}
    for number, fields in enumerate(
        ({"ranking": True}, {"num_samples": 9}, {"subset": "a"}, {"split": "test"}, {"columns": {"images": "i"}},
         {"formatting": "xml"}, {"script_url": "x"}, {"tags": []}, {"columns": {"prompt": 3}}),
    ):  # fmt: skip
        entries[f"bad{number}"] = {"file_name": "plain.json", **fields}
    entries["nothing"] = {}
    entries["list"] = []  # type: ignore[assignment]
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    yield tmp_path / "dataset_info.json"


@pytest.mark.parametrize("entry", ENTRIES)
def test_dataset_info_entry_is_read(entry: str, info: Path) -> None:
    for path in (info, info.parent):
        (source,) = entry_source(SourceConfig(path=str(path), entry=entry, weight=0.5))
        formats.check_source(source)
        assert (source.entry, source.weight) == (None, 0.5)
        (file,) = find_files(source.path)
        settings = source.model_dump(include={"format", "columns", "roles"})
        assert contents_of(take(file, **settings)[0]) == [TURNS]


def test_dataset_info_hub_entry_and_refusals(info: Path) -> None:
    assert entry_source(SourceConfig(path=str(info), entry="hub"))[0].path == "hub:owner/name"
    patterns = ["ranking: True", "num_samples: 9", "subset: 'a'", "split: 'test'", "images", "formatting: 'xml'", "script_url",
             "tags must", "columns must"]  # fmt: skip
    for number, pattern in enumerate(patterns):
        with pytest.raises(DataError, match=pattern) as caught:
            entry_source(SourceConfig(path=str(info), entry=f"bad{number}"))
        assert f"dataset_info.json: bad{number}" in caught.value.text()
    for entry, pattern in (
        ("nothing", "file_name"),
        ("list", "object"),
        ("plan", r"no entry 'plan'; the closest: plain"),
    ):
        with pytest.raises(DataError, match=pattern):
            entry_source(SourceConfig(path=str(info), entry=entry))
    for content, pattern in ((b"{", "not JSON"), (b"[]", "one object")):
        info.write_bytes(content)
        with pytest.raises(DataError, match=pattern):
            entry_source(SourceConfig(path=str(info), entry="plain"))
    info.unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        entry_source(SourceConfig(path=str(info), entry="plain"))


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation", "chosen", "history"])
def test_single_row_is_not_taken_for_a_wrapper(key: str, tmp_path: Path) -> None:
    row = {key: [{"role": "user", "content": "问"}]}
    file = write_rows(tmp_path / "one.jsonl", [row])
    assert [raw.value for raw in read_rows(file, SourceConfig(path=str(file)))] == [row]
