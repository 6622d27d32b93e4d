"""Convert raw rows to Documents and Dialogues. The keys of a row decide its format.

A row becomes a record, or is refused with a reason for the ledger and rejected.jsonl. Nothing is guessed: values that are
not text are not converted, and ambiguous rows and turns out of order are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tongwen.core.errors import DataError, RecipeError, RowRefused
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document, Message, Origin
from tongwen.data.row import RawRow, kind
from tongwen.recipe.data import SourceConfig

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
PAIRS = (
    ("question", "answer"),
    ("question", "std_answer"),
    ("q", "a"),
    ("问题", "答案"),
    ("问题", "回答"),
    ("问", "答"),
)
LEARN = ("learn", "train", "loss", "weight")
IN_TURNS = ("from", "value", "role", "content")
# All keys that the readers use; `columns` can map each of them.
NAMES = (
    "instruction", "input", "output", "target", "history", "system", "tools", "functions", "messages", "conversations",
    "prompt", "completion", "response", "instruct", "query", "question", "answer", "text", *IN_TURNS,
)  # fmt: skip

THINKING = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
# Placeholders of identity data sets; unfilled, the model would learn them as its name.
MUST_FILL = {"name", "author"}
_VISIBLE = re.compile("[^\\s\xad\u115f\u1160\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff]")
_MARK = re.compile(r"(?:\A|\n)[ \t]*(Human|User|Assistant|System)[ \t]*[:：]")
_MARK_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant", "System": "system"}
_INSIDE = re.compile(r"\s*(?:Human|User)[ \t]*[:：]")

Read = tuple[list[Message], list[Any]]  # the messages and the tools of a row


# -- which format --------------------------------------------------------------------------------------------------


def recognise(row: Any) -> str | None:
    """Return the format of a row by its keys; None when it is unknown. Raises RowRefused when two formats match."""
    if not isinstance(row, dict):
        return None
    turns = [name for name in ("messages", "conversations") if row.get(name) is not None]
    is_alpaca = "instruction" in row and not row.keys().isdisjoint(("output", "input", "target"))
    if len(turns) > 1 or (turns and is_alpaca and row.get("instruction")):
        names = [*turns, *(["instruction"] if is_alpaca else [])]
        raise RowRefused(
            "ambiguous",
            _("the row matches more than one format: it has {names}; name the format in the recipe").format(
                names=_(", ").join(names)
            ),
        )
    if turns:
        return turns[0]
    if is_alpaca or ("input" in row and "target" in row):
        return "turns_inside" if _has_turns_inside(row) else "alpaca"
    if "prompt" in row and ("completion" in row or "response" in row):
        return "completion"
    if "query" in row and "answer" in row:
        return "query"
    if any(question in row and answer in row for question, answer in PAIRS):
        return "pair"
    return next((name for name in ("messages", "conversations", "text") if name in row), None)


def recognise_row(raw: RawRow, source: SourceConfig) -> str:
    """Return the format of a row of a dialogue source.

    Raises DataError when the first row or the kind of data shows that the whole file has no known format, and RowRefused
    when only this row has none.
    """
    row = raw.value
    place = f"{raw.file}:{raw.row}"
    if isinstance(row, dict):
        _check_preferences(row, source, place)
        row = with_columns(row, source)
    found = recognise(row)
    if found and found != "text":
        return found
    keys = _keys(raw.value)
    rule = _("this row is not a dialogue in a known format; it has: {keys}").format(keys=keys)
    if found == "text":
        remedy = _(
            "plain text belongs under prepare.documents; or name the columns: {path: …, columns: {instruction: text, output: YOUR_ANSWER}}"
        )
        raise DataError(rule, place=place, remedy=remedy)
    columns = _similar_columns(row)
    if columns:
        rule += _suggestion(*next(iter(columns.items())))
    if raw.row > 1:
        raise RowRefused("unknown_format", rule)
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


def _check_preferences(row: dict[str, Any], source: SourceConfig, place: str) -> None:
    """Raise DataError for preference data: the model must not learn its rejected half."""
    mapped = set(source.columns.values())
    found: list[str] = [name for name in ("chosen", "rejected") if name in row and name not in mapped]
    if isinstance(row.get("label"), bool) and "prompt" in row and "completion" in row:
        found = ["label"]
    if found and not mapped & {"chosen", "label"}:
        names = ", ".join(found)
        raise DataError(
            _("this is preference data ({names}); this kind of training does not use it").format(names=names),
            place=place,
            remedy=_(
                "to learn only the chosen answers: {path: …, format: pair, columns: {question: prompt, answer: chosen}}"
            ),
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
    except RowRefused:
        return {}


def _columns_line(columns: Mapping[str, str], row: Any) -> str:
    """Return a recipe line that fixes the error: with the similar keys, or with the first two keys of texts."""
    if not columns and isinstance(row, dict):
        texts = [key for key, value in row.items() if isinstance(value, str) and str(key).lower() not in ("id", "text")]
        columns = dict(zip(("instruction", "output"), texts, strict=False)) if len(texts) > 1 else {}
    pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
    return _("name the columns in the recipe: {{path: …, columns: {{{pairs}}}}}").format(
        pairs=pairs or _("instruction: YOUR_QUESTION, output: YOUR_ANSWER")
    )


# -- records -------------------------------------------------------------------------------------------------------


def read_dialogue(row: Any, format_: str, source: SourceConfig, fill: Mapping[str, str], origin: Origin) -> Dialogue:
    """Convert one row to a dialogue. Raises RowRefused, or DataError when the recipe lacks a setting."""
    if not isinstance(row, dict):
        raise RowRefused("not_an_object", _("a row must be an object, this is {kind}").format(kind=kind(row)))
    if format_ == "text":
        raise DataError(
            _("plain text is not a dialogue"),
            place=str(origin),
            remedy=_("put it under prepare.documents"),
        )
    named = with_columns(row, source)
    if format_ == "alpaca" and _has_turns_inside(named):
        format_ = "turns_inside"
    messages, tools = READERS[format_](named, source)
    messages = [_split_thinking(_filled(message, fill), turn) for turn, message in enumerate(messages, 1)]
    _check_dialogue(messages)
    _check_data(tools, "tools")
    return Dialogue(tuple(messages), origin, tuple(tools))


def read_document(row: Any, source: SourceConfig, origin: Origin) -> Document:
    """Convert one row to a document. Raises RowRefused."""
    theirs = source.columns.get("text", "text")
    text = row.get(theirs) if isinstance(row, dict) else None
    if not isinstance(text, str):
        rule = _("no text under {theirs!r}: the row has {keys}").format(theirs=theirs, keys=_keys(row))
        if isinstance(row, dict) and text is not None:
            raise RowRefused("not_text", _("{theirs} is {kind}, not text").format(theirs=theirs, kind=kind(text)))
        likely = next((key for key in row if str(key).strip().lower() in (theirs.lower(), "content")), "") if isinstance(row, dict) else ""  # fmt: skip
        raise RowRefused("no_text", rule + (_suggestion("text", likely) if likely and likely != theirs else ""))
    if is_blank(text):
        raise RowRefused("empty_text", _("the text is empty"))
    return Document(_check_text(text, theirs), origin)


def is_blank(text: str) -> bool:
    """Whether a text has only invisible characters: blanks, zero-width characters and direction marks."""
    first = text[:1]  # nearly always enough
    return not ("!" <= first <= "~" or "\u4e00" <= first <= "\u9fff") and _VISIBLE.search(text) is None


def with_columns(row: dict[str, Any], source: SourceConfig) -> dict[str, Any]:
    """Rename the columns of a row to our names. A mapped name refers only to the mapped column."""
    if not source.columns:
        return row
    mapped = {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}
    return {**{key: value for key, value in row.items() if key not in source.columns}, **mapped}


# -- one reader per format -----------------------------------------------------------------------------------------


def _read_alpaca(row: dict[str, Any], source: SourceConfig) -> Read:
    """Join instruction and input to one question; BELLE also has input and target."""
    answer = "target" if "target" in row and "output" not in row else "output"
    extra = _text(row, "input", source, default="")
    question = _text(row, "instruction", source, default="" if answer == "target" or not is_blank(extra) else None)
    return [
        *_system(row, source),
        *_history(row),
        Message("user", _joined(question, extra, source)),
        Message("assistant", _text(row, answer, source)),
    ], _tools(row)


def _read_turns_inside(row: dict[str, Any], source: SourceConfig) -> Read:
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
    answer = "target" if "target" in row and "output" not in row else "output"
    return [*messages, Message("assistant", _text(row, answer, source))], _tools(row)


def _read_messages(row: dict[str, Any], source: SourceConfig) -> Read:
    """OpenAI: role and content, tool calls, reasoning."""
    return _messages(row, "messages", source), _tools(row)


def _read_conversations(row: dict[str, Any], source: SourceConfig) -> Read:
    """ShareGPT and BELLE: from and value, with function_call and observation."""
    messages = _system(row, source)
    for number, turn in _turns(row, "conversations", source):
        role = _role(turn.get("from", turn.get("role")), number, source)
        content = turn.get("value", turn.get("content"))
        if not isinstance(content, str):
            raise _bad_content(number, "value", content, turn)
        learn = _learn(turn, number)
        if role == "function_call":
            call = _json(content, _("turn {number}").format(number=number))
            calls = call if isinstance(call, list) else [call]
            messages.append(Message("assistant", "", None, tuple(_tool_call(one, number) for one in calls), learn))
        else:
            messages.append(Message(role, content, learn=learn))
    return messages, _tools(row)


def _read_completion(row: dict[str, Any], source: SourceConfig) -> Read:
    """prompt and completion (or response): two texts, or two lists of messages."""
    answer = "response" if "response" in row and "completion" not in row else "completion"
    if isinstance(row.get("prompt"), list) and isinstance(row.get(answer), list):
        messages = [*_messages(row, "prompt", source), *_messages(row, answer, source)]
        return [*_system(row, source), *messages], _tools(row)
    return _read_question(row, source, "prompt", answer)


def _read_query(row: dict[str, Any], source: SourceConfig) -> Read:
    """Join instruct and query to one question, as the older project did."""
    question = _joined(_text(row, "instruct", source, default=""), _text(row, "query", source), source)
    return [
        *_system(row, source),
        Message("user", question),
        Message("assistant", _text(row, "answer", source)),
    ], _tools(row)


def _read_pair(row: dict[str, Any], source: SourceConfig) -> Read:
    names = next(((one, two) for one, two in PAIRS if one in row and two in row), PAIRS[0])
    return _read_question(row, source, *names)


READERS: dict[str, Callable[[dict[str, Any], SourceConfig], Read]] = {
    "alpaca": _read_alpaca,
    "turns_inside": _read_turns_inside,
    "messages": _read_messages,
    "conversations": _read_conversations,
    "completion": _read_completion,
    "query": _read_query,
    "pair": _read_pair,
}


def _read_question(row: dict[str, Any], source: SourceConfig, question: str, answer: str) -> Read:
    """One question, one answer."""
    asked, answered = _text(row, question, source), _text(row, answer, source)
    return [
        *_system(row, source),
        *_history(row),
        Message("user", asked),
        Message("assistant", answered),
    ], _tools(row)


# -- parts of a row ------------------------------------------------------------------------------------------------


def _joined(first: str, second: str, source: SourceConfig) -> str:
    """Join two texts to one question; either may be empty."""
    return source.separator.join(text for text in (first, second) if not is_blank(text))


def _system(row: dict[str, Any], source: SourceConfig) -> list[Message]:
    text = _text(row, "system", source, default="")
    return [Message("system", text)] if not is_blank(text) else []


def _history(row: dict[str, Any]) -> list[Message]:
    turns = row.get("history") or ()
    if not isinstance(turns, (list, tuple)) or not all(
        isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(part, str) for part in turn)
        for turn in turns
    ):
        raise RowRefused("bad_history", _("history must be a list of [question, answer]"))
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
        raise RowRefused("no_mark", _("the text does not begin with `Human:` or `User:`"))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    messages = [
        Message(_MARK_ROLES[mark[1]], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)
    ]
    if messages and messages[-1].role == "assistant" and not messages[-1].content:
        messages.pop()
    return messages


def _turns(row: dict[str, Any], key: str, source: SourceConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, turn) with our key names. Raises RowRefused for a turn that is not an object."""
    turns = row.get(key)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        raise _double_encoded(key)
    if not isinstance(turns, list) or not turns:
        found = _("empty") if turns == [] else kind(turns)
        raise RowRefused(
            "no_messages",
            _("{key} must be a non-empty list, this is {found}").format(key=key, found=found),
        )
    mapped = any(name in source.columns for name in IN_TURNS)
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowRefused(
                "bad_turn",
                _("turn {number} is {kind}, not an object").format(number=number, kind=kind(turn)),
            )
        yield number, with_columns(turn, source) if mapped else turn


def _messages(row: dict[str, Any], key: str, source: SourceConfig) -> list[Message]:
    messages = []
    for number, turn in _turns(row, key, source):
        role = _role(turn.get("role", turn.get("from")), number, source)
        calls = turn.get("tool_calls") or ()
        if isinstance(calls, str):
            calls = _json(calls, "tool_calls")
        if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
            raise RowRefused(
                "bad_tool_calls",
                _("turn {number}: tool_calls must be a list of objects").format(number=number),
            )
        if turn.get("function_call"):
            calls = [*calls, turn["function_call"]]
        thinking = turn.get("reasoning_content", turn.get("thinking"))
        if thinking is not None and not isinstance(thinking, str):
            raise RowRefused(
                "bad_thinking",
                _("turn {number}: reasoning_content is {kind}").format(number=number, kind=kind(thinking)),
            )
        made = tuple(_tool_call(call, number) for call in calls)
        content = _content(turn, number, optional=bool(made))
        if role == "function_call":
            role = "assistant"
        messages.append(Message(role, content, thinking or None, made, _learn(turn, number)))
    return messages


def _content(turn: dict[str, Any], number: int, optional: bool) -> str:
    """Return the text of a turn; a list of text parts is joined."""
    content = turn.get("content", turn.get("value"))
    if content is None and optional:
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RowRefused(
                    "not_only_text",
                    _("turn {number} has a part of type {type!r}; only text is supported").format(
                        number=number, type=part.get("type")
                    ),
                )
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _bad_content(number, "content", content, turn)
    return content


def _bad_content(number: int, key: str, content: Any, turn: dict[str, Any]) -> RowRefused:
    return RowRefused(
        "bad_content",
        _("turn {number}: {key} is {kind}, not text; the turn has {keys}").format(
            number=number, key=key, kind=kind(content), keys=_keys(turn)
        ),
    )


def _learn(turn: dict[str, Any], number: int) -> bool | None:
    learn = next((turn[key] for key in LEARN if turn.get(key) is not None), None)
    if learn not in (None, 0, 1):
        raise RowRefused(
            "bad_learn",
            _("turn {number}: {learn!r} does not say whether to learn it; write true or false").format(
                number=number, learn=learn
            ),
        )
    return None if learn is None else bool(learn)


def _tools(row: dict[str, Any]) -> list[Any]:
    tools = row.get("tools") or row.get("functions") or []
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowRefused("bad_tools", _("tools must be a list of objects"))
    return tools


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    """Return a tool call in OpenAI's format, with the arguments as an object, as chat templates expect."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowRefused("bad_tool_calls", _("turn {number}: a tool call needs a name").format(number=number))
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments, _("turn {number}: arguments").format(number=number)) if arguments else {}
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    _check_data(made, _("turn {number}: tool_calls").format(number=number))
    return made


def _text(row: dict[str, Any], key: str, source: SourceConfig, default: str | None = None) -> str:
    """Return the text of a key, or the default when the key is missing. Raises RowRefused."""
    value = row.get(key)
    if value is None and default is not None:
        return default
    shown = f"{key} ({source.columns[key]})" if key in source.columns else key
    if key not in row:
        near = next((str(name) for name in row if str(name).strip().lower() == key), "")
        rule = _("no key {shown!r}; the row has {keys}").format(shown=shown, keys=_keys(row))
        raise RowRefused("missing_key", rule + (_suggestion(key, near) if near else ""))
    if not isinstance(value, str):
        raise RowRefused("not_text", _("{shown} is {kind}, not text").format(shown=shown, kind=kind(value)))
    if key in ("output", "target", "completion", "response", "answer") and is_blank(value):
        raise RowRefused("empty_answer", _("{shown} is empty: there is no answer to learn").format(shown=shown))
    if default is None and value[:1] in ("{", '"') and _is_encoded_again(value):
        raise _double_encoded(shown)
    return value


def _is_encoded_again(text: str) -> bool:
    """Whether a text is JSON itself: a whole row, or a string with quotes and escapes."""
    if not text.endswith(("}", '"')):
        return False
    try:
        value = json.loads(text)
        return "\\u" in text if isinstance(value, str) else recognise(value) not in (None, "text")
    except (ValueError, RecursionError, RowRefused):
        return False


def _double_encoded(key: str) -> RowRefused:
    return RowRefused(
        "double_encoded",
        _("{key} contains JSON that was encoded again as text").format(key=key),
    )


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowRefused(
            "bad_json_inside", _("{where} is not JSON: {error}").format(where=where, error=error)
        ) from None


def _role(value: Any, number: int, source: SourceConfig) -> str:
    role = None
    if isinstance(value, str):
        role = source.roles.get(value) or ROLES.get(value.lower())
    if role is None:
        raise RowRefused(
            "unknown_role",
            _("turn {number}: unknown role {value!r}; map it in the recipe: roles: {{{value}: user}}").format(
                number=number, value=value
            ),
        )
    return role


# -- what a dialogue must be ---------------------------------------------------------------------------------------


def _check_dialogue(messages: Sequence[Message]) -> None:
    for turn, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.tool_calls and is_blank(message.content):
            raise RowRefused("empty_answer", _("turn {turn}: an answer is empty").format(turn=turn))
        if message.role == "user" and is_blank(message.content):
            raise RowRefused("empty_question", _("turn {turn}: a question is empty").format(turn=turn))
        _check_text(message.content, turn)
        if message.thinking:
            _check_text(message.thinking, turn)
        if "{{" in message.content and (
            found := [name for name in PLACEHOLDER.findall(message.content) if name in MUST_FILL]
        ):
            raise DataError(
                _("the placeholder {{{{{found}}}}} is not filled in").format(found=found[0]),
                remedy=f"prepare: {{fill: {{{found[0]}: …}}}}",
            )
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise RowRefused("no_answer", _("the dialogue has no answer to learn"))
    if "user" not in roles and "tool" not in roles:
        raise RowRefused("no_question", _("the dialogue has no question"))
    _check_order(roles)


def _check_order(roles: Sequence[str]) -> None:
    """Raise RowRefused unless roles are in order: at most one system message first, then a question, then alternating."""
    if "system" in roles[1:]:
        turn = roles.index("system", 1) + 1
        raise RowRefused(
            "late_system",
            _("turn {turn}: a system message after the first turn").format(turn=turn),
        )
    start = int(roles[0] == "system")
    if roles[start] == "assistant":
        raise RowRefused("answer_first", _("the dialogue begins with an answer"))
    before = "user"
    for turn, role in enumerate(roles[start:], start + 1):
        if turn > start + 1 and role == before and role != "tool":
            raise RowRefused(
                "roles_repeat",
                _("turn {turn}: {role} speaks twice in a row").format(turn=turn, role=role),
            )
        if role == "tool" and before == "user":
            raise RowRefused(
                "tool_first",
                _("turn {turn}: a tool answers before it is called").format(turn=turn),
            )
        before = role
    if before != "assistant":
        raise RowRefused(
            "ends_unanswered",
            _("the dialogue ends with turn {count}, a {before} turn").format(count=len(roles), before=before),
        )


def _split_thinking(message: Message, turn: int) -> Message:
    """Move `<think>…</think>` at the start of an answer to its `thinking`."""
    if message.role != "assistant" or message.thinking is not None or not (found := THINKING.match(message.content)):
        return message
    content = message.content[found.end() :]
    if is_blank(content) and not message.tool_calls:
        raise RowRefused(
            "only_thinking",
            _("turn {turn}: the answer contains only thinking").format(turn=turn),
        )
    return Message(message.role, content, found[1].strip() or None, message.tool_calls, message.learn)


def _filled(message: Message, fill: Mapping[str, str]) -> Message:
    if not fill or "{{" not in message.content:
        return message
    content = PLACEHOLDER.sub(lambda found: fill.get(found[1], found[0]), message.content)
    return Message(message.role, content, message.thinking, message.tool_calls, message.learn)


def _check_text(text: str, place: str | int) -> str:
    """Return a text without surrogates and NUL, else raise RowRefused. place: its key, or the number of its turn."""
    broken = False
    try:
        text.encode()
    except UnicodeEncodeError:
        broken = True
    if broken or "\0" in text:
        key = _("turn {place}").format(place=place) if isinstance(place, int) else place
        if broken:
            raise RowRefused("lone_surrogate", _("{key} contains an unpaired surrogate").format(key=key))
        raise RowRefused("nul_character", _("{key} contains a NUL character").format(key=key))
    return text


def _check_data(value: Any, key: str) -> None:
    """Raise RowRefused for tools or arguments that are not valid JSON: lone surrogates, NaN or infinity."""
    if not value:
        return
    try:
        _check_text(json.dumps(value, ensure_ascii=False, allow_nan=False), key)
    except (ValueError, RecursionError) as error:
        raise RowRefused("not_a_number", f"{key}: {error}") from None


def _suggestion(ours: str, theirs: str) -> str:
    return _("; {theirs!r}: did you mean {ours!r}?").format(theirs=theirs, ours=ours)


def _keys(row: Any) -> str:
    return ", ".join(map(str, row)) if isinstance(row, dict) else kind(row)
