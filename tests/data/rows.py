"""Rows of dialogues and preferences as files hold them."""

from __future__ import annotations

from typing import Any

from tongwen.core.records import Dialogue, Origin
from tongwen.data.formats import check_source, read_dialogue, recognise_row
from tongwen.data.row import RawRow
from tongwen.recipe.data import SourceConfig

HERE, SOURCE = Origin("f", 1), SourceConfig(path="f")
ASK = {"role": "user", "content": "QUESTION"}
REPLY = {"role": "assistant", "content": "ANSWER"}
PLAIN = [("user", "QUESTION"), ("assistant", "ANSWER")]


def as_dialogue(row: dict[str, Any], **settings: Any) -> Dialogue:
    source = SourceConfig(path="f", **settings)
    check_source(source)
    return read_dialogue(row, source.format or recognise_row(RawRow("f", 1, row, 1), source), source, {}, HERE)


def role_and_text(found: Dialogue) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in found.messages]


BAD = {"role": "assistant", "content": "REJECTED"}
PAIRS = [
    {"prompt": "QUESTION", "chosen": "ANSWER", "rejected": "REJECTED"},
    {"question": "QUESTION", "chosen": "ANSWER", "rejected": ["REJECTED", "REJECTED"]},
    {"instruction": "QUESTION", "input": "", "chosen": "ANSWER", "rejected": "REJECTED"},
    {"prompt": [ASK], "chosen": [REPLY], "rejected": [BAD]},
    {"prompt": "QUESTION", "chosen": [REPLY], "rejected": [BAD]},
    {"prompt": "QUESTION", "chosen": [ASK, REPLY], "rejected": [ASK, BAD]},
    {"chosen": [ASK, REPLY], "rejected": [ASK, BAD]},
    {"chosen_messages": [ASK, REPLY], "rejected_messages": [ASK, BAD]},
    {"query": "QUESTION", "response_chosen": "ANSWER", "response_rejected": "REJECTED"},
    {"query": "QUESTION", "response": "ANSWER", "rejected_response": "REJECTED"},
    {"messages": [ASK, REPLY], "rejected_messages": [ASK, BAD]},
    {"prompt": [ASK], "preferred_output": [REPLY], "non_preferred_output": [BAD]},
]
