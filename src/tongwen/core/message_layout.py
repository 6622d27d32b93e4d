"""Write a row for a chat template: the same content in the layout that this template reads.

Templates agree on roles and texts, and differ in the rest: one reads `reasoning_content`, another `thinking`; one joins the
arguments of a call as text, another walks through the object; one takes the tools from its argument, another from the system
turn. Every layout here is legal; the render shows which one the template reads (core/render_proof.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from tongwen.core.template_cache import dump_json

Turn = dict[str, Any]  # OpenAI's form of a message, as `Message.to_dict` writes it
Tools = Sequence[dict[str, Any]]


class Offered(tuple[dict[str, Any], ...]):
    """The tools of a row, with their JSON: a part of what is known of its shape, asked for once an answer."""

    json: str

    @staticmethod
    def of(tools: Tools) -> Offered:
        if isinstance(tools, Offered):
            return tools
        out = Offered(tools)
        out.json = json.dumps(list(tools), sort_keys=True, ensure_ascii=False) if tools else ""
        return out


@dataclass(frozen=True)
class MessageLayout:
    """How a row is written for a template. The first value of each field is the usual one.

    content:     text, or the list of parts of multimodal templates
    system:      a turn, or the beginning of the first question where the template has no such turn
    thinking:    the key of an answer's thinking; `part` of its content; `inline` in its text as `<think>`; `blocks`: the
                 content of every answer is an object of blocks
    ahead:       whether the thinking of an answer without calls stands ahead of it in the form that the template gives
                 it before a call
    empty:       the content of a turn that only calls tools: "", no key, or null
    arguments:   of a call: an object, or its JSON text
    definitions: of tools: as the row has them, inside {"type": "function"}, or bare
    tools:       the argument `tools`, or a key of the system turn: the list, or its JSON text
    ids:         of calls, as the row has them; made where the row has none; made of the tool's name and a number
    """

    content: str = "text"
    system: str = "turn"
    thinking: str = "reasoning_content"
    ahead: bool = False
    empty: str = "empty"
    arguments: str = "object"
    definitions: str = "row"
    tools: str = "argument"
    ids: str = "row"


DEFAULT_LAYOUT = MessageLayout()
LAYOUT_OPTIONS: dict[str, tuple[Any, ...]] = {
    "content": ("text", "parts"),
    "thinking": ("reasoning_content", "thinking", "reasoning", "part", "inline", "blocks"),
    "ahead": (False, True),
    "empty": ("empty", "absent", "null"),
    "arguments": ("object", "text"),
    "definitions": ("row", "wrapped", "bare"),
    "tools": ("argument", "system", "system_text"),
    "ids": ("row", "made", "function"),
}


def layouts(turns: Sequence[Turn], tools: Tools, usual: MessageLayout) -> Iterator[MessageLayout]:
    """Yield the layouts in which this row can be written, those with the fewest unusual words first."""
    calls = any(turn.get("tool_calls") for turn in turns)
    asked = {
        "content": False,  # the same for all rows, like `system`: found when the template is bound
        "system": False,
        "thinking": any(turn.get("reasoning_content") for turn in turns),
        "ahead": any(turn.get("reasoning_content") and not turn.get("tool_calls") for turn in turns),
        "empty": any(turn.get("tool_calls") and not turn["content"] for turn in turns),
        "arguments": calls,
        "definitions": bool(tools),
        "tools": bool(tools),
        "ids": calls,
    }
    names = [field.name for field in fields(MessageLayout) if asked[field.name]]
    choices = sorted(
        product(*(range(len(LAYOUT_OPTIONS[name])) for name in names)), key=lambda picks: (_unusual(picks), picks)
    )
    for picks in choices:
        yield replace(usual, **{name: LAYOUT_OPTIONS[name][pick] for name, pick in zip(names, picks, strict=True)})


def _unusual(picks: Sequence[int]) -> int:
    return sum(map(bool, picks))


def apply_layout(
    turns: Sequence[Turn], tools: Tools, layout: MessageLayout
) -> tuple[list[Turn], list[dict[str, Any]] | None]:
    """Return (messages, tools) as the template gets them."""
    definitions = [_definition(tool, layout.definitions) for tool in tools]
    ids = _CallIds(layout.ids)
    if layout.system == "question":
        turns = _system_in_question(turns)
    out = [_spell_turn(turn, layout, ids) for turn in turns]
    if not definitions:
        return out, None
    if layout.tools == "argument":
        return out, definitions
    if not out or out[0]["role"] != "system":
        out.insert(0, {"role": "system", "content": ""})
    listed: Any = definitions if layout.tools == "system" else dump_json(definitions)
    out[0] = {**out[0], "tools": listed}
    return out, None


def body_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what stands inside {"type": "function", "function": {…}}, of a tool or of a call; a bare entry itself."""
    inner = entry.get("function")
    return inner if isinstance(inner, dict) else entry


def _definition(tool: dict[str, Any], form: str) -> dict[str, Any]:
    if form == "row":
        return tool
    bare = body_of(tool)
    return bare if form == "bare" else {"type": "function", "function": bare}


class _CallIds:
    """Gives ids to calls and to the answers of tools, which name their call or follow in its order."""

    def __init__(self, form: str) -> None:
        self.form, self.count = form, 0
        self.renamed: dict[str, tuple[str, str]] = {}  # id of the row: (id that is written, name of the tool)
        self.open: list[tuple[str, str]] = []

    def call(self, call: Turn) -> Turn:
        if self.form == "row":
            return call
        name, own = call["function"].get("name", ""), call.get("id")
        made = own or f"call{self.count:05}" if self.form == "made" else f"functions.{name}:{self.count}"
        self.count += 1
        if own:
            self.renamed[own] = (made, name)
        self.open.append((made, name))
        return {**call, "id": made}

    def answer(self, turn: Turn) -> Turn:
        if self.form == "row":
            return turn
        found = self.renamed.get(turn.get("tool_call_id") or "")
        if found is None and self.open:
            found = self.open[0]
        if found is None:
            return turn
        if found in self.open:
            self.open.remove(found)
        return {**turn, "tool_call_id": found[0], "name": turn.get("name") or found[1]}


def _spell_turn(turn: Turn, layout: MessageLayout, ids: _CallIds) -> Turn:
    out = dict(turn)
    thinking = out.pop("reasoning_content", None)
    calls = out.get("tool_calls")
    if calls:
        out["tool_calls"] = [ids.call(_call(call, layout.arguments)) for call in calls]
    if out["role"] == "tool":
        out = ids.answer(out)
    if thinking and layout.thinking == "inline":
        out["content"] = f"<think>\n{thinking.strip()}\n</think>\n\n{out['content']}"
    if layout.thinking == "blocks" and out["role"] == "assistant":
        blocks = [("thoughts", thinking), ("response", out.pop("content"))]
        if any(text for _type, text in blocks):
            out["content"] = {"blocks": [{"type": type_, "text": text} for type_, text in blocks if text]}
        return out
    if layout.content == "parts" or (thinking and layout.thinking == "part"):
        out["content"] = [{"type": "text", "text": out["content"]}]
    if thinking and layout.thinking == "part":
        out["content"].insert(0, {"type": "thinking", "thinking": thinking})
    elif thinking is not None and layout.thinking != "inline":
        out[layout.thinking] = thinking
    if calls and not turn["content"] and out["content"] == "" and layout.empty != "empty":
        if layout.empty == "absent":
            del out["content"]
        else:
            out["content"] = None
    return out


def _system_in_question(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Return the turns with the system text at the beginning of the first question, which follows it."""
    if len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
        return turns
    return [{**turns[1], "content": turns[0]["content"] + "\n\n" + turns[1]["content"]}, *turns[2:]]


def one_call_each(turns: Sequence[Turn]) -> list[Turn] | None:
    """Return the turns with one call in each, followed by its result, for templates that render one call a turn. None when no
    turn has several, or when a call has no result."""
    out: list[Turn] = []
    rest = list(turns)
    while rest:
        turn = rest.pop(0)
        calls = turn.get("tool_calls") or ()
        if len(calls) < 2:
            out.append(turn)
            continue
        results = [rest.pop(0) for call in calls if rest and rest[0]["role"] == "tool"]
        ids = [result.get("tool_call_id") for result in results]
        names = [call.get("id") for call in calls]
        if len(results) < len(calls) or (rest and rest[0]["role"] == "tool"):
            return None
        if None not in ids and None not in names:
            if {*ids} != {*names} or len({*ids}) < len(ids):
                return None
            results.sort(key=lambda result: names.index(result["tool_call_id"]))
        for number, (call, result) in enumerate(zip(calls, results, strict=True)):
            one = {**turn, "tool_calls": [call]}
            if number:
                one["content"] = ""
                one.pop("reasoning_content", None)
            out += [one, result]
    return out if len(out) > len(turns) else None


def read_arguments(arguments: Any) -> Any:
    """Return the arguments of a call as an object, also from their JSON text; a text that is no object stays."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _call(call: dict[str, Any], form: str) -> dict[str, Any]:
    """Return a call inside {"type": "function"}, with its arguments in one form."""
    inner = call.get("function")
    head = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    if not isinstance(inner, dict):
        inner = {key: call[key] for key in ("name", "arguments") if key in call}
    arguments = read_arguments(inner.get("arguments"))
    if form == "text" and not isinstance(arguments, str):
        arguments = dump_json(arguments if arguments is not None else {})
    return {"type": "function", **head, "function": {**inner, "arguments": {} if arguments is None else arguments}}
