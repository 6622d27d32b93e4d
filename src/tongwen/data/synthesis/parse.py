"""Parse tasks from a model's reply: numbered blocks or JSON, fenced, wrapped in prose, or truncated.

The parser is tolerant about text around an item and strict about the item: it takes all of it or rejects it with a reason.
A reply is data: nothing in it is run, fetched or trusted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tongwen.core.errors import RowRejected
from tongwen.core.i18n import _
from tongwen.data.row import DECODER

MOST = 100  # maximal items of one reply
_LABELS = r"(?:\d+\s*[.、]\s*)?(指令|输入|输出)\s*[:：]"
_BLOCK = re.compile(rf"{_LABELS}", re.MULTILINE)
_NUMBER = re.compile(r"\s*\d+\s*[.、]?\s*$")
NO_INPUT = re.compile(r"\s*[<＜《（(]?\s*无输入\s*[>＞》）)]?\s*")


@dataclass(frozen=True)
class ParsedTask:
    """A task and its answer."""

    instruction: str
    input: str
    output: str

    @property
    def question(self) -> str:
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


def read_blocks(text: str, finish: str, first: int) -> Iterator[ParsedTask | RowRejected]:
    """Parse blocks of 指令, 输入, 输出 between lines of ###. first: the number of the task that the prompt has begun. The
    last block of a truncated reply is rejected."""
    if not re.match(r"\s*(?:#+\s*)?(?:\d+\s*[.、]\s*)?指令\s*[:：]", text[:20]):
        text = f"{first}. 指令: {text}"
    blocks = [block for block in re.split(r"^\s*#{2,}\s*$|###", text, flags=re.MULTILINE) if block.strip()]
    if finish == "length":
        blocks.pop()
        yield RowRejected("cut_off", _("the last task was cut off"))
    for block in blocks[:MOST]:
        yield _read_block(block)


def _read_block(block: str) -> ParsedTask | RowRejected:
    parts = _BLOCK.split(block)  # before, label, text, label, text, …
    found: dict[str, str] = {}
    for label, text in zip(parts[1::2], parts[2::2], strict=True):
        if label == "指令" and len(found) == 3:
            break  # the answer continues with the next task, which does not belong to it
        if label in found:
            return RowRejected("malformed", _("{label} appears twice").format(label=label))
        found[label] = text
    if list(found) != ["指令", "输入", "输出"]:
        return RowRejected("malformed", _("the block contains {found}").format(found=list(found)))
    instruction, given, output = (_NUMBER.sub("", text).strip() for text in found.values())
    return ParsedTask(instruction, "" if NO_INPUT.fullmatch(given) else given, output)


def read_json(text: str) -> Iterator[ParsedTask | RowRejected]:
    """Parse objects with instruction, input and output anywhere in the text: in a list, under a key, or in sequence."""
    place, count = 0, 0
    while (place := text.find("{", place)) >= 0:
        try:
            value, end = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError, RowRejected):
            place += 1  # a truncated wrapper, or prose: objects inside may still be whole
            continue
        place = end
        for one in _objects(value):
            count += 1
            if count > MOST:
                yield RowRejected("too_many", _("more than {most} items").format(most=MOST))
                return
            yield _read_object(one)
    if not count:
        yield RowRejected("malformed", _("it contains no task"))


def _objects(value: dict[str, Any]) -> list[Any]:
    """Return the items of the object's only list, or the object itself."""
    lists = [inside for inside in value.values() if isinstance(inside, list)]
    return lists[0] if len(value) == 1 and lists else [value]


def _read_object(value: Any) -> ParsedTask | RowRejected:
    keys = ("instruction", "input", "output")
    given = {"input": "", **value} if isinstance(value, dict) else {}
    if set(given) != set(keys) or not all(isinstance(given[key], str) for key in keys):
        shown = json.dumps(value, ensure_ascii=False)[:60]
        return RowRejected("malformed", _("not a task with its answer: {shown}").format(shown=shown))
    instruction, given_input, output = (given[key].strip() for key in keys)
    return ParsedTask(instruction, "" if NO_INPUT.fullmatch(given_input) else given_input, output)
