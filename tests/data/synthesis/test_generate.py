"""Synthesis: good rows are kept with their provenance, and each request is paid for once."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.synthesis.endpoint_faults import storm
from tongwen.core import openai_client
from tongwen.core.errors import MachineError, RecipeError, RowRejected
from tongwen.data.synthesis import client, generate
from tongwen.data.synthesis.journal import Reply, ReplyJournal
from tongwen.data.synthesis.parse import ParsedTask, read_blocks, read_json
from tongwen.data.synthesis.similarity import SimilarityIndex, rouge_l, terms
from tongwen.recipe.data import Synthesize


def section(url: str = "http://127.0.0.1:1/v1", **settings: Any) -> Synthesize:
    quick = {"method": "topics", "rows": 3, "concurrency": 1, "seconds": 60.0, "pause": 0.01, "attempts": 3}
    return Synthesize.model_validate({"endpoint": url, "model": "m", **quick, **settings})


def ask(settings: Synthesize, prompts: tuple[str, ...] = ("q",)) -> list[Any]:
    """What an endpoint answers to some prompts at once, errors among it."""

    async def work() -> list[Any]:
        endpoint = client.SynthesisClient(settings, client.SpendingMeter(settings), lambda text: None)
        async with endpoint.client:
            return await asyncio.gather(
                *(endpoint.complete(prompt, generate.SCHEMA) for prompt in prompts), return_exceptions=True
            )

    return asyncio.run(work())


def write_recipe(folder: Path, url: str, extra: str = "", **settings: Any) -> Path:
    values = {"endpoint": url, "model": "m", "method": "topics", "rows": 6, "seconds": 60, "pause": 0.01} | settings
    recipe = folder / "recipe.yaml"
    text = json.dumps(values, ensure_ascii=False)
    recipe.write_text(f"name: s\nbase: none\nout: {folder / 'out'}\nsynthesize: {text}\n{extra}", encoding="utf-8")
    return recipe


def rows_of(folder: Path, name: str = "dialogues") -> list[dict[str, Any]]:
    file = folder / "out" / "synthesize" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


# -- what a reply holds --------------------------------------------------------------------------------------------


def found(items: Iterator[ParsedTask | RowRejected]) -> list[Any]:
    return [
        item.reason if isinstance(item, RowRejected) else (item.instruction, item.input, item.output) for item in items
    ]


def test_belle_blocks_are_parsed() -> None:
    text = (
        " 写一首诗\n4. 输入:\n<无输入>\n4. 输出:\n春眠\n不觉晓\n###\n5. 指令：翻译\n5. 输入：\n你好\n5. 输出：\nhello 5.\n"
        "###\n6. 指令: 没有输出\n6. 输入: x\n###\n7. 指令: 甲\n7. 输入: 乙\n7. 输出: 丙\n8. 指令: 丁\n8. 输入: 戊\n8. 输出: 己\n###\n9. 指令: 半"
    )
    expected = [("写一首诗", "", "春眠\n不觉晓"), ("翻译", "你好", "hello"), "malformed", ("甲", "乙", "丙")]
    assert found(read_blocks(text, "stop", 4)) == [*expected, "malformed"]
    assert sorted(map(str, found(read_blocks(text, "length", 4)))) == sorted(map(str, [*expected, "cut_off"]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"items": [{"instruction": "a", "input": "", "output": "b"}]}', [("a", "", "b")]),
        ('```json\n[{"instruction": "a", "output": "b"}]\n```', [("a", "", "b")]),
        (
            '好的：\n{"instruction": "a", "output": "{b}"}\n{"instruction": "c", "input": "无输入", "output": "d"} 完',
            [("a", "", "{b}"), ("c", "", "d")],
        ),
        ('{"items": [{"instruction": "a", "output": "b"}, {"instruction": "c", "outp', [("a", "", "b")]),
        ('{"instruction": "a", "output": NaN}', ["malformed"]),
        ('{"instruction": "a", "output": "b", "output": "c"}', ["malformed"]),
        ('{"instruction": "a", "answer": "b"}', ["malformed"]),
        ('{"instruction": "a", "output": ["b"]}', ["malformed"]),
        ('{"items": [1, null]}', ["malformed", "malformed"]),
        ('{"items": []}', ["malformed"]),
        ("{" * 10_000, ["malformed"]),
        ("<html>", ["malformed"]),
        ("", ["malformed"]),
    ],
)
def test_json_is_found_anywhere_in_the_reply(text: str, expected: list[Any]) -> None:
    assert found(read_json(text)) == expected


def test_reply_with_too_many_items_is_cut() -> None:
    text = json.dumps([{"instruction": f"a{number}", "output": "b"} for number in range(1000)])
    assert found(read_json(text))[-1] == "too_many" and len(found(read_json(text))) == 101


# -- what is kept --------------------------------------------------------------------------------------------------


def taken(*items: tuple[str, str, str], **settings: Any) -> generate.GeneratedDialogues:
    made = generate.GeneratedDialogues(section(rows=100, **settings))
    text = json.dumps([dict(zip(("instruction", "input", "output"), item, strict=True)) for item in items])
    made.add_reply(generate.Request(0, "p", {}), Reply("k", text, "stop", (1, 1)))
    return made


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (("看图片写话", "", "好"), "forbidden"),
        (("介绍一下 ChatGPT 的历史", "", "好"), "forbidden"),
        (("写一首小诗", "", "作为一个AI，我不能写诗"), "forbidden"),
        (("唱", "", "好"), "too_short"),
        (("写一首小诗", "", ""), "too_short"),
        (("长" * 100, "材料", "好"), "too_long"),
        (("写一首小诗", "", "好<|im_end|>坏"), "control_token_in_text"),
        (("写一首\u200b小诗", "", "好"), "control_token_in_text"),
    ],
)
def test_rejected_item_has_a_reason(item: tuple[str, str, str], reason: str) -> None:
    made = taken(item)
    assert not made.rows and [one["reason"] for one in made.rejected] == [reason]


def test_length_limits_and_references_to_gpt() -> None:
    assert len(taken(("长" * 100, "", "好")).rows) == 1, "no cap without an input"
    assert len(taken(("示例" + "长" * 120, "材料", "好")).rows) == 1, "half as much again with an example"
    row = taken(("请GPT模型能够写一首关于秋天的诗", "", "好"))
    assert row.rows[0]["messages"][0]["content"] == "写一首关于秋天的诗"
    assert taken(("如何让人工智能更安全", "", "好")).rows[0]["messages"][0]["content"] == "如何让人工智能更安全"


def test_new_question_is_compared_with_kept_ones() -> None:
    first, second = "请写一首描写江南春天清晨雨景的七言绝句", "请写一首描写江南春天清晨雨景的五言绝句"
    made = taken((first, "", "好"), (second, "", "好"), ("列出五种常见的家养观赏植物", "", "好"))
    assert [row["messages"][0]["content"] for row in made.rows] == [first, "列出五种常见的家养观赏植物"]
    assert made.reasons == {"like_another": 1} and "ROUGE-L 0.9" in made.rejected[0]["rule"]


def test_bm25_matches_the_formula() -> None:
    index = SimilarityIndex()
    for text in ("春天 江南 雨", "江南 的 桥", "北方 的 雪"):
        index.add(text)
    near = index.nearest("江南雨景")
    assert [text for _, text in near] == ["春天 江南 雨", "江南 的 桥"], "what shares more rare words comes first"
    single = SimilarityIndex()
    single.add("a b")
    # log(1 + (1 - 1 + .5) / (1 + .5)) * 1 * 2.5 / (1 + 1.5)
    assert single.nearest("a")[0][0] == pytest.approx(0.28768, abs=1e-5)
    assert terms("Hello世界你好") == ["hello", "世界", "界你", "你好"]
    assert rouge_l("abcd", "abcd") == 1 and rouge_l("abcd", "acxd") == 0.75 and rouge_l("", "") == 0


def test_shipped_seeds_and_prompts() -> None:
    seeds = generate.shipped_seeds()
    texts = generate._prompts()
    assert (len(seeds), len(set(texts["topics"])), len(set(texts["kinds"]))) == (40, 82, 14)
    prompts = [next(make).prompt for make in (generate.self_instruct(seeds, 1), generate.by_topics([], 1))]
    assert prompts[0].endswith("###\n4. 指令:") and prompts[0].count("输出:\n") == 3
    assert (
        '{"items": [{"instruction": "…"' in prompts[1] and sum(topic in prompts[1] for topic in texts["topics"]) >= 10
    )
    again = [next(make).prompt for make in (generate.self_instruct(seeds, 1), generate.by_topics([], 1))]
    assert again == prompts != [next(generate.self_instruct(seeds, 2)).prompt, prompts[1]]
    pieces = list(generate.about_documents([("字" * 2500, "f:1"), ("短", "f:2")]))
    assert [piece.number for piece in pieces] == [0, 1, 2] and pieces[2].source == {"document": "f:1", "begin": 2400}


# -- the journal ---------------------------------------------------------------------------------------------------


def test_truncated_journal_loses_at_most_one_line(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    with ReplyJournal(file) as journal:
        for number in range(5):
            journal.add(Reply(f"k{number}", "好\n", "stop", (1, 2)))
    whole = file.read_bytes()
    for cut in range(len(whole) - 200, len(whole) + 1):
        file.write_bytes(whole[:cut])
        with ReplyJournal(file) as journal:
            assert len(journal.replies) == whole[:cut].count(b"\n")
            journal.add(Reply("new", "x", "stop", (1, 2)))
        with ReplyJournal(file) as journal:
            assert "new" in journal.replies
    file.write_bytes(whole.replace(b'"k1"', b'"k1', 1))
    with ReplyJournal(file) as journal:  # a damaged line costs its own reply
        assert set(journal.replies) == {"k0", "k2", "k3", "k4"}


# -- the endpoint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "529", "broken", "cut", "content_filter", "sleep 4", "drip 0.5", "429 0.02"])
def test_transient_error_is_retried(faults: Callable[..., Any], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "retry_after", lambda headers: 0.02)
    seconds = (
        2.0 if fault.startswith(("sleep", "drip")) else 60.0
    )  # a busy machine may hold up a sound answer for a second
    server = faults(lambda prompt, times: fault if times < 2 else "")
    assert ask(section(server.url, seconds=seconds))[0][0] == storm.answer("q")
    assert server.requests["q"] == 3
    server = faults(fault)
    (error,) = ask(section(server.url, seconds=seconds / 2))
    assert isinstance(error, client.RequestFailed) and str(error) and server.requests["q"] == 3


def test_retry_after_header_sets_the_wait() -> None:
    from datetime import datetime, timedelta, timezone
    from email.utils import format_datetime

    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30))
    expected = {"2": 2, "0.5": 0.5, "1000000": 120, "-3": 1, "x": 1, "": 1, "nan": 1}
    assert {text: client.retry_after({"retry-after": text}) for text in expected} == expected
    assert 25 < client.retry_after({"retry-after": soon}) <= 30
    assert client.retry_after({}) == 1


@pytest.mark.parametrize("fault", ["400", "401", "403", "404", "422", "quota", "html", "redirect http://127.0.0.2:9/"])
def test_permanent_error_is_not_retried(faults: Callable[..., Any], fault: str) -> None:
    server = faults(fault)
    (error,) = ask(section(server.url, json_schema="off"))
    assert isinstance(error, RecipeError) and "synthesize.endpoint" in error.text()
    assert server.requests["q"] == 1


def test_oversized_or_compressed_reply_is_an_error(faults: Callable[..., Any]) -> None:
    for fault in ("large", "packed"):
        (error,) = ask(section(faults(fault).url, attempts=1, seconds=20.0))
        assert isinstance(error, client.RequestFailed), error


def test_outage_is_probed_by_one_request_at_a_time(faults: Callable[..., Any]) -> None:
    began = time.monotonic()
    server = faults(lambda prompt, times: "500" if time.monotonic() - began < 1.5 else "")
    answers = ask(section(server.url, pause=0.2, attempts=30), tuple(f"q{number}" for number in range(8)))
    assert all(isinstance(answer, tuple) for answer in answers), "and then it continues by itself"
    failed = [when for when, _, fault, _ in server.log if fault]
    assert len(failed) <= 8 + 5, "eight began before the outage was known"


def test_json_schema_is_sent_if_supported(faults: Callable[..., Any]) -> None:
    server = faults(lambda prompt, times: "400 response_format is not supported" if times < 1 else "")
    assert ask(section(server.url))[0][0] == storm.answer("q")
    assert ["response_format" in body for body in server.bodies] == [True, False]


def test_spending_limit_is_never_exceeded(faults: Callable[..., Any]) -> None:
    server = faults()
    price = {"input": 1.0, "output": 2.0}
    caps = ({"requests": 2}, {"tokens": 2 * 150 + 50}, {"money": 0.00055})
    for cap in caps:
        before = sum(server.requests.values())
        settings = section(server.url, at_most=cap, price=price, max_tokens=100, concurrency=1)

        async def work(settings: Synthesize = settings) -> client.SpendingMeter:
            spending = client.SpendingMeter(settings)
            endpoint = client.SynthesisClient(settings, spending, lambda text: None)
            async with endpoint.client:
                with pytest.raises(MachineError, match="the same command continues"):
                    for number in range(5):
                        await endpoint.complete(f"q{number}", None)
            return spending

        spending = asyncio.run(work())
        assert (
            sum(server.requests.values()) - before == 2
            and spending.tokens == [200, 100]
            and spending.reserved == [0, 0]
        )


@pytest.mark.parametrize(
    "address", ["http://example.com/v1", "https://me:secret@example.com/v1", "ftp://x", "example.com"]
)
def test_api_key_is_refused_for_unsafe_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(RecipeError) as caught:
        openai_client.check_address(address, "synthesize.endpoint")
    assert "secret" not in caught.value.text() and "https://HOST/v1" in caught.value.text()


# -- the stage -----------------------------------------------------------------------------------------------------


def test_synthesized_rows_are_an_input_of_prepare(
    faults: Callable[..., Any], tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-4711")
    server = faults(seconds=0.01)
    recipe = write_recipe(tmp_path, server.url, "prepare: {held_out: 1}\n")
    code, out, _ = tongwen("check", recipe)
    assert code == 0 and "synthesize has not generated its data yet" in out
    code, out, err = tongwen("run", recipe)
    assert code == 0, err
    rows = rows_of(tmp_path)
    assert len(rows) == 6 and [row["meta"]["request"] for row in rows] == list(range(6))
    assert rows[0]["meta"]["model"] == "m" and rows[0]["meta"]["from"]["topics"]
    prepared = (tmp_path / "out/prepare/dialogues.jsonl").read_text("utf-8").splitlines()
    assert len(prepared) == 5
    assert server.log[0][3]["authorization"] == "Bearer sk-canary-4711"
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(b"canary" in data for data in written) and "canary" not in out + err
    assert tongwen("run", recipe)[0] == 0 and sum(server.requests.values()) <= 6 + 8, (
        "finished requests are not repeated"
    )


def test_reply_order_does_not_change_the_result(faults: Callable[..., Any], tongwen: Any, tmp_path: Path) -> None:
    made = []
    for name, wait in (("one", 0.0), ("other", 0.03)):
        folder = tmp_path / name
        folder.mkdir()
        server = faults(lambda prompt, times, wait=wait: f"sleep {wait * (len(prompt) % 5)}")
        assert tongwen("run", write_recipe(folder, server.url, rows=12))[0] == 0
        made.append([row["messages"] for row in rows_of(folder)])
    assert made[0] == made[1]


def test_repeated_replies_end_the_run(faults: Callable[..., Any], tongwen: Any, tmp_path: Path) -> None:
    server = faults(answer=lambda prompt: storm.answer("the same"))
    code, out, _ = tongwen("run", write_recipe(tmp_path, server.url, stale=5, concurrency=2))
    assert code == 0 and len(rows_of(tmp_path)) == 1 and "nothing new" in out
    assert {row["reason"] for row in rows_of(tmp_path, "rejected")} == {"like_another"}
    assert sum(server.requests.values()) <= 6 + 4


def test_self_instruct_with_a_seed_file(faults: Callable[..., Any], tongwen: Any, tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.jsonl"
    rows = [{"id": "s", "instruction": f"任务{n}", "instances": [{"input": "", "output": "好"}]} for n in range(4)]
    seeds.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    reply = " 列出三种江南的早点\n4. 输入:\n<无输入>\n4. 输出:\n生煎、锅贴、豆浆\n###\n5. 指令: 任务1\n5. 输入:\n\n5. 输出:\n好\n"
    server = faults(answer=lambda prompt: reply)
    code, _, err = tongwen("run", write_recipe(tmp_path, server.url, method="self_instruct", seeds=str(seeds), rows=1))
    assert code == 0, err
    assert rows_of(tmp_path)[0]["messages"][1]["content"] == "生煎、锅贴、豆浆"
    assert "任务" in next(iter(server.requests)) and not set(server.requests) & set(
        generate._prompts()["seeds"][0].values()
    )
    seeds.write_text('{"instruction": "x"}\n')
    code, _, err = tongwen(
        "run", write_recipe(tmp_path, server.url, method="self_instruct", seeds=str(seeds)), "--again"
    )
    assert code == 3 and "seeds.jsonl:1" in err and "instances" in err


GOOD = {"instruction": "写", "instances": [{"input": "", "output": "好"}]}


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"instruction": "写", "instances": []}, ["instances[0].output", "it has instruction, instances"]),
        ({"instruction": "写", "instances": "好"}, ["instances[0].output"]),
        ({"instruction": "写", "instances": [{"input": 3, "output": "好"}]}, ["no text in instances[0].input"]),
        ({"instruction": "写", "instances": [{"input": "", "output": " "}]}, ["no text in instances[0].output"]),
        ({"instruction": ["写"], "instances": GOOD["instances"]}, ["no text in instruction"]),
        ({"instruction": "写", "output": "好"}, ["instances[0].output", "it has instruction, output"]),
        ({}, ["instruction, instances[0].output", "no keys"]),
        ("写", ["a row must be an object"]),
    ],
)
def test_seed_task_of_the_wrong_shape_is_named(row: Any, parts: list[str], tongwen: Any, tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.json"
    seeds.write_text(json.dumps([GOOD, row], ensure_ascii=False), encoding="utf-8")
    settings = {"method": "self_instruct", "seeds": str(seeds)}
    code, _, err = tongwen("run", write_recipe(tmp_path, "http://127.0.0.1:1/v1", **settings))
    assert code == 3 and "seeds.json:2" in err
    for part in parts:
        assert part in err


def test_too_few_seed_tasks_are_refused(tongwen: Any, tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.json"
    seeds.write_text(json.dumps([GOOD, GOOD]), encoding="utf-8")
    recipe = write_recipe(tmp_path, "http://127.0.0.1:1/v1", method="self_instruct", seeds=str(seeds))
    code, _, err = tongwen("run", recipe)
    assert code == 3 and "only 2 seed tasks" in err and "each prompt needs 3" in err


def test_web_page_as_endpoint_is_refused(faults: Callable[..., Any], tongwen: Any, tmp_path: Path) -> None:
    server = faults("html")
    code, _, err = tongwen("run", write_recipe(tmp_path, server.url, concurrency=1))
    assert code == 2 and "web page" in err and "synthesize.endpoint" in err and "/v1" in err
    assert sum(server.requests.values()) == 1


def test_documents_become_multi_turn_dialogues(faults: Callable[..., Any], tongwen: Any, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text(
        "西湖在杭州城西，三面环山，一面临城，自唐代以来就是游览的地方，白居易和苏轼都在这里修过堤。\n", encoding="utf-8"
    )
    items = [{"instruction": f"西湖的第{n}个问题是什么呢", "input": "", "output": f"答{n}"} for n in "一二三"]
    server = faults(answer=lambda prompt: json.dumps({"items": items}))
    code, _, err = tongwen("run", write_recipe(tmp_path, server.url, method="documents", documents=[str(file)]))
    assert code == 0, err
    (row,) = rows_of(tmp_path)
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 3
    assert row["meta"]["from"]["document"].endswith("book.txt:1") and "白居易" in next(iter(server.requests))


def test_wrong_key_stops_at_once(
    faults: Callable[..., Any], tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = faults("401")
    began = time.monotonic()
    code, _, err = tongwen("run", write_recipe(tmp_path, server.url, concurrency=4))
    assert code == 2 and "401" in err and "$OPENAI_API_KEY" in err and time.monotonic() - began < 10
    assert sum(server.requests.values()) <= 4
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    code, _, err = tongwen("run", write_recipe(tmp_path, "https://example.invalid/v1"))
    assert code == 2 and "export OPENAI_API_KEY" in err


def test_full_disk_stops_before_the_next_request(
    faults: Callable[..., Any], tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tongwen.data.synthesis.journal.MIN_FREE_BYTES", 1 << 60)
    server = faults()
    code, _, err = tongwen("run", write_recipe(tmp_path, server.url))
    assert code == 5 and "disk" in err and not server.requests


def test_changed_settings_request_again(faults: Callable[..., Any], tongwen: Any, tmp_path: Path) -> None:
    server = faults()
    cap = {"at_most": {"requests": 3}, "concurrency": 1}
    assert tongwen("run", write_recipe(tmp_path, server.url, **cap))[0] == 5
    assert tongwen("run", write_recipe(tmp_path, server.url, model="n", concurrency=1))[0] == 0
    assert {row["meta"]["model"] for row in rows_of(tmp_path)} == {"n"}
    assert len(rows_of(tmp_path, "journal")) == 3 + 6, "the old replies stay"


SMALL = Path(os.environ.get("TONGWEN_SMALL_MODEL", "nowhere"))
TASKS = {  # so short that a model of 135 million weights can go on with them
    "写出“大”的反义词。": "小",
    "写出“黑”的反义词。": "白",
    "写出“上”的反义词。": "下",
    "写出一种水果的名字。": "苹果",
    "写出一种动物的名字。": "老虎",
    "把“书”翻译成英文。": "book",
    "把“水”翻译成英文。": "water",
    "计算 3 + 4。": "7",
}


@pytest.mark.skipif(not SMALL.is_dir(), reason="TONGWEN_SMALL_MODEL names no folder with a model, such as SmolLM2's")
def test_synthesize_with_a_real_small_model(tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reply is in the journal and is a row or has a reason. What repeats a seed is let pass: it can little more."""
    seeds = [{"instruction": ask, "instances": [{"input": "", "output": told}]} for ask, told in TASKS.items()]
    (tmp_path / "seeds.json").write_text(json.dumps(seeds, ensure_ascii=False), encoding="utf-8")
    command = [sys.executable, "-m", "tongwen", "serve", str(SMALL), "--name", "m", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout
            environment: dict[str, str] = {}
            while "OPENAI_API_KEY" not in environment and (line := server.stdout.readline()):
                name, _, value = line.strip().partition("=")
                environment[name] = value
            monkeypatch.setenv("OPENAI_API_KEY", environment["OPENAI_API_KEY"])
            how = {"temperature": 0, "max_tokens": 60, "concurrency": 1, "stale": 12, "seconds": 300}
            wide = {"rouge_at_most": 1, "bm25_at_most": 1000}
            settings = {"method": "self_instruct", "seeds": str(tmp_path / "seeds.json"), "rows": 2, **how, **wide}
            code, _, err = tongwen("run", write_recipe(tmp_path, environment["OPENAI_BASE_URL"], **settings))
        finally:
            server.terminate()
    assert code == 0, err
    rows, rejected, journal = (rows_of(tmp_path, name) for name in ("dialogues", "rejected", "journal"))
    assert len(rows) == 2 and all(row["meta"]["from"]["seeds"] for row in rows)
    taken = {row["meta"]["request"] for row in rows} | {row["request"] for row in rejected}
    assert taken == set(range(max(taken) + 1)) and len(journal) >= len(taken)


@pytest.mark.sample()
def test_repeated_kills_lose_no_rows(tmp_path: Path) -> None:
    """The short form of bench/synthesize_storm.py."""
    found = storm.storm(tmp_path, rows=12, kills=2)
    assert (found["kills"], found["rows_lost"], found["rows_doubled"], found["rows_of_no_answer"]) == (2, 0, 0, 0)
    assert found["answers_paid_twice"] <= found["allowed_twice"]
