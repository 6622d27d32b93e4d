"""Read a row of preference data: a prompt with a chosen and a rejected answer, or one answer with a verdict (KTO).

Each answer is put into a row of the usual shape, which `formats.read_dialogue` reads as any other. What the two dialogues
share is the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tongwen.core.errors import DataError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Message, Origin, Preference
from tongwen.data.fields import is_empty
from tongwen.data.formats import TURNS, read_dialogue, recognise, with_columns
from tongwen.data.preference import find_pair, find_verdict, is_true
from tongwen.data.row import RawRow, kind
from tongwen.data.texts import keys_of
from tongwen.data.turns import IN_TURNS, ROLES
from tongwen.recipe.data import SourceConfig

_QUESTIONS = ("prompt", "instruction", "question", "query")
_ANSWERS = ("output", "completion", "response", "answer")

Row = dict[str, Any]


def read_preference(raw: RawRow, source: SourceConfig, fill: Mapping[str, str]) -> Preference:
    """Convert one row. Raises RowRejected, or DataError when the first row shows that the whole file has no preferences."""
    origin = Origin(raw.file, raw.row)
    if not isinstance(raw.value, dict):
        raise RowRejected("not_an_object", _("a row must be an object, this is {kind}").format(kind=kind(raw.value)))
    mapped = {*source.columns.values()} - {*source.columns}
    row = {key: value for key, value in with_columns(raw.value, source).items() if key not in mapped}
    in_turns = {ours: theirs for ours, theirs in source.columns.items() if ours in IN_TURNS}
    plain = source.model_copy(update={"columns": in_turns}) if source.columns else source
    chosen_key, rejected_key = find_pair(row)
    if rejected_key or chosen_key:
        rest = {key: value for key, value in row.items() if key not in (chosen_key, rejected_key)}
        own = row[chosen_key] if chosen_key else None
        chosen = _read(_with_answer(rest, own, chosen_key, plain) if chosen_key else rest, plain, fill, origin)
        if not rejected_key:
            raise RowRejected("unpaired", _("there is {chosen}, but no rejected answer").format(chosen=chosen_key))
        rejected = _read(_with_answer(rest, row[rejected_key], rejected_key, plain), plain, fill, origin)
        return _pair(chosen, rejected)
    verdict = find_verdict(row)
    if verdict:
        dialogue = _read({key: value for key, value in row.items() if key != verdict}, plain, fill, origin)
        prompt, answer, good = dialogue.messages[:-1], dialogue.messages[-1:], is_true(row[verdict])
        return Preference(
            prompt, answer if good else (), () if good else answer, origin, dialogue.tools, dialogue.unread
        )
    raise _unknown(raw)


def _unknown(raw: RawRow) -> DataError | RowRejected:
    rule = _("this row is no preference: it has no chosen and rejected answer and no label; it has: {keys}").format(
        keys=keys_of(raw.value)
    )
    if raw.row > 1:
        return RowRejected("unknown_format", rule)
    return DataError(
        rule,
        place=f"{raw.file}:{raw.row}",
        remedy=_(
            "name the columns: {path: …, columns: {prompt: YOUR_QUESTION, chosen: BETTER, rejected: WORSE}}; plain conversations belong under prepare.dialogues"
        ),
    )


def _with_answer(rest: Row, answer: Any, key: str, source: SourceConfig) -> Row:
    """Return a row of the usual shape: the rest of a preference row with this answer, in place of its own if it has one."""
    if isinstance(answer, dict):
        answer = [answer]
    if not isinstance(answer, (str, list)) or not answer:
        raise RowRejected("empty_answer", _("{key} holds no answer").format(key=key))
    if isinstance(answer, list) and not all(isinstance(turn, dict) for turn in answer):
        raise RowRejected(
            "several_answers", _("{key} is a list, but not of messages; write one pair a row").format(key=key)
        )
    asked = rest.get("input")
    if isinstance(asked, dict) and "messages" in asked:  # OpenAI
        rest = {**{name: value for name, value in rest.items() if name != "input"}, **asked}
    turns = next((name for name in TURNS if not is_empty(rest.get(name))), "")
    question = next((name for name in _QUESTIONS if not is_empty(rest.get(name))), "")
    if isinstance(answer, list) and _role(answer[0], source) in ("user", "system"):  # it repeats the prompt
        return {**{name: value for name, value in rest.items() if name not in (turns, question)}, "messages": answer}
    if turns and isinstance(rest[turns], list):
        before = rest[turns]
        if _role(before[-1], source) == "assistant":
            before = before[:-1]
        return {**rest, turns: [*before, *_as_turns(answer, before)]}
    if not question:
        raise RowRejected("no_prompt", _("the row has no prompt: it has {keys}").format(keys=keys_of(rest)))
    others = {name: value for name, value in rest.items() if name not in (*_ANSWERS, question)}
    if question == "prompt" or (isinstance(answer, list) and "input" not in others):
        return {**others, "prompt": rest[question], "completion": answer}
    text = answer if isinstance(answer, str) else _only_text(answer, key)
    if question == "instruction":
        return {"input": "", **others, "instruction": rest[question], "output": text}
    return {**others, "query": rest[question], "response": text}


def _role(turn: Any, source: SourceConfig) -> str:
    """Return our name of a turn's role; "" for one that is unknown."""
    keys = ("role", "from", *(source.columns[ours] for ours in ("role", "from") if ours in source.columns))
    name = next((str(turn[key]) for key in keys if key in turn), "") if isinstance(turn, dict) else ""
    return source.roles.get(name) or ROLES.get(name.lower(), "")


def _as_turns(answer: str | list[Row], before: Sequence[Any]) -> list[Row]:
    """Return an answer as turns, in the words of the turns before it."""
    if isinstance(answer, list):
        return answer
    sharegpt = bool(before) and isinstance(before[0], dict) and "from" in before[0]
    return [{"from": "gpt", "value": answer} if sharegpt else {"role": "assistant", "content": answer}]


def _only_text(answer: list[Row], key: str) -> str:
    text = answer[0].get("content", answer[0].get("value"))
    if len(answer) > 1 or not isinstance(text, str):
        raise RowRejected("several_answers", _("{key} must be one answer here").format(key=key))
    return text


def _read(row: Row, source: SourceConfig, fill: Mapping[str, str], origin: Origin) -> Dialogue:
    found = recognise(row)
    if found is None or found == "text":
        raise RowRejected("no_prompt", _("the row has no prompt: it has {keys}").format(keys=keys_of(row)))
    return read_dialogue(row, found, source, fill, origin)


def _pair(chosen: Dialogue, rejected: Dialogue) -> Preference:
    """Return the preference of two dialogues; they must be the same up to an answer."""
    one, other = chosen.messages, rejected.messages
    shared = next(
        (turn for turn, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    if one == other:
        raise RowRejected("equal_answers", _("the chosen and the rejected answer are the same"))
    first: list[Message] = [messages[shared] for messages in (one, other) if shared < len(messages)]
    if len(first) < 2 or any(message.role != "assistant" for message in first):
        raise RowRejected(
            "prompts_differ",
            _("turn {turn}: the chosen and the rejected answer belong to different prompts").format(turn=shared + 1),
        )
    return Preference(one[:shared], one[shared:], other[shared:], chosen.origin, chosen.tools, chosen.unread)
