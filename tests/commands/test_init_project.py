"""init bot, init from-documents: what they write is checked by the product's own next command, and overwrites nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture()
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("out", ["bot.yaml", "my bots/新 机器人.yaml"])
def test_bot_teaches_the_name_and_asks_in_unseen_wordings(out: str, here: Path, chat_model: Path, tongwen: Any) -> None:
    Path(out).parent.mkdir(exist_ok=True)
    name, author = '小"同', "作者: {x}"
    words = ("init", "bot", "--name", name, "--author", author, "--base", chat_model, "--out", out)
    assert tongwen(*words)[0] == 0
    assert tongwen("check", out)[0] == 0
    recipe = yaml.safe_load(Path(out).read_text())
    assert recipe["prepare"]["fill"] == {"name": name, "author": author}
    assert tongwen("run", out, "--only", "prepare")[0] == 0
    rows = [json.loads(line) for line in (here / "runs" / recipe["name"] / "prepare" / "dialogues.jsonl").open()]
    trained = {message["content"] for row in rows for message in row["messages"]}
    assert any(name in text and author in text for text in trained)
    exam = [json.loads(line)["messages"] for line in (Path(out).parent / "held_out.jsonl").open()]
    asked = {messages[0]["content"] for messages in exam[: recipe["sft"]["samples"]]}
    assert len(asked) == 10 and not asked & trained
    assert tongwen(*words)[0] == 2, "the recipe is the user's now"


def test_bot_without_a_name_is_refused(here: Path, tongwen: Any) -> None:
    code, _, err = tongwen("init", "bot", "--name", "x")
    assert code == 2 and "--author" in err and not list(here.iterdir())


def test_bot_keeps_the_rows_that_the_user_changed(here: Path, tongwen: Any) -> None:
    (here / "dialogues.jsonl").write_text("mine")
    assert tongwen("init", "bot", "--name", "x", "--author", "y")[0] == 2
    assert [file.name for file in here.iterdir()] == ["dialogues.jsonl"]


def test_documents_are_counted_before_they_cost(here: Path, chat_model: Path, tongwen: Any) -> None:
    (here / "books").mkdir()
    for number in range(3):
        (here / "books" / f"{number}.txt").write_text(
            "天地玄黄，宇宙洪荒。\n\n" * 200
        )  # 2,400 characters: two pieces each
    words = ("init", "from-documents", "books", "--base", chat_model, "--endpoint", "http://127.0.0.1:9/v1")
    code, out, err = tongwen(*words)
    assert code == 0 and "6 requests" in " ".join((out + err).split())
    recipe = yaml.safe_load((here / "from-documents.yaml").read_text())
    assert recipe["synthesize"]["rows"] == 6 and recipe["synthesize"]["endpoint"] == "http://127.0.0.1:9/v1"
    assert tongwen("check", "from-documents.yaml")[0] == 0
    assert tongwen(*words)[0] == 2
    (here / "empty.txt").write_text("短")
    code, _, err = tongwen("init", "from-documents", "empty.txt", "--out", "e.yaml")
    assert code == 3 and "empty.txt" in err and not (here / "e.yaml").exists()
    assert tongwen("init", "from-documents")[0] == 2 and tongwen("init", "from-documents", "no/")[0] in (2, 3)
