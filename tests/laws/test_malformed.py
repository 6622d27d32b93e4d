"""Malformed files and rows: a file or its bad rows are refused by name with a reason, and every good row stays.

The ids name the cases of the plan where there is one (DA-…).
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.row_files import SIMPLIFIED, TURNS, as_csv, as_lines, as_table, contents_of, take
from tongwen.core.errors import DataError, RowRejected
from tongwen.data import files, json_array, reader
from tongwen.data.files import find_files
from tongwen.data.reader import read_rows

GOOD = json.dumps({"instruction": TURNS[0][1], "input": "", "output": TURNS[1][1]}, ensure_ascii=False).encode()
DOCUMENT = json.dumps({"text": "一段很普通的文字"}, ensure_ascii=False).encode()


def around(bad: bytes, good: bytes = GOOD) -> bytes:
    """A bad line between good ones."""
    return good + b"\n" + bad + b"\n" + good + b"\n"


def row(**fields: Any) -> bytes:
    return json.dumps({"instruction": "问", "output": "答", **fields}, ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )


def turns(*roles: str, key: str = "messages", **fields: Any) -> bytes:
    names = ("role", "content") if key == "messages" else ("from", "value")
    return json.dumps(
        {key: [dict(zip(names, (role, f"话{turn}"), strict=True)) for turn, role in enumerate(roles)], **fields}
    ).encode()


def message(**fields: Any) -> bytes:
    """A dialogue whose second turn has these fields."""
    return json.dumps(
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", **fields}]}
    ).encode()


# -- rows: one bad between two good --------------------------------------------------------------------------------

BAD_LINES: list[tuple[str, bytes, str, str]] = [  # id, the line, the reason, part of the message
    ("DA-07 GBK line", GOOD.decode().encode("gb18030"), "not_utf8", "GB18030"),
    ("DA-09 byte FF", row(x="a").replace(b'"a"', b'"\xff"'), "not_utf8", "the byte at"),
    ("DA-10 overlong", row(x="a").replace(b'"a"', b'"\xc0\xaf"'), "not_utf8", "UTF-8"),
    ("DA-11 encoded surrogate", row(x="a").replace(b'"a"', b'"\xed\xa0\x80"'), "not_utf8", "UTF-8"),
    ("DA-16 half a pair", rb'{"instruction": "\ud83d", "output": "a"}', "lone_surrogate", "turn 1"),
    ("DA-16 in the answer", rb'{"instruction": "a", "output": "\udc00x"}', "lone_surrogate", "turn 2"),
    ("DA-17 reversed pair", rb'{"instruction": "a", "output": "\ude00\ud83d"}', "lone_surrogate", "surrogate"),
    ("DA-19 raw NUL", GOOD.replace(TURNS[0][1].encode(), b"\0"), "nul_character", "NUL"),
    ("DA-20 escaped NUL", rb'{"instruction": "a", "output": "b\u0000"}', "nul_character", "NUL"),
    ("DA-21 NUL in the middle", bytes(300), "nul_character", "300 NUL"),
    ("DA-22 raw control character", b'{"instruction": "a\x01", "output": "b"}', "control_character", "U+0001"),
    ("DA-22 raw tab", b'{"instruction": "a\tb", "output": "b"}', "control_character", "U+0009"),
    ("DA-31 cut line", GOOD[:44], "not_json", "truncated"),
    ("cut in a key", b'{"instr', "not_json", "truncated"),
    ("only a brace", b"{", "not_json", "truncated"),
    ("only a closing brace", b"}", "not_json", "character 1"),
    ("DA-32 two objects", GOOD + GOOD, "not_json", "two objects"),
    ("two objects with a comma", GOOD + b"," + GOOD, "not_json", "Extra data"),
    ("DA-33 trailing comma", b'{"instruction": "a", "output": "b",}', "not_json", "an extra comma"),
    ("comma after the object", GOOD + b",", "not_json", "Extra data"),
    ("DA-34 Python's repr", b"{'instruction': 'a', 'output': 'b'}", "not_json", "json.dumps"),
    ("DA-35 NaN", b'{"instruction": "a", "output": NaN}', "not_a_number", "NaN"),
    ("DA-35 Infinity", b'{"instruction": "a", "output": "b", "x": [Infinity]}', "not_a_number", "Infinity"),
    ("DA-35 -Infinity", b'{"instruction": "a", "output": "b", "x": -Infinity}', "not_a_number", "-Infinity"),
    ("DA-35 None", b'{"instruction": "a", "output": None}', "not_json", "null, true, false"),
    ("DA-35 True", b'{"instruction": "a", "output": "b", "x": True}', "not_json", "null, true, false"),
    ("DA-36 comment after", GOOD + b" // good", "not_json", "comments"),
    ("DA-36 comment alone", b"// a comment", "not_json", "comments"),
    ("DA-36 hash", b"# a comment", "not_json", "comments"),
    ("DA-37 duplicate key", b'{"instruction": "a", "output": "b", "output": "c"}', "duplicate_key", "'output'"),
    ("DA-37 deep", b'{"instruction": "a", "output": "b", "x": [{"y": 1, "y": 1}]}', "duplicate_key", "'y'"),
    ("DA-38 depth 5000", b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}", "too_deep", "32"),
    ("DA-38 depth 33", b'{"instruction": "a", "output": "b", "x": ' + b"[" * 32 + b"]" * 32 + b"}", "too_deep", "32"),
    ("DA-38 open 100000", b"[" * 100_000, "too_deep", "32"),
    ("DA-39 huge number in a text field", b'{"instruction": "a", "output": 1e999}', "not_text", "output is a number"),
    ("DA-39 30 digits in a text field", b'{"instruction": "a", "output": 123456789012345678901234567890}', "not_text", "number"),
    ("5000 digits", b'{"instruction": "a", "output": "b", "x": ' + b"9" * 5000 + b"}", "not_json", "digits"),
    ("DA-40 number", b"3", "not_an_object", "a number"),
    ("DA-40 string", '"一句话"'.encode(), "not_an_object", "text"),
    ("DA-40 true", b"true", "not_an_object", "true or false"),
    ("DA-69 object inside a string", json.dumps(GOOD.decode()).encode(), "not_an_object", "encoded again as text"),
    ("DA-41 array", b"[" + GOOD + b"]", "not_an_object", "a list"),
    ("DA-42 null", b"null", "not_an_object", "null"),
    ("plain text", "一句话".encode(), "not_json", "character 1"),
    ("bad escape", rb'{"instruction": "\x41", "output": "b"}', "not_json", "escape"),
    ("full-width quotes", '{“instruction”: “a”}'.encode(), "not_json", "double quotes"),
    ("no colon", b'{"instruction" "a"}', "not_json", "':'"),
    ("hexadecimal", b'{"instruction": "a", "output": "b", "x": 0x1F}', "not_json", "','"),
    ("leading zero", b'{"instruction": "a", "output": "b", "x": 01}', "not_json", "','"),
    ("empty object", b"{}", "unknown_format", "known format"),
    ("DA-52 no output", b'{"instruction": "a", "input": "b"}', "missing_key", "'output'"),
    ("DA-52 no answer", b'{"instruction": "a"}', "unknown_format", "instruction"),
    ("DA-53 wrong case", b'{"Instruction": "a", "Output": "b"}', "unknown_format", "did you mean 'instruction'"),
    ("DA-53 wrong case of one", b'{"instruction": "a", "input": "", "Output": "b"}', "missing_key", "did you mean 'output'"),
    ("DA-53 blank in the key", b'{"instruction": "a", "input": "", "output ": "b"}', "missing_key", "did you mean 'output'"),
    ("DA-55 null", row(output=None), "not_text", "null"),
    ("DA-55 empty", row(output=""), "empty_answer", "empty"),
    ("DA-55 blanks", row(output=" \n\u3000\t"), "empty_answer", "empty"),
    ("DA-55 zero-width", row(output="\u200b\ufeff\u200d\xad"), "empty_answer", "empty"),
    ("empty question", row(instruction=" ", input=""), "empty_question", "turn 1"),
    ("DA-57 int", row(output=3), "not_text", "a number"),
    ("DA-57 list", row(output=["a"]), "not_text", "a list"),
    ("DA-57 dict", row(output={"a": 1}), "not_text", "an object"),
    ("DA-57 bool", row(output=True), "not_text", "true or false"),
    ("input is a number", row(input=3), "not_text", "input"),
    ("system is a list", row(system=["a"]), "not_text", "system"),
    ("history is text", row(history="a"), "bad_history", "history"),
    ("history of three", row(history=[["a", "b", "c"]]), "bad_history", "[question, answer]"),
    ("history with null", row(history=[[None, "b"]]), "bad_history", "[question, answer]"),
    ("empty turn in history", row(history=[["a", ""]]), "empty_answer", "turn 2"),
    ("DA-69 a row in the answer", row(output=GOOD.decode()), "double_encoded", "output"),
    ("DA-69 escapes in the answer", row(output=r'"\u4f60\u597d"'), "double_encoded", "output"),
    ("DA-69 turns as text", json.dumps({"messages": json.dumps([{"role": "user"}])}).encode(), "double_encoded", "messages"),
    ("DA-65 two formats", message().replace(b"{", b'{"conversations": [], ', 1), "ambiguous", "messages, conversations"),
    ("DA-65 alpaca and messages", message().replace(b"{", b'{"instruction": "a", "output": "b", ', 1), "ambiguous", "instruction"),
    ("DA-62 two users", turns("user", "user", "assistant"), "roles_repeat", "turn 2: user"),
    ("DA-62 two answers", turns("user", "assistant", "assistant"), "roles_repeat", "turn 3"),
    ("DA-62 answer first", turns("assistant", "user", "assistant"), "answer_first", "begins"),
    ("DA-62 ends with user", turns("user", "assistant", "user"), "ends_unanswered", "turn 3"),
    ("DA-62 ends with a tool", turns("user", "assistant", "tool"), "ends_unanswered", "tool"),
    ("DA-62 tool first", turns("tool", "assistant"), "tool_first", "turn 1"),
    ("DA-62 tool after user", turns("user", "tool", "assistant"), "tool_first", "turn 2"),
    ("DA-62 no assistant", turns("user"), "no_answer", "no answer"),
    ("DA-62 only system", turns("system"), "no_answer", "no answer"),
    ("DA-62 system and answer", turns("system", "assistant"), "no_question", "no question"),
    ("DA-62 unknown role", turns("user", "wizard"), "unknown_role", "wizard"),
    ("DA-62 role is a number", message(role=3), "unknown_role", "3"),
    ("DA-62 role missing", b'{"messages": [{"content": "a"}]}', "unknown_role", "turn 1"),
    ("DA-62 empty turn", message(content=" "), "empty_answer", "turn 2"),
    ("DA-64 late system", turns("user", "system", "assistant"), "late_system", "turn 2"),
    ("DA-64 two systems", turns("system", "system", "user", "assistant"), "late_system", "turn 2"),
    ("no turns", b'{"messages": []}', "no_messages", "empty"),
    ("null turns", b'{"messages": null}', "no_messages", "null"),
    ("turns are an object", b'{"messages": {"role": "user"}}', "no_messages", "an object"),
    ("turn is text", b'{"messages": ["a"]}', "bad_turn", "turn 1"),
    ("turn is null", b'{"conversations": [null]}', "bad_turn", "null"),
    ("content is null", message(content=None), "bad_content", "turn 2"),
    ("content is a number", message(content=1), "bad_content", "turn 2"),
    ("content is an empty list", message(content=[]), "bad_content", "a list"),
    ("content is a picture", message(content=[{"type": "text", "text": "a"}, {"type": "image_url"}]), "not_only_text", "image_url"),
    ("value missing", b'{"conversations": [{"from": "human", "say": "a"}]}', "bad_content", "from, say"),
    ("call is no JSON", turns("human", "function_call", key="conversations"), "bad_json_inside", "turn 2"),
    ("call without a name", message(tool_calls=[{"function": {"arguments": {}}}]), "bad_tool_calls", "turn 2"),
    ("calls are text", message(tool_calls="x"), "bad_json_inside", "tool_calls"),
    ("calls are numbers", message(tool_calls=[1]), "bad_tool_calls", "objects"),
    ("arguments are no JSON", message(tool_calls=[{"function": {"name": "w", "arguments": "{"}}]), "bad_json_inside", "arguments"),
    ("half a pair in a call", message(tool_calls=[{"function": {"name": "\ud83d"}}]), "lone_surrogate", "tool_calls"),
    ("half a pair in tools", turns("user", "assistant", tools=[{"name": "\ud83d"}]), "lone_surrogate", "tools"),
    ("infinite argument", message(tool_calls=[{"function": {"name": "w", "arguments": '{"x": 1e999}'}}]), "not_a_number", "turn 2"),
    ("tools are text", turns("user", "assistant", tools="x"), "bad_json_inside", "tools"),
    ("tools are a number", turns("user", "assistant", tools=3), "bad_tools", "tools"),
    ("tool is text", turns("user", "assistant", tools=["x"]), "bad_tools", "objects"),
    ("learn is a word", message(train="yes"), "bad_learn", "'yes'"),
    ("weight is a half", message(weight=0.5), "bad_learn", "0.5"),
    ("thinking is a list", message(reasoning_content=[]), "bad_thinking", "a list"),
    ("only thinking", message(content="<think>a</think>\n"), "only_thinking", "turn 2"),
    ("half a pair in thinking", message(reasoning_content="\ud83d"), "lone_surrogate", "turn 2"),
    ("completion is a list", b'{"prompt": "a", "completion": ["b"]}', "not_text", "completion"),
    ("prompt is empty", b'{"prompt": "", "completion": "b"}', "empty_question", "turn 1"),
    ("answer of a pair is empty", b'{"question": "a", "answer": ""}', "empty_answer", "empty"),
    ("query is a number", b'{"instruct": "a", "query": 1, "answer": "b"}', "not_text", "query"),
    ("two questions inside", row(instruction="Human: a\nHuman: b\nAssistant:"), "roles_repeat", "turn 2"),
    ("an answer inside at the end", row(instruction="Human: a\nAssistant: b"), "roles_repeat", "turn 3"),
    ("an empty answer inside", row(instruction="Human: a\nAssistant:\nHuman: b"), "empty_answer", "turn 2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "reason", "expected"), [case[1:] for case in BAD_LINES], ids=[case[0] for case in BAD_LINES]
)
def test_bad_line_rejects_only_itself(line: bytes, reason: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(around(line))
    good, bad = take(file)
    assert contents_of(good) == [TURNS, TURNS]
    assert [(raw.row, refused.reason) for raw, refused in bad] == [(2, reason)]
    assert expected in bad[0][1].rule
    assert bad[0][0].size > 0


AS_TWO = "two objects with a comma"  # are two elements of an array
BREAKS_ARRAYS = {"not_json", "too_deep"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [case[1:3] for case in BAD_LINES if case[0] != AS_TWO],
    ids=[case[0] for case in BAD_LINES if case[0] != AS_TWO],
)
def test_bad_array_element_is_reported(line: bytes, reason: str, tmp_path: Path) -> None:
    """A bad element that is JSON loses its row; one that is not ends the file, naming the place and the rows before it."""
    file = tmp_path / "a.json"
    file.write_bytes(b"[" + GOOD + b",\n" + line + b",\n" + GOOD + b"]")
    try:
        good, bad = take(file)
    except DataError as error:
        assert reason in BREAKS_ARRAYS or b"\0" in line
        assert re.search(rf"{re.escape(str(file))}:[23]: .*[12] rows before", error.text())
    else:
        assert contents_of(good) == [TURNS, TURNS]
        assert len(bad) == 1
        assert all(refused.reason == reason or b"\0" in line for _, refused in bad)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": 3}', "not_text"),
        (b'{"text": null}', "no_text"),
        (b'{"text": ""}', "empty_text"),
        ('{"text": "\u3000\u200b"}'.encode(), "empty_text"),
        (b'{"content": "a"}', "no_text"),
        (rb'{"text": "\u0000"}', "nul_character"),
        (rb'{"text": "\ud800"}', "lone_surrogate"),
        (b'"a"', "not_an_object"),
    ],
)
def test_bad_document_rejects_only_itself(line: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(around(line, DOCUMENT))
    good, bad = take(tmp_path / "a.jsonl", documents=True)
    assert len(good) == 2
    assert [refused.reason for _, refused in bad] == [reason]


ACCEPTED: list[tuple[str, bytes]] = [
    ("DA-18 escaped pair", rb'{"instruction": "\ud83d\ude00", "output": "a"}'),
    ("DA-23 other line ends", row(output="a\u2028b\u2029c\x85d")),
    ("DA-24 bidi and zero-width", row(output="a\u202eb\u200bc")),
    ("DA-25 NFD", row(output="e\u0301 ｆｕｌｌ")),
    ("DA-26 radicals", row(output="⺼豈﨑")),
    ("DA-39 numbers in ignored fields", row().replace(b"}", b', "id": 123456789012345678901234567890, "x": 1e999}')),
    ("DA-38 depth 32", row().replace(b"}", b', "x": ' + b"[" * 31 + b"]" * 31 + b"}")),
    ("DA-56 empty instruction", row(instruction="", input="问")),
    ("DA-63 control tokens", row(output="<|im_end|></s>[INST]")),
    ("DA-66 extra keys", row(id=1, tags=["a"], nested={"a": None})),
    ("DA-67 punctuation", row(output="。。。")),
    ("JSON is the answer", row(output='{"name": "郑州", "text": "a"}')),
    ("a quoted answer", row(output='"你好"')),
    ("quotes and escapes", row(output='a"b\\c/d\n":')),
    ("blanks around", b" \t" + row() + b" \r"),
    ("U+FEFF before", b"\xef\xbb\xbf" + row()),
]


@pytest.mark.parametrize("line", [case[1] for case in ACCEPTED], ids=[case[0] for case in ACCEPTED])
def test_unusual_valid_line_is_kept(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(around(line))
    good, bad = take(tmp_path / "a.jsonl")
    assert not bad
    value = json.loads(line.strip().removeprefix(b"\xef\xbb\xbf"))
    question = value["instruction"] or value["input"]
    assert contents_of(good) == [TURNS, [("user", question), ("assistant", value["output"])], TURNS]


# -- files ---------------------------------------------------------------------------------------------------------

LINES = as_lines(SIMPLIFIED)
GBK = LINES.decode().encode("gb18030")


def tar(name: str) -> bytes:
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(LINES)
        archive.addfile(info, io.BytesIO(LINES))
    return out.getvalue()


def zipped() -> bytes:
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../a.jsonl", LINES)
    return out.getvalue()


def table(kind: str, change: Callable[[bytes], bytes] = bytes) -> Callable[[], bytes]:
    return lambda: change(as_table(kind)(SIMPLIFIED * 20))


def extension() -> bytes:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    array = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16)))
    out = io.BytesIO()
    parquet.write_table(pa.table({"text": ["a"], "id": array}), out)
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data))


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :]


BAD_FILES: list[tuple[str, str, bytes | Callable[[], bytes], dict[str, Any], str]] = [  # id, name, content, source, message
    ("DA-04 UTF-16 named UTF-8", "a.jsonl", LINES.decode().encode("utf-16-le"), {"encoding": "utf-8"}, "the file is UTF-16"),
    ("DA-05 GBK named UTF-8", "a.jsonl", GBK, {"encoding": "utf-8"}, "the file is GB18030.*encoding: gb18030"),
    ("DA-27 UTF-8 named GB18030", "a.jsonl", LINES, {"encoding": "gb18030"}, "the file is UTF-8"),
    ("DA-27 UTF-8 named Big5", "a.txt", "你好".encode(), {"encoding": "big5"}, "the file is UTF-8"),
    ("DA-27 UTF-8 named Latin-1", "a.txt", "你好".encode(), {"encoding": "latin-1"}, "the file is UTF-8"),
    ("DA-27 ASCII named UTF-16", "a.txt", b"plain text", {"encoding": "utf-16"}, "the file is UTF-8"),
    ("DA-06 GBK named Big5", "a.jsonl", GBK, {"encoding": "big5"}, "the file is GB18030"),
    ("unknown encoding", "a.jsonl", LINES, {"encoding": "utf-99"}, "'utf-99' is not known"),
    ("UTF-16 cut in a letter", "a.txt", "\ufeff你好".encode("utf-16-le")[:-1], {}, "not UTF-16"),
    ("UTF-32 beyond Unicode", "a.txt", b"\xff\xfe\0\0" + b"\xff" * 4, {}, "not UTF-32"),
    ("DA-43 cut array", "a.json", json.dumps(SIMPLIFIED).encode()[:-9], {}, ":1: .*array.*character.*2 rows before"),
    ("DA-43 array without its end", "a.json", b"[" + GOOD + b",\n" + GOOD, {}, ":2: .*nothing follows row 2.*2 rows before"),
    ("array of nothing", "a.json", b"[", {}, "array"),
    ("DA-33 trailing comma", "a.json", b"[" + GOOD + b",]", {}, "Expecting value in row 2.*1 rows"),
    ("no comma", "a.json", b"[" + GOOD + GOOD + b"]", {}, r"'\{' follows row 1"),
    ("wrong bracket", "a.json", b"[" + GOOD + b"}", {}, r"'\}' follows row 1"),
    ("DA-44 trailing garbage", "a.json", b"[" + GOOD + b"]x", {}, "more text follows.*1 rows"),
    ("DA-44 two arrays", "a.json", b"[" + GOOD + b"][]", {}, "more text follows"),
    ("DA-38 deep element", "a.json", b"[" + GOOD + b"," + b"[" * 100_000, {}, "row 2 is nested"),
    ("array of broken bytes", "a.json", b"[" + GOOD + b"\xff" + b"," + GOOD + b"]", {}, "follows row 1"),
    ("DA-45 data", "a.json", json.dumps({"version": "1", "data": SIMPLIFIED}).encode(), {}, r"'data'.*jq.*\.\[\"data\"\]"),
    ("DA-45 indented", "a.json", json.dumps({"data": SIMPLIFIED}, indent=1).encode(), {}, r"'data'.*jq"),
    ("DA-45 large", "a.json", json.dumps({"rows": SIMPLIFIED * 5000}).encode(), {}, "'rows'.*jq"),
    ("DA-45 large and indented", "a.json", json.dumps({"rows": SIMPLIFIED * 5000}, indent=1).encode(), {}, "'rows'.*jq"),
    ("DA-45 columns", "a.json", json.dumps({"instruction": ["a", "b"], "output": ["c", "d"]}).encode(), {}, "whole columns .'instruction'"),
    ("DA-45 pandas", "a.json", json.dumps({"instruction": {"0": "a"}, "output": {"0": "c"}}).encode(), {}, "columns"),
    ("DA-45 one object", "a.json", json.dumps(SIMPLIFIED[0], indent=2).encode(), {}, "over several lines.*jq -c"),
    ("indented objects", "a.jsonl", b"\n".join([json.dumps(SIMPLIFIED[0], indent=2).encode()] * 2), {}, "over several lines"),
    ("DA-46 CR alone", "a.jsonl", LINES.replace(b"\n", b"\r"), {}, "no line end.*\\\\r alone"),
    ("DA-46 CR alone in text", "a.txt", b"a\rb\rc", {}, "no line end"),
    ("DA-46 CR alone in CSV", "a.csv", b"a,b\rc,d", {}, "no line end"),
    ("DA-50 empty", "a.jsonl", b"", {}, "no rows"),
    ("DA-50 blank", "a.jsonl", b"\n \r\n\t\n", {}, "no rows"),
    ("DA-50 blank text", "a.txt", "\n\u3000\n".encode(), {}, "no rows"),
    ("DA-50 mark alone", "a.txt", b"\xef\xbb\xbf", {}, "no rows"),
    ("DA-50 empty array", "a.json", b" [ ] ", {}, "no rows"),
    ("DA-50 header alone", "a.csv", b"instruction,output\n", {}, "no rows"),
    ("DA-50 empty gz", "a.jsonl.gz", gzip.compress(b""), {}, "no rows"),
    ("DA-50 empty parquet", "a.parquet", lambda: as_table("parquet")([{"a": "b"}])[:0], {}, "no rows"),
    ("DA-49 NULs", "a.jsonl", bytes(5000), {}, "only NUL"),
    ("DA-51 LFS", "a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", {}, "LFS pointer.*git lfs pull"),
    ("DA-51 LFS for parquet", "a.parquet", b"version https://git-lfs.github.com/spec/v1\n", {}, "LFS pointer"),
    ("DA-51 HTML", "a.json", b"\n<!DOCTYPE html><html>404", {}, "web page"),
    ("DA-51 HTML in lower case", "a.txt", b"<html lang=zh>", {}, "web page"),
    ("DA-51 XML", "a.jsonl", b'<?xml version="1.0"?><Error>', {}, "web page"),
    ("DA-90 zip in gz", "a.zip.gz", lambda: gzip.compress(zipped()), {}, "compressed with gzip.*unpack it"),
    ("DA-90 tar", "a.tar", lambda: tar("../a.jsonl"), {}, "tar archive"),
    ("DA-90 tar.gz", "a.tar.gz", lambda: gzip.compress(tar("a.jsonl")), {}, "tar archive"),
    ("7z", "a.7z", b"7z\xbc\xaf\x27\x1c" + LINES, {}, "7z archive"),
    ("PDF in xz", "a.txt", lambda: lzma.compress(b"%PDF-1.7\n"), {}, "compressed with xz.*unpack it"),
    ("bzip2", "a.jsonl.bz2", b"BZh91AY&SY", {}, "bzip2"),
    ("pickle", "a.json", b"\x80\x04\x95\x10\0\0\0\0\0\0\0", {}, "pickle"),
    ("DA-87 cut gz", "a.jsonl.gz", lambda: gzip.compress(LINES)[:-9], {}, "gzip data is truncated; [23] rows before"),
    ("DA-87 cut gz header", "a.jsonl.gz", lambda: gzip.compress(LINES)[:9], {}, "truncated; 0 rows"),
    ("DA-87 cut xz", "a.jsonl.xz", lambda: lzma.compress(LINES)[:-20], {}, "xz data is truncated"),
    ("DA-87 cut zst", "a.jsonl.zst", lambda: zstd(LINES)[:-6], {}, "zstd data is truncated"),
    ("DA-88 bad CRC", "a.jsonl.gz", lambda: flipped(gzip.compress(LINES), -6), {}, "gzip data is damaged.*rows before"),
    ("DA-88 flipped gz", "a.jsonl.gz", lambda: flipped(gzip.compress(LINES), 40), {}, "gzip data is damaged"),
    ("DA-88 flipped xz", "a.jsonl.xz", lambda: flipped(lzma.compress(LINES), 60), {}, "xz data is damaged"),
    ("DA-88 flipped zst", "a.jsonl.zst", lambda: flipped(zstd(LINES), 60), {}, "zstd data is damaged"),
    ("DA-88 garbage after gz", "a.jsonl.gz", lambda: gzip.compress(LINES) + b"garbage", {}, "gzip data is damaged"),
    ("compressed twice", "a.jsonl.gz", lambda: gzip.compress(lzma.compress(LINES)), {}, "compressed twice"),
    ("parquet in gz", "a.parquet.gz", lambda: gzip.compress(table("parquet")()), {}, "compressed with gzip"),
    ("DA-91 cut parquet", "a.parquet", table("parquet", lambda data: data[:-20]), {}, "table is damaged"),
    ("DA-91 magic alone", "a.parquet", b"PAR1", {}, "table is damaged"),
    ("DA-91 no parquet", "a.parquet", LINES, {}, "does not begin like a Parquet"),
    ("DA-91 cut arrow", "a.arrow", table("arrow", lambda data: data[:-200]), {}, "table is damaged"),
    ("DA-91 cut stream", "a.arrow", table("stream", lambda data: data[:500]), {}, "table is damaged"),
    ("DA-92 other columns", "a.parquet", lambda: as_table("parquet")([{"x": "a", "y": "b"}]), {}, ":1: .*it has: x, y.*columns: {instruction: x, output: y}"),
    ("DA-93 extension type", "a.parquet", extension, {}, "'id' has an extension type"),
    ("CSV without a header", "a.csv", b"a,,b\nc,d,e\n", {}, ":1: .*name every column"),
    ("CSV with a column twice", "a.csv", b"instruction,output,output\na,b,c\n", {}, "name every column once"),
    ("CSV with an open quote", "a.csv", b'instruction,output\na,b\n"c,d\ne,f\n', {}, ":3: .*not CSV.*1 rows"),
    ("CSV with a quote in the middle", "a.csv", b'instruction,output\na,b\n"c"d,e\n', {}, ":3: .*not CSV.*double each quote"),
    ("DA-54 other keys", "a.jsonl", b'{"ask": "a", "reply": "b", "id": 1}\n' * 3, {}, ":1: .*ask, reply, id.*columns: {instruction: ask, output: reply}"),
    ("DA-54 wrong case", "a.jsonl", b'{"Instruction": "a", "Output": "b"}\n', {}, "did you mean.*columns: {instruction: Instruction, output: Output}"),
    ("plain text", "a.txt", "一段文字\n".encode(), {}, ":1: .*known format.*prepare.documents"),
    ("text rows", "a.jsonl", b'{"text": "a"}\n', {}, "prepare.documents"),
    ("text named as format", "a.jsonl", b'{"text": "a"}\n', {"format": "text"}, "not a dialogue"),
    ("preferences", "a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', {}, ":1: .*preference data .chosen, rejected"),
    ("KTO", "a.jsonl", b'{"prompt": "a", "completion": "b", "label": false}\n', {}, "preference data .label"),
    ("placeholder", "a.jsonl", row(output="我是{{name}}"), {}, "{{name}} is not filled"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "source", "expected"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES]
)
def test_bad_file_is_refused_by_name(
    name: str, content: bytes | Callable[[], bytes], source: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content())
    with pytest.raises(DataError) as caught:
        take(file, **source)
    text = caught.value.text().replace("\n", " ")
    assert not isinstance(caught.value, RowRejected)
    assert "placeholder" in text or str(file) in text
    assert re.search(expected, text), text


@pytest.mark.parametrize("name", ["a.zip", "a.jsonl"])
def test_zip_is_read_whatever_its_name(name: str, tmp_path: Path) -> None:
    """DA-90. A member's name leads nowhere: it is only shown."""
    (tmp_path / name).write_bytes(zipped())
    good, bad = take(tmp_path / name)
    assert len(good) == LINES.count(b"\n") and not bad
    assert {record.origin.file for record in good} == {f"{tmp_path / name}/../a.jsonl"}
    assert [one.name for one in tmp_path.iterdir()] == [name]


def test_bad_csv_rows_are_rejected(tmp_path: Path) -> None:
    content = "instruction,output\n好,是\na,b,c\n一\n好,\n".encode() + b"\xff,d\n" + '“问”,"答\n二"\n'.encode()
    (tmp_path / "a.csv").write_bytes(content)
    good, bad = take(tmp_path / "a.csv")
    assert contents_of(good) == [[("user", "好"), ("assistant", "是")], [("user", "“问”"), ("assistant", "答\n二")]]
    assert [(raw.row, refused.reason) for raw, refused in bad] == [
        (3, "bad_columns"),
        (4, "bad_columns"),
        (5, "empty_answer"),
        (6, "not_utf8"),
    ]
    assert "3 columns, the header has 2" in bad[0][1].rule
    assert good[1].origin.row == 7


def test_non_text_parquet_values_are_rejected(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import datetime

    from pyarrow import parquet

    table = pa.table(
        {
            "instruction": pa.array(["问", "问", "问"]),
            "output": pa.array([datetime.date(2020, 1, 1)] * 3),
            "score": [float("nan"), 1.0, None],
            "binary": [b"\xff", None, None],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    good, bad = take(tmp_path / "a.parquet")
    assert not good
    assert [refused.reason for _, refused in bad] == ["not_text"] * 3
    for raw, _ in bad:
        json.dumps(raw.value, allow_nan=False)
    broken = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array(["好", "\x7f"], pa.string()).buffers()[1:]])
    raw_bytes = bytearray(broken.buffers()[2].to_pybytes())
    raw_bytes[3] = 0xFF
    broken = pa.Array.from_buffers(pa.string(), 2, [None, broken.buffers()[1], pa.py_buffer(bytes(raw_bytes))])
    parquet.write_table(pa.table({"text": broken}), tmp_path / "b.parquet")
    good, bad = take(tmp_path / "b.parquet", documents=True)
    assert contents_of(good) == ["好"]
    assert [(raw.row, raw.reason) for raw, _ in bad] == [(2, "not_utf8")]


def test_invalid_bytes_reject_their_lines(tmp_path: Path) -> None:
    lines = GBK.split(b"\n")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines[:3], lines[0][:-3] + b"\xff\xff}", LINES.split(b"\n")[0]]))
    good, bad = take(tmp_path / "a.jsonl")
    assert len(good) == 3
    assert [(raw.row, raw.reason) for raw, _ in bad] == [(4, "bad_bytes"), (5, "bad_bytes")]
    assert "UTF-8 in a GB18030 file" in bad[1][1].rule


def test_lone_surrogate_in_utf16_rejects_its_row(tmp_path: Path) -> None:
    text = "今天天气很好。\n一\ud800二\n我们去公园。\n"
    (tmp_path / "a.txt").write_bytes(("\ufeff" + text).encode("utf-16-le", "surrogatepass"))
    good, bad = take(tmp_path / "a.txt", documents=True)
    assert contents_of(good) == ["今天天气很好。", "我们去公园。"]
    assert [raw.row for raw, _ in bad] == [2]


def test_truncated_last_line_is_rejected(tmp_path: Path) -> None:
    """DA-12, DA-21, DA-30: a truncated last line is bad, wherever it is cut."""
    for cut in range(1, 40):
        (tmp_path / "a.jsonl").write_bytes((GOOD + b"\n") * 2 + GOOD[:-cut])
        good, bad = take(tmp_path / "a.jsonl")
        assert (len(good), len(bad)) == (2, 1)
        assert "truncated" in bad[0][1].rule, cut
    (tmp_path / "a.jsonl").write_bytes((GOOD + b"\n") * 2 + bytes(100_000))
    good, bad = take(tmp_path / "a.jsonl")
    assert (len(good), len(bad)) == (2, 1)
    assert bad[0][1].reason == "nul_character" and "100,000 NUL" in bad[0][1].rule
    assert len(bad[0][0].value) < 100


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_overlong_line_rejects_only_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DA-48."""
    monkeypatch.setattr(reader, "CAP", 1 << 16)
    monkeypatch.setattr(files, "BLOCK", 1 << 12)
    (tmp_path / name).write_bytes(around(b'{"instruction": "' + b"a" * 200_000 + b'"}') + GOOD + b"\n" + GOOD)
    good, bad = take(tmp_path / name)
    assert contents_of(good) == [TURNS] * 4
    assert [record.origin.row for record in good] == [1, 3, 4, 5]
    assert [(raw.row, raw.reason) for raw, _ in bad] == [(2, "too_large")]
    assert bad[0][0].size == 200_019


def test_oversized_records_are_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CAP", 1000)
    (tmp_path / "a.txt").write_text("短\n\n" + "很长的一段\n" * 1000 + "\n短\n", encoding="utf-8")
    good, bad = take(tmp_path / "a.txt", documents=True, records="paragraph")
    assert contents_of(good) == ["短", "短"]
    assert [(raw.row, raw.reason, len(raw.value)) for raw, _ in bad] == [(3, "too_large", 200)]
    (tmp_path / "a.json").write_bytes(b"[" + GOOD + b',{"a": "' + b"a" * 4000 + b'"}]')
    monkeypatch.setattr(json_array, "CAP", 1000)
    monkeypatch.setattr(files, "BLOCK", 100)
    with pytest.raises(DataError, match="row 2 is larger than 1,000 bytes"):
        take(tmp_path / "a.json")


def test_huge_file_without_line_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DA-49: the reader does not read on to its end."""
    monkeypatch.setattr(reader, "CAP", 1 << 16)
    monkeypatch.setattr(reader, "_SKIP", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"a" * (3 << 20))
    with pytest.raises(DataError, match=r"a.txt: no line end within"):
        take(tmp_path / "a.txt", documents=True)
    with (tmp_path / "sparse.jsonl").open("wb") as stream:
        stream.truncate(2 << 30)
    started = time.monotonic()
    with pytest.raises(DataError, match="only NUL"):
        take(tmp_path / "sparse.jsonl")
    assert time.monotonic() - started < 10  # reading on takes minutes


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstd])
def test_compression_bomb_is_refused(
    pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DA-89."""
    monkeypatch.setattr(files, "BOMB_BYTES", 1 << 21)
    (tmp_path / "a.txt").write_bytes(pack((b"a" * 999 + b"\n") * (8 << 10)))
    with pytest.raises(DataError, match=r"a.txt: .*bytes unpack to more than"):
        take(tmp_path / "a.txt", documents=True)


def test_parquet_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BOMB_BYTES", 1 << 10)
    monkeypatch.setattr(files, "BOMB_RATIO", 0)
    (tmp_path / "a.parquet").write_bytes(as_table("parquet")(SIMPLIFIED * 100))
    with pytest.raises(DataError, match="it would unpack"):
        take(tmp_path / "a.parquet")


@pytest.mark.parametrize("change", ["grow", "touch", "replace", "remove"])
def test_file_changed_during_reading_is_refused(change: str, tmp_path: Path) -> None:
    """DA-96."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(LINES)
    reading = read_rows(file)
    next(reading)
    if change == "grow":
        file.write_bytes(LINES + LINES)
    elif change == "touch":
        os.utime(file, ns=(1, 1))
    elif change == "replace":
        (tmp_path / "b").write_bytes(LINES)
        (tmp_path / "b").replace(file)
    else:
        file.unlink()
    with pytest.raises(DataError, match=r"a.jsonl: this file changed while it was being read"):
        list(reading)


def test_missing_pyarrow_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from tongwen.core.errors import MissingPackage

    (tmp_path / "a.parquet").write_bytes(as_table("parquet")(SIMPLIFIED))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match=r"tongwen\[parquet\]"):
        take(tmp_path / "a.parquet")


# -- places --------------------------------------------------------------------------------------------------------


def places(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, pattern of the message) for paths that are no data file."""
    os.mkfifo(folder / "fifo.jsonl")
    yield str(folder / "fifo.jsonl"), "this is a FIFO"
    yield str(folder / "f*.jsonl"), "this is a FIFO"
    yield "/dev/null", "this is a device"
    yield "/dev/zero", "this is a device"
    yield str(folder / "none.jsonl"), "no such file.*current folder"
    yield str(folder / "none*.jsonl"), "no such file"
    yield str(folder / "fifo.jsonl" / "x"), "no such file"
    yield "", "no such file|no data file|FIFO"
    yield "a\0b", "NUL"
    yield "x" * 5000, "too long"
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    yield str(folder / "loop.jsonl"), "leads to itself"
    (folder / "nowhere.jsonl").symlink_to(folder / "gone.jsonl")
    yield str(folder / "nowhere.jsonl"), "link to a file that does not exist"
    for name in ("empty", "code", "linked", "special", "dangling", "archives"):
        (folder / name).mkdir()
    yield str(folder / "empty"), "no data file"
    (folder / "code" / "a.py").write_text("x")
    yield str(folder / "code"), "no data file"
    (folder / "linked" / "back").symlink_to(folder / "linked")
    yield str(folder / "linked"), "leads back"
    os.mkfifo(folder / "special" / "a.json")
    yield str(folder / "special"), "FIFO"
    (folder / "dangling" / "a.json").symlink_to("nothing")
    yield str(folder / "dangling"), "broken link"
    (folder / "archives" / "a.7z").write_bytes(b"7z")
    yield str(folder / "archives"), "only .zip is read; unpack a.7z"


def test_non_file_path_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DA-95."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path, expected in places(tmp_path):
        started = time.monotonic()
        with pytest.raises(DataError) as caught:
            find_files(path)
        assert re.search(expected, caught.value.text().replace("\n", " ")), (path, caught.value.text())
        assert time.monotonic() - started < 10  # opening a FIFO waits for ever
    with pytest.raises(DataError, match="FIFO"):
        list(read_rows(tmp_path / "fifo.jsonl"))


def test_unreadable_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(DataError, match=r"a\.jsonl: no permission to read this[\s\S]*chmod \+r"):
        find_files(str(tmp_path / "a.jsonl"))


# -- mutations -----------------------------------------------------------------------------------------------------

HOSTILE = [
    b"\0", bytes(100), b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\r\r\n", b"\n\n", b"{", b"}", b"[", b"]", b'"', b"\\",
    b",", b"NaN", b"null\n", b"\n3\n", b"\n[]\n", b"\n{}\n", b'\n"x"\n', b"\n" + b"[" * 3000 + b"\n", b"// x\n", b"\x1a", b"\x1b[2J",
    b"\n{'a': 1}\n", b'\n{"a": 1, "a": 2}\n', b"\\ud800", b"\\u0000", "\n中文\n".encode("gb18030"), "\u2028".encode(), "\u3000\n".encode(),
    b"<html>", b"9" * 5000, b"-", b"1e999", b'\n{"instruction": "a"}\n', b"{{name}}", b"\x1f\x8b",
]  # fmt: skip
NUMBERED = [
    {"instruction": f"第{number}个问题：今天天气怎么样？", "input": "", "output": f"第{number}个回答，“很好”。"}
    for number in range(200)
]
HOLDERS: dict[str, bytes] = {
    "a.jsonl": as_lines(NUMBERED),
    "a.json": json.dumps(NUMBERED, ensure_ascii=False, indent=1).encode(),
    "a.csv": as_csv(NUMBERED),
    "a.txt": "".join(row["output"] + "\n" for row in NUMBERED).encode(),
    "a.jsonl.gz": gzip.compress(as_lines(NUMBERED), mtime=0),
}


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Damage a file once: truncate, flip a bit, drop, double or splice bytes, swap lines, insert a hostile fragment."""
    begin, end = sorted(dice.sample(range(len(data)), 2))
    end = min(end, begin + 400)
    match dice.randrange(7):
        case 0:
            return data[:begin]
        case 1:
            return flipped_bit(data, begin, dice.randrange(8))
        case 2:
            return data[:begin] + data[end:]
        case 3:
            return data[:end] + data[begin:]
        case 4:
            other = HOLDERS[dice.choice(sorted(HOLDERS))]
            place = dice.randrange(len(other))
            return data[:begin] + other[place : place + 300] + data[begin:]
        case 5:
            lines = data.split(b"\n")
            one, two = dice.randrange(len(lines)), dice.randrange(len(lines))
            lines[one], lines[two] = lines[two], lines[one]
            return b"\n".join(lines)
        case _:
            return data[:begin] + dice.choice(HOSTILE) + data[begin:]


def flipped_bit(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def lines_by_themselves(data: bytes) -> tuple[int, list[str]]:
    """Return (rows, answers of the good ones) as found by a simple reader: split lines, json.loads."""
    count, answers = 0, []
    for line in data.split(b"\n"):
        text = line.decode("utf-8", "replace").rstrip("\r").removeprefix("\ufeff")
        if not text.strip():
            continue
        count += 1
        try:
            value = json.loads(line.decode().removeprefix("\ufeff"))
            if all(isinstance(value[key], str) for key in ("instruction", "output")) and value["output"].strip():
                answers.append(value["output"])
        except (ValueError, RecursionError, KeyError, TypeError):
            pass
    return count, answers


@pytest.mark.parametrize("name", HOLDERS)
def test_random_damage_gives_rows_or_a_data_error(name: str, tmp_path: Path) -> None:
    """80 seeded damages: only DataError is raised, nothing hangs, and no row is invented or silently lost."""
    dice = random.Random(f"accidents of {name}")
    known = {row["output"] for row in NUMBERED}
    refused = untouched = 0
    for number in range(80):
        data = mutated(HOLDERS[name], dice)
        file = tmp_path / name
        file.write_bytes(data)
        started = time.process_time()
        try:
            good, bad = take(file, documents=name.endswith("txt"))
        except DataError as error:
            refused += 1
            assert str(file) in error.text() or "not filled" in error.text(), (number, error.text())
            good, bad = [], []
        else:
            assert good or bad
        assert time.process_time() - started < 10, number
        answers = [record.text if name.endswith("txt") else record.messages[-1].content for record in good]
        untouched += len(known.intersection(answers))
        for raw, why in bad:
            assert raw.row > 0 and why.reason and why.rule
            json.dumps(raw.value, ensure_ascii=False).encode("utf-8", "backslashreplace")
        if name == "a.jsonl" and good:
            count, found = lines_by_themselves(data)
            assert len(good) + len(bad) == count, number
            assert set(answers) <= set(found), number
            assert len(found) - len(answers) <= 2, number
    ends_the_file = {"a.jsonl": 10, "a.json": 70, "a.csv": 40, "a.txt": 10, "a.jsonl.gz": 80}
    assert refused <= ends_the_file[name]
    assert untouched >= 100 * (80 - refused) or name.endswith("gz")
