"""Join a log of one message a row, as help desks export it, to dialogues: one for each session, in the order of the file.

A session, its sender and its text have many names. The recipe's `columns` names others: {session_id: …, role: …, content: …}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from tongwen.core.errors import DataError
from tongwen.core.i18n import _
from tongwen.data.formats import TURNS
from tongwen.data.row import RawRow
from tongwen.recipe.data import SourceConfig

SESSIONS = (
    *("session_id", "session", "conversation_id", "dialogue_id", "dialog_id", "chat_id", "thread_id", "ticket_id"),
    *("会话id", "会话编号", "会话号", "会话", "对话id", "对话编号", "工单号", "工单id"),
)
SENDERS = ("role", "from", "sender", "speaker", "author", "发送方", "发送者", "发送人", "发言人", "说话人", "角色")
TEXTS = ("content", "text", "message", "value", "内容", "消息", "消息内容", "文本", "发言内容")
LARGEST = 1 << 28  # bytes of a log: its sessions are held until the file ends, because they may be mixed


class Names(NamedTuple):
    """The keys of a log's rows: who belongs together, who speaks, and the words."""

    session: str
    sender: str
    text: str


def join_messages(rows: Iterator[RawRow], source: SourceConfig, notify: Callable[[str], None]) -> Iterator[RawRow]:
    """Yield the dialogues of a log; other rows as they are. What one sender writes in a row is one turn.

    A dialogue has the number of its first row. A session beside a row that cannot be read is refused as a whole, because a
    message of it may be missing.
    """
    first = next(rows, None)
    if first is None:
        return
    rows = chain([first], rows)
    names = names_of_log(first.value, source)
    if names is None:
        yield from rows
        return
    notify(_("read as a log of one message a row; {session} tells which belong together").format(session=names.session))
    sessions: dict[str, list[RawRow]] = {}
    damaged, size, before, is_after_damage = set[str](), 0, "", False
    for raw in rows:
        size += raw.size
        if size > LARGEST:
            raise DataError(
                _("this log has more than {size:,} bytes").format(size=LARGEST),
                remedy=_("split it into files that hold whole sessions"),
            )
        session = "" if raw.problem else _session_of(raw.value, names)
        if session:
            sessions.setdefault(session, []).append(raw)
            damaged |= {session} if is_after_damage else set()
            before, is_after_damage = session, False
        else:
            yield raw if raw.problem else replace(raw, problem=_lacking(raw.value, names), reason="missing_key")
            damaged |= {before} if before else set()
            is_after_damage = True
    for session, messages in sessions.items():
        yield _dialogue(messages, names, source, is_damaged=session in damaged)


def names_of_log(row: Any, source: SourceConfig) -> Names | None:
    """Return the keys of a log's row; None for any other row."""
    if not isinstance(row, dict) or any(name in row for name in TURNS):
        return None
    keys = {str(key).strip().lower(): key for key in row}
    found = [
        source.columns.get(ours) or next((keys[name] for name in usual if name in keys), None)
        for ours, usual in (("session_id", SESSIONS), ("role", SENDERS), ("content", TEXTS))
    ]
    return Names(*map(str, found)) if all(name in row for name in found) and len({*found}) == len(found) else None


def _session_of(row: Any, names: Names) -> str:
    """Return a row's session; "" when the row lacks it, its sender or its text."""
    if not isinstance(row, dict) or not isinstance(row.get(names.text), str) or not row.get(names.sender):
        return ""
    value = row.get(names.session)
    return "" if value is None or isinstance(value, (dict, list, bool)) else str(value).strip()


def _lacking(row: Any, names: Names) -> str:
    lacking = [name for name in names if not isinstance(row, dict) or row.get(name) in (None, "")]
    return _("a message without {names}").format(names=_(", ").join(lacking or [names.text]))


def _dialogue(messages: list[RawRow], names: Names, source: SourceConfig, *, is_damaged: bool) -> RawRow:
    role, content = source.columns.get("role", "role"), source.columns.get("content", "content")
    turns: list[dict[str, Any]] = []
    for raw in messages:
        rest = {key: value for key, value in raw.value.items() if key not in names}
        sender, text = raw.value[names.sender], raw.value[names.text]
        if turns and turns[-1][role] == sender:
            turns[-1][content] += f"\n{text}"
        else:
            turns.append({role: sender, content: text, **rest})
    value = {source.columns.get("messages", "messages"): turns}
    row = RawRow(messages[0].file, messages[0].row, value, sum(raw.size for raw in messages))
    if not is_damaged:
        return row
    rule = _("a row beside this session cannot be read, so that a message of it may be missing")
    return replace(row, problem=rule, reason="damaged_session")
