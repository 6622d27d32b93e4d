"""Convert raw rows to Documents and Dialogues. The keys of a row decide its format.

A row becomes a record, or is refused with a reason for the ledger and rejected.jsonl. Nothing is guessed: values that are
not text are not converted, and ambiguous rows and turns out of order are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tongwen.core.errors import DataError, RecipeError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document, Message, Origin
from tongwen.data.fields import Fields, is_empty
from tongwen.data.files import CSV_SUFFIXES, WORKBOOK_SUFFIXES, suffix
from tongwen.data.preference import check_preferences, verdicts
from tongwen.data.row import RawRow, kind
from tongwen.data.texts import as_yaml, check_data, check_text, double_encoded, is_blank, keys_of
from tongwen.data.tool_calls import read_tools, without_padding
from tongwen.data.turns import (
    IN_TURNS,
    ROLES,
    THOUGHTS,
    check_media,
    list_turns,
    open_turn,
    read_learn,
    read_turns,
)
from tongwen.recipe.data import SourceConfig

PAIRS = (
    ("question", "answer"),
    ("question", "std_answer"),
    ("q", "a"),
    ("问题", "答案"),
    ("问题", "回答"),
    ("问", "答"),
)
# Names of a question and of an answer in flat rows; a row that has one of each is a pair, whatever their combination.
QUESTIONS = ("instruction", "prompt", "query", "question", "input", "问题", "提问", "问", "user", "human")
ANSWERS = ("output", "completion", "response", "answer", "答案", "回答", "回复", "答", "assistant", "bot")
SYSTEMS = ("system", "system_prompt", "system_message", "meta_instruction")
TURNS = ("messages", "conversations", "conversation")
LISTS = (*TURNS, "history", "tools", "functions")  # keys whose values are lists
# Values of a column such as `reasoning` that say whether there is thinking, and are none.
_FLAGS = {"on", "off", "yes", "no", "true", "false", "enabled", "disabled"}
# All keys that the readers use; `columns` can map each of them.
NAMES = tuple(dict.fromkeys((
    "instruction", "input", "output", "target", "history", "system", "tools", "functions", *TURNS, "instruct",
    *QUESTIONS, *ANSWERS, "chosen", "rejected", "label", "std_answer", "q", "a", "context", "text", "session_id", *IN_TURNS,
)))  # fmt: skip

THINKING = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
_WORDS_OF_ANSWERS = re.compile("answer|response|reply|output|completion|solution|答|回复", re.IGNORECASE)
_WORDS_OF_QUESTIONS = re.compile("question|query|prompt|ask|instruct|input|user|问|指令", re.IGNORECASE)
_ENCODED = ("{", '"')  # how JSON inside a text begins
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
# Placeholders of identity data sets; unfilled, the model would learn them as its name.
MUST_FILL = {"name", "author"}
_MARK = re.compile(r"(?:\A|\n)[ \t]*(Human|User|Assistant|System)[ \t]*[:：]")
_MARK_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant", "System": "system"}
_INSIDE = re.compile(r"\s*(?:Human|User)[ \t]*[:：]")

Read = tuple[list[Message], list[Any]]  # the messages and the tools of a row


# -- which format --------------------------------------------------------------------------------------------------


def recognise(row: Any) -> str | None:
    """Return the format of a row by its keys; None when it is unknown. Raises RowRejected when two formats match."""
    if not isinstance(row, dict):
        return None
    turns = [name for name in TURNS if row.get(name) is not None]
    is_alpaca = "instruction" in row and not row.keys().isdisjoint(("output", "input", "target"))
    if len(turns) > 1 or (turns and is_alpaca and row.get("instruction")):
        names = [*turns, *(["instruction"] if is_alpaca else [])]
        raise RowRejected(
            "ambiguous",
            _("the row matches more than one format: it has {names}; name the format in the recipe").format(
                names=_(", ").join(names)
            ),
        )
    if turns:
        return "messages" if turns[0] == "messages" else "conversations"
    if is_alpaca or ("input" in row and "target" in row):
        return "turns_inside" if _has_turns_inside(row) else "alpaca"
    if "prompt" in row and ("completion" in row or "response" in row):
        return "completion"
    if "query" in row and ("answer" in row or "response" in row):
        return "query"
    if _pair_of(row):
        return "pair"
    return next((name for name in ("messages", "conversations", "text") if name in row), None)


def _pair_of(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the names of a row's question and answer: a usual pair, or the only two of their kinds."""
    for question, answer in PAIRS:
        if question in row and answer in row:
            return question, answer
    asked = [name for name in QUESTIONS if not is_empty(row.get(name))]
    answered = [name for name in ANSWERS if name in row]
    return (asked[0], answered[0]) if len(asked) == len(answered) == 1 else None


def recognise_row(raw: RawRow, source: SourceConfig) -> str:
    """Return the format of a row of a dialogue source.

    Raises DataError when the first row or the kind of data shows that the whole file has no known format, and RowRejected
    when only this row has none.
    """
    row = raw.value
    place = f"{raw.file}:{raw.row}"
    if isinstance(row, dict):
        check_preferences(row, source, place)
        row = with_columns(row, source)
    found = recognise(row)
    if found and found != "text":
        return found
    keys = keys_of(raw.value)
    rule = _("this row is not a dialogue in a known format; it has: {keys}").format(keys=keys)
    if found == "text":
        remedy = _(
            "plain text belongs under prepare.documents; or name the columns: {path: …, columns: {instruction: text, output: YOUR_ANSWER}}"
        )
        raise DataError(rule, place=place, remedy=remedy)
    columns = _similar_columns(row)
    if columns:
        rule += _suggestion(*next(iter(columns.items())))
    first = 2 if suffix(Path(raw.file)) in CSV_SUFFIXES | WORKBOOK_SUFFIXES else 1  # below the names of the columns
    if raw.row > first:
        raise RowRejected("unknown_format", rule)
    raise DataError(rule, place=place, remedy=_columns_line(columns, raw.value))


def check_source(source: SourceConfig) -> None:
    """Raise RecipeError when `columns` or `roles` contains an unknown name."""
    roles = sorted(set(ROLES.values()))
    for key, names, known in (("columns", source.columns, NAMES), ("roles", source.roles.values(), roles)):
        for name in names:
            if name not in known:
                raise RecipeError(
                    _("{word}: {name!r} is not one of the known names: {known}").format(
                        word=key, name=name, known=_(", ").join(known)
                    ),
                    place=source.path,
                    remedy="{columns: {output: answer}, roles: {Customer: user}}",
                )


def _similar_columns(row: Any) -> dict[str, str]:
    """Return {our name: key} for keys that differ only in case or blanks, if that makes the row a known format."""
    if not isinstance(row, dict):
        return {}
    folded = {str(key).strip().lower(): str(key) for key in row}
    columns = {ours: theirs for ours, theirs in folded.items() if ours != theirs and ours in NAMES}
    known = {ours: row.get(theirs) for ours, theirs in folded.items()}
    try:
        return columns if recognise(known) not in (None, "text") else {}
    except RowRejected:
        return {}


def _likely_columns(row: dict[str, Any]) -> dict[str, str]:
    """Return {our name: key} for the question and the answer of a row: by their names, else the only two texts in order."""
    texts = [
        str(key) for key, value in row.items() if isinstance(value, str) and str(key).lower() not in ("id", "text")
    ]
    systems = dict([("system", key) for key in texts if key.lower().startswith("system")][:1])
    texts = [key for key in texts if key not in systems.values()]
    answers = [key for key in texts if _WORDS_OF_ANSWERS.search(key)]
    questions = [key for key in texts if _WORDS_OF_QUESTIONS.search(key) and key not in answers]
    rest = [key for key in texts if key not in answers and key not in questions]
    if len(answers) == len(questions) == 1:
        return {**systems, "instruction": questions[0], "output": answers[0]}
    if len(texts) != 2 or len(answers) > 1 or len(questions) > 1:
        return {}
    if answers or questions:
        question, answer = (rest[0], answers[0]) if answers else (questions[0], rest[0])
        return {"instruction": question, "output": answer}
    return dict(zip(("instruction", "output"), texts, strict=True))


def _columns_line(columns: Mapping[str, str], row: Any) -> str:
    """Return a recipe line that fixes the error: with the similar keys, or with what is likely the question and the answer."""
    if not columns and isinstance(row, dict):
        columns = _likely_columns(row)
    pairs = ", ".join(f"{ours}: {as_yaml(theirs)}" for ours, theirs in columns.items())
    return _("name the columns in the recipe: {{path: …, columns: {{{pairs}}}}}").format(
        pairs=pairs or _("instruction: YOUR_QUESTION, output: YOUR_ANSWER")
    )


# -- records -------------------------------------------------------------------------------------------------------


def read_dialogue(row: Any, format_: str, source: SourceConfig, fill: Mapping[str, str], origin: Origin) -> Dialogue:
    """Convert one row to a dialogue. Raises RowRejected, or DataError when the recipe lacks a setting."""
    if not isinstance(row, dict):
        raise RowRejected("not_an_object", _("a row must be an object, this is {kind}").format(kind=kind(row)))
    if format_ == "text":
        raise DataError(
            _("plain text is not a dialogue"),
            place=str(origin),
            remedy=_("put it under prepare.documents"),
        )
    if found := _read_flat(row, format_, source, origin):
        return found
    check_preferences(row, source, str(origin))
    fields = Fields(row, source)
    if len(row) > 1:
        if good := verdicts(row):
            fields.get(*good)
        check_media(fields)
    if format_ == "alpaca" and _has_turns_inside(with_columns(row, source)):
        format_ = "turns_inside"
    messages, tools = READERS[format_](fields, source)
    if len(row) > 1:
        messages = _with_thinking(messages, fields)
    messages = [_split_thinking(_filled(message, fill), turn) for turn, message in enumerate(messages, 1)]
    if tools:
        check_data(tools, "tools")
        tools = without_padding(tools, messages)
    _check_dialogue(messages)
    return Dialogue(tuple(messages), origin, tuple(tools), unread=fields.unread())


def _read_flat(row: dict[str, Any], format_: str, source: SourceConfig, origin: Origin) -> Dialogue | None:
    """Convert a row of a question and an answer alone, the most frequent kind, several times as fast. None for any other row,
    and for one that may have to be refused."""
    names = _flat_names(tuple(row), format_)
    if names is None or source.columns or source.ignore:
        return None
    question, extra, answer, thinking = [row[name] if name else "" for name in names]
    for text in (question, answer):
        if text.__class__ is not str or text[:1] in _ENCODED or "{{" in text or is_blank(text):
            return None
    if extra.__class__ is not str or "{{" in extra or _INSIDE.match(question):
        return None
    if thinking and (thinking.__class__ is not str or is_blank(thinking) or thinking.strip().lower() in _FLAGS):
        return None
    asked = question + source.separator + extra if extra and not is_blank(extra) else question
    reply = _split_thinking(Message("assistant", answer, thinking or None), 2)
    for turn, text in ((1, asked), (2, reply.content), (2, reply.thinking)):
        if text:
            check_text(text, turn)
    return Dialogue((Message("user", asked), reply), origin)


@lru_cache(maxsize=4096)
def _flat_names(keys: tuple[str, ...], format_: str) -> tuple[str, str, str, str] | None:
    """Return the keys of question, further question, answer and thinking ("" without one) if a row has no other keys."""
    thinking = [key for key in keys if key in THOUGHTS]
    rest = [key for key in keys if key not in THOUGHTS]
    pair = ("instruction", "output") if format_ == "alpaca" else _pair_of(dict.fromkeys(rest, True))
    if format_ not in ("alpaca", "pair", "completion", "query") or pair is None or len(thinking) > 1:
        return None
    extra = "input" if format_ == "alpaca" and "input" in rest else ""
    if {*rest} != {*filter(None, (*pair, extra))}:
        return None
    return pair[0], extra, pair[1], thinking[0] if thinking else ""


def read_question(row: dict[str, Any], source: SourceConfig, origin: Origin) -> Dialogue:
    """Convert a row that ends with a question: turns, or one question after a system text and a history. Raises RowRejected."""
    fields = Fields(row, source)
    check_media(fields)
    messages, tools = _read_question(fields, source)
    tools = without_padding(tools, messages)
    check_data(tools, "tools")
    return Dialogue(tuple(messages), origin, tuple(tools), unread=fields.unread())


def _read_question(fields: Fields, source: SourceConfig) -> Read:
    if fields.has("messages"):
        return _read_messages(fields, source)
    question = next(name for name in ("prompt", "instruction", "question", "query") if fields.has(name))
    extra = next((name for name in ("input", "context") if fields.has(name)), "input")
    asked = _joined(_text(fields, question, source), _text(fields, extra, source, default=""), source)
    return [*_system(fields, source), *_history(fields), Message("user", asked)], read_tools(fields)


def read_document(row: Any, source: SourceConfig, origin: Origin) -> Document:
    """Convert one row to a document. Raises RowRejected."""
    theirs = source.columns.get("text", "text")
    text = row.get(theirs) if isinstance(row, dict) else None
    if not isinstance(text, str):
        rule = _("no text under {theirs!r}: the row has {keys}").format(theirs=theirs, keys=keys_of(row))
        if isinstance(row, dict) and text is not None:
            raise RowRejected("not_text", _("{theirs} is {kind}, not text").format(theirs=theirs, kind=kind(text)))
        likely = next((key for key in row if str(key).strip().lower() in (theirs.lower(), "content")), "") if isinstance(row, dict) else ""  # fmt: skip
        raise RowRejected("no_text", rule + (_suggestion("text", likely) if likely and likely != theirs else ""))
    if is_blank(text):
        raise RowRejected("empty_text", _("the text is empty"))
    unread = () if len(row) == 1 else tuple(key for key in row if key != theirs and key not in source.ignore and not is_empty(row[key]))  # fmt: skip
    return Document(check_text(text, theirs), origin, unread=unread)


def with_columns(row: dict[str, Any], source: SourceConfig) -> dict[str, Any]:
    """Rename the columns of a row to our names, without the ignored ones. A mapped name refers only to the mapped column."""
    if source.ignore:
        row = {key: value for key, value in row.items() if key not in source.ignore}
    if not source.columns:
        return row
    mapped = {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}
    return {**{key: value for key, value in row.items() if key not in source.columns}, **mapped}


# -- one reader per format -----------------------------------------------------------------------------------------


def _read_alpaca(row: Fields, source: SourceConfig) -> Read:
    """Join instruction and input to one question; BELLE also has input and target."""
    answer = "target" if row.has("target") and not row.has("output") else "output"
    extra = _text(row, "input", source, default="")
    question = _text(row, "instruction", source, default="" if answer == "target" or not is_blank(extra) else None)
    return _one_round(row, source, _joined(question, extra, source), answer)


def _read_turns_inside(row: Fields, source: SourceConfig) -> Read:
    """BELLE and Guanaco: `Human: …\\n\\nAssistant: …\\n\\nHuman: …` in the instruction; the output answers the last turn."""
    messages = [*_system(row, source), *_history(row)]
    text = _text(row, "instruction", source, default="")
    extra = _text(row, "input", source, default="")
    messages += _split_turns(text)
    if not is_blank(extra):
        if _MARK.match(extra.lstrip()):
            messages += _split_turns(extra)
        elif messages and messages[-1].role == "user":
            messages[-1] = Message("user", _joined(messages[-1].content, extra, source))
        else:
            messages.append(Message("user", extra))
    answer = "target" if row.has("target") and not row.has("output") else "output"
    return [*messages, Message("assistant", _text(row, answer, source))], read_tools(row)


def _read_messages(row: Fields, source: SourceConfig) -> Read:
    """OpenAI: role and content, tool calls, reasoning. LLaMA-Factory v1: content is a list of parts."""
    return _with_system(row, source, read_turns(row, "messages", source))


def _read_conversations(row: Fields, source: SourceConfig) -> Read:
    """ShareGPT and BELLE: from and value, with function_call and observation. MOSS: a list of {human, assistant}."""
    key = next((name for name in ("conversations", "conversation") if row.has(name)), "conversations")
    rounds = row.values.get(row.key(key) or "")
    if isinstance(rounds, list) and rounds and isinstance(rounds[0], dict) and _round_of(rounds[0]):
        return _with_system(row, source, (_rounds(row, key, source), []))
    return _with_system(row, source, read_turns(row, key, source))


def _read_completion(row: Fields, source: SourceConfig) -> Read:
    """prompt and completion (or response): each a text or a list of messages."""
    answer = "response" if row.has("response") and not row.has("completion") else "completion"
    prompt, completion = (row.values.get(row.key(name) or "") for name in ("prompt", answer))
    if not _has_turns(prompt) and not _has_turns(completion):
        return _one_round(row, source, _text(row, "prompt", source), answer)
    messages: list[Message] = []
    tools: list[Any] = []
    for name, value, role in (("prompt", prompt, "user"), (answer, completion, "assistant")):
        if _has_turns(value):
            found, more = read_turns(row, name, source)
            messages, tools = [*messages, *found], [*tools, *more]
        else:
            messages.append(Message(role, _text(row, name, source)))
    return _with_system(row, source, (messages, tools))


def _has_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _read_query(row: Fields, source: SourceConfig) -> Read:
    """ms-swift: system, query, response and history. Join instruct and query to one question, as the older project did."""
    question = _joined(_text(row, "instruct", source, default=""), _text(row, "query", source), source)
    answer = "response" if row.has("response") and not row.has("answer") else "answer"
    return _one_round(row, source, question, answer)


def _read_pair(row: Fields, source: SourceConfig) -> Read:
    """A question and an answer, by the names that are there, and the context that the question is about (Dolly, SQuAD)."""
    named = {name: True for name in (*QUESTIONS, *ANSWERS, *sum(PAIRS, ())) if row.has(name)}
    question, answer = _pair_of(named) or PAIRS[0]
    asked = _joined(_text(row, question, source), _text(row, "context", source, default=""), source)
    return _one_round(row, source, asked, answer)


READERS: dict[str, Callable[[Fields, SourceConfig], Read]] = {
    "alpaca": _read_alpaca,
    "turns_inside": _read_turns_inside,
    "messages": _read_messages,
    "conversations": _read_conversations,
    "completion": _read_completion,
    "query": _read_query,
    "pair": _read_pair,
}


def _one_round(row: Fields, source: SourceConfig, question: str, answer: str) -> Read:
    """One question and one answer, after the history."""
    return [
        *_system(row, source),
        *_history(row),
        Message("user", question),
        Message("assistant", _text(row, answer, source)),
    ], read_tools(row)


def _with_system(row: Fields, source: SourceConfig, read: Read) -> Read:
    """Add the row's own system text and tools to what its turns hold."""
    messages, inside = read
    if len(row.values) == 1:
        return read
    system, tools = _system(row, source), read_tools(row)
    if system and messages and messages[0].role == "system":
        if messages[0].content != system[0].content:
            raise RowRejected("ambiguous", _("the row has a system text, and its first turn has another"))
        system = []
    if tools and inside and tools != inside:
        raise RowRejected("ambiguous", _("the row has tools, and one of its turns has others"))
    return [*system, *messages], tools or inside


# -- parts of a row ------------------------------------------------------------------------------------------------


def _with_thinking(messages: list[Message], row: Fields) -> list[Message]:
    """Give the thinking that is a column of the row to its answer: the last one of a flat row, the only one of a list of
    turns. Where it is not known whose thinking it is, it stays unread."""
    if not row.has(*THOUGHTS) or (thinking := row.get(*THOUGHTS)) is None:
        return messages
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    is_flat = not row.has(*TURNS)
    if not isinstance(thinking, str) or thinking.strip().lower() in _FLAGS or not (is_flat or len(answers) == 1):
        row.leave(*THOUGHTS)
        return messages
    if is_blank(thinking) or not answers:
        return messages
    last = messages[answers[-1]]
    if last.thinking not in (None, thinking):
        raise RowRejected("ambiguous", _("the row's thinking field and the thinking in its answer differ"))
    messages[answers[-1]] = replace(last, thinking=thinking)
    return messages


def _joined(first: str, second: str, source: SourceConfig) -> str:
    """Join two texts to one question; either may be empty."""
    return source.separator.join(text for text in (first, second) if not is_blank(text))


def _system(row: Fields, source: SourceConfig) -> list[Message]:
    if not row.has(*SYSTEMS):
        return []
    key = next((name for name in SYSTEMS if not is_empty(row.values.get(row.key(name) or ""))), "system")
    text = _text(row, key, source, default="")
    return [Message("system", text)] if not is_blank(text) else []


def _history(row: Fields) -> list[Message]:
    turns = row.get("history") or ()
    if not isinstance(turns, (list, tuple)) or not all(
        isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(part, str) for part in turn)
        for turn in turns
    ):
        raise RowRejected("bad_history", _("history must be a list of [question, answer]"))
    return [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]


def _has_turns_inside(row: dict[str, Any]) -> bool:
    text = row.get("instruction")
    if not isinstance(text, str) or not _INSIDE.match(text):
        return False
    return any(mark[1] == "Assistant" for mark in _MARK.finditer(text))


def _split_turns(text: str) -> list[Message]:
    """Split a text with role marks into turns; drop an empty `Assistant:` at the end, since the output follows."""
    marks = list(_MARK.finditer(text))
    if text[: marks[0].start() if marks else len(text)].strip():
        raise RowRejected("no_mark", _("the text does not begin with `Human:` or `User:`"))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    messages = [
        Message(_MARK_ROLES[mark[1]], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)
    ]
    if messages and messages[-1].role == "assistant" and not messages[-1].content:
        messages.pop()
    return messages


def _round_of(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the names of question and answer in a turn that holds both (MOSS: human, assistant); None for other turns."""
    return None if "role" in turn or "from" in turn else _pair_of(turn)


def _rounds(row: Fields, key: str, source: SourceConfig) -> list[Message]:
    """Read turns that hold a question and its answer each; the first may have the system text."""
    messages: list[Message] = []
    for number, values in list_turns(row, key):
        turn = open_turn(row, values, key)
        names = _round_of(turn.values)
        if names is None:
            raise RowRejected(
                "bad_turn",
                _("turn {number} has no question and answer; it has {keys}").format(
                    number=number, keys=keys_of(turn.values)
                ),
            )
        if number == 1:
            messages += _system(turn, source)
        asked, answered = (_text(turn, name, source) for name in names)
        answer = Message("assistant", answered, learn=read_learn(turn, number, "assistant"))
        messages += [Message("user", asked), *_with_thinking([answer], turn)]
    return messages


def _text(row: Fields, key: str, source: SourceConfig, default: str | None = None) -> str:
    """Return the text of a key, or the default when the key is missing. Raises RowRejected."""
    value = row.get(key)
    if value is None and default is not None:
        return default
    if value.__class__ is str and (value[:1] not in _ENCODED or default is not None) and not is_blank(value):
        return value
    shown = f"{key} ({source.columns[key]})" if key in source.columns else key
    if not row.has(key):
        near = next((str(name) for name in row.values if str(name).strip().lower() == key), "")
        rule = _("no key {shown!r}; the row has {keys}").format(shown=shown, keys=keys_of(row.values))
        raise RowRejected("missing_key", rule + (_suggestion(key, near) if near else ""))
    if not isinstance(value, str):
        raise RowRejected("not_text", _("{shown} is {kind}, not text").format(shown=shown, kind=kind(value)))
    if (key in ANSWERS or key == "target") and is_blank(value):
        raise RowRejected("empty_answer", _("{shown} is empty: there is no answer to learn").format(shown=shown))
    if default is None and value[:1] in _ENCODED and _is_encoded_again(value):
        raise double_encoded(shown)
    return value


def _is_encoded_again(text: str) -> bool:
    """Whether a text is JSON itself: a whole row, or a string with quotes and escapes."""
    if not text.endswith(("}", '"')):
        return False
    try:
        value = json.loads(text)
        return "\\u" in text if isinstance(value, str) else recognise(value) not in (None, "text")
    except (ValueError, RecursionError, RowRejected):
        return False


# -- what a dialogue must be ---------------------------------------------------------------------------------------


def _check_dialogue(messages: Sequence[Message]) -> None:
    for turn, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.tool_calls and is_blank(message.content):
            raise RowRejected("empty_answer", _("turn {turn}: an answer is empty").format(turn=turn))
        if message.role == "user" and is_blank(message.content):
            raise RowRejected("empty_question", _("turn {turn}: a question is empty").format(turn=turn))
        check_text(message.content, turn)
        if message.thinking:
            check_text(message.thinking, turn)
        if "{{" in message.content and (
            found := [name for name in PLACEHOLDER.findall(message.content) if name in MUST_FILL]
        ):
            raise DataError(
                _("the placeholder {{{{{found}}}}} is not filled in").format(found=found[0]),
                remedy=f"prepare: {{fill: {{{found[0]}: …}}}}",
            )
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise RowRejected("no_answer", _("the dialogue has no answer to learn"))
    if "user" not in roles and "tool" not in roles:
        raise RowRejected("no_question", _("the dialogue has no question"))
    _check_order(roles)


def _check_order(roles: Sequence[str]) -> None:
    """Raise RowRejected unless roles are in order: at most one system message first, then a question, then alternating."""
    if "system" in roles[1:]:
        turn = roles.index("system", 1) + 1
        raise RowRejected(
            "late_system",
            _("turn {turn}: a system message after the first turn").format(turn=turn),
        )
    start = int(roles[0] == "system")
    if roles[start] == "assistant":
        raise RowRejected("answer_first", _("the dialogue begins with an answer"))
    before = "user"
    for turn, role in enumerate(roles[start:], start + 1):
        if turn > start + 1 and role == before and role != "tool":
            raise RowRejected(
                "roles_repeat",
                _("turn {turn}: {role} speaks twice in a row").format(turn=turn, role=role),
            )
        if role == "tool" and before == "user":
            raise RowRejected(
                "tool_first",
                _("turn {turn}: a tool answers before it is called").format(turn=turn),
            )
        before = role
    if before != "assistant":
        raise RowRejected(
            "ends_unanswered",
            _("the dialogue ends with turn {count}, a {before} turn").format(count=len(roles), before=before),
        )


def _split_thinking(message: Message, turn: int) -> Message:
    """Move `<think>…</think>` at the start of an answer to its `thinking`."""
    if message.role != "assistant" or not (found := THINKING.match(message.content)):
        return message
    thinking = found[1].strip()
    if message.thinking is not None and thinking and thinking != message.thinking.strip():
        raise RowRejected("ambiguous", _("turn {number} has two different thinking texts").format(number=turn))
    content = message.content[found.end() :]
    if is_blank(content) and not message.tool_calls:
        raise RowRejected(
            "only_thinking",
            _("turn {turn}: the answer contains only thinking").format(turn=turn),
        )
    made = Message("assistant", content, message.thinking or thinking or None)
    if made.thinking and not message.tool_calls and message.learn is None and message.name is None:
        return made
    return replace(message, content=content, thinking=made.thinking)


def _filled(message: Message, fill: Mapping[str, str]) -> Message:
    if not fill or "{{" not in message.content:
        return message
    content = PLACEHOLDER.sub(lambda found: fill.get(found[1], found[0]), message.content)
    return replace(message, content=content)


def _suggestion(ours: str, theirs: str) -> str:
    return _("; {theirs!r}: did you mean {ours!r}?").format(theirs=theirs, ours=ours)
