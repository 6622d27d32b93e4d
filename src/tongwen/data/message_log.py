"""Join a log of one message a row, as help desks export it, to dialogues: one for each session, in the order of the file, or
of the messages' times where the file is not.

A session, its sender and its text have many names. The recipe's `columns` names others: {session_id: …, role: …, content: …}, and
`roles` the senders. A refusal proposes both from what the rows hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from datetime import datetime
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

from tongwen.core.errors import DataError
from tongwen.core.i18n import _
from tongwen.data.formats import TURNS, recognise, with_columns
from tongwen.data.row import RawRow
from tongwen.data.texts import as_yaml
from tongwen.data.turns import EVERYONE, ROLES
from tongwen.recipe.data import SourceConfig

SESSIONS = (
    *("session_id", "session", "conversation_id", "dialogue_id", "dialog_id", "chat_id", "thread_id", "ticket_id"),
    *("conversation", "chat", "thread", "ticket"),
    *("会话id", "会话编号", "会话号", "会话", "对话id", "对话编号", "工单号", "工单id", "工单编号", "咨询编号"),
)
SENDERS = (
    "role",
    "from",
    "sender",
    "speaker",
    "author",
    "发送方",
    "发送者",
    "发送人",
    "发言人",
    "说话人",
    "角色",
    "身份",
)
TEXTS = ("content", "text", "message", "msg", "value", "内容", "消息", "消息内容", "文本", "发言内容", "聊天内容")
TIMES = (
    "time",
    "timestamp",
    "date",
    "datetime",
    "created_at",
    "sent_at",
    "时间",
    "发送时间",
    "消息时间",
    "发言时间",
    "日期",
)
PEEK = 200  # rows from which a refusal proposes a mapping
SHOWN = 20  # senders that it names; where there are more, most are customers
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
        peeked = [first, *islice(rows, 1, PEEK)] if _is_like_a_log(first.value, source) else []
        _refuse_unnamed([raw.value for raw in peeked if not raw.problem], source, f"{first.file}:{first.row}")
        yield from chain(peeked, rows)
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
    time = next((key for key in first.value if str(key).strip().lower() in TIMES), "")
    if time and (late := [session for session, messages in sessions.items() if _sort_by_time(messages, time)]):
        notify(_("{count} sessions are not in the order of {time}: sorted by it").format(count=len(late), time=time))
    # After the sort: who begins a session is judged by its first message.
    _check_senders(sessions.values(), names, source, f"{first.file}:{first.row}")
    left_out = sum(_leave_out_notices(messages, names, source) for messages in sessions.values())
    if left_out:
        notify(
            _("{count} messages without a text, or of the system amid a session, are left out").format(count=left_out)
        )
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


def _is_like_a_log(row: Any, source: SourceConfig) -> bool:
    """Whether a row may be one message: several columns of plain values, and no format of dialogues."""
    return (
        isinstance(row, dict)
        and len(row) > 1
        and not any(isinstance(value, (dict, list)) for value in row.values())
        and recognise(with_columns(row, source)) in (None, "", "text")
    )


def _refuse_unnamed(rows: list[dict[str, Any]], source: SourceConfig, place: str) -> None:
    """Raise DataError for a log whose columns have other names, with the mapping that its rows suggest, or without a session."""
    columns = {str(key): [row.get(key) for row in rows] for key in (rows[0] if rows else {})}
    if found := _propose(columns):
        raise DataError(
            _("this looks like a log of one message a row, whose columns have other names"),
            place=place,
            remedy=_(
                "if that is right: {{path: {path}, columns: {{session_id: {session}, role: {sender}, content: {text}}}}}"
            ).format(path=source.path, session=found.session, sender=found.sender, text=found.text),
        )
    keys = {key.strip().lower() for key in columns}
    if keys.intersection(SENDERS) and keys.intersection(TEXTS) and not recognise(with_columns(rows[0], source)):
        raise DataError(
            _("this looks like a log of one message a row, but no column tells which messages belong together"),
            place=place,
            remedy=_("add a column `session_id` that is the same for all messages of one conversation"),
        )


def _propose(columns: dict[str, list[Any]]) -> Names | None:
    """Return which columns hold the session, the sender and the text: the text is the longest, senders are few and take turns, the
    rows of a session stand together. None where that is not clear."""
    texts = {
        key: sum(len(str(value or "")) for value in values)
        for key, values in columns.items()
        if not all(map(_time_of, values))
    }
    text = max(texts, key=lambda key: texts[key], default="")
    senders, sessions = list[tuple[int, str]](), list[tuple[int, str]]()
    for key, values in columns.items():
        distinct, runs = len({str(value) for value in values}), sum(1 for _group in groupby(map(str, values)))
        if key == text or None in values or len(values) < 4:
            continue
        if 1 < distinct <= len(values) // 2 and runs > distinct and runs > len(values) // 2:
            senders.append((distinct, key))
        elif runs == distinct <= len(values) // 2:
            sessions.append((-distinct, key))
    return Names(min(sessions)[1], min(senders)[1], text) if senders and sessions else None


def _check_senders(sessions: Collection[list[RawRow]], names: Names, source: SourceConfig, place: str) -> None:
    """Raise DataError when most sessions have senders without a role, with a mapping of them all: who begins most of their
    sessions is a user."""
    begun, seen, lost = Counter[str](), Counter[str](), 0
    for messages in sessions:
        senders = dict.fromkeys(str(raw.value[names.sender]) for raw in messages)
        begun[next(iter(senders))] += 1
        seen.update(senders.keys())
        lost += any(one not in source.roles and one.lower() not in ROLES for one in senders)
    if EVERYONE in source.roles or 2 * lost <= len(sessions):
        return
    unknown = [one for one in seen if one not in source.roles and one.lower() not in ROLES]
    roles = {one: "user" if 2 * begun[one] > seen[one] else "assistant" for one in unknown}
    if len(unknown) > SHOWN:  # customers by their names
        few = {one: role for one, role in roles.items() if role == "assistant"}
        roles = {**dict(islice(few.items(), SHOWN)), EVERYONE: "user"}
    shown = _(", ").join(map(str, unknown[:SHOWN])) + (" …" if len(unknown) > SHOWN else "")
    raise DataError(
        _("the role of these senders is not known: {shown}").format(shown=shown),
        place=place,
        remedy=_("if that is right: {{path: {path}, roles: {{{roles}}}}}").format(
            path=source.path, roles=", ".join(f"{as_yaml(one)}: {role}" for one, role in roles.items())
        ),
    )


def _sort_by_time(messages: list[RawRow], key: str) -> bool:
    """Sort a session's messages by their times, if each has one; return whether that moved any."""
    times = [_time_of(raw.value.get(key)) for raw in messages]
    try:
        if None in times or times == sorted(times):  # type: ignore[type-var]
            return False
    except TypeError:  # some with a zone and some without
        return False
    order = sorted(range(len(messages)), key=times.__getitem__)  # type: ignore[arg-type]
    messages[:] = [messages[place] for place in order]
    return True


def _time_of(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(value).strip().replace("/", "-"))
    except ValueError:
        return None


def _session_of(row: Any, names: Names) -> str:
    """Return a row's session; "" when the row lacks it, its sender or its text."""
    if not isinstance(row, dict) or not isinstance(row.get(names.text), str) or not row.get(names.sender):
        return ""
    value = row.get(names.session)
    return "" if value is None or isinstance(value, (dict, list, bool)) else str(value).strip()


def _lacking(row: Any, names: Names) -> str:
    lacking = [name for name in names if not isinstance(row, dict) or row.get(name) in (None, "")]
    return _("a message without {names}").format(names=_(", ").join(lacking or [names.text]))


def _leave_out_notices(messages: list[RawRow], names: Names, source: SourceConfig) -> int:
    """Leave out what no turn can hold, unless nothing else is there: messages without a text, and a system's notices that come
    after a session has begun. Their sizes go to the message before. Return how many."""
    kept = list[RawRow]()
    for raw in messages:
        is_notice = _role_of(raw.value[names.sender], source) == "system"
        if kept and (is_notice or not raw.value[names.text].strip()):
            kept[-1] = replace(kept[-1], size=kept[-1].size + raw.size)
        else:
            kept.append(raw)
    count = len(messages) - len(kept)
    messages[:] = kept
    return count


def _role_of(sender: Any, source: SourceConfig) -> str:
    name = str(sender)
    return source.roles.get(name) or ROLES.get(name.lower()) or source.roles.get(EVERYONE) or name


def _dialogue(messages: list[RawRow], names: Names, source: SourceConfig, *, is_damaged: bool) -> RawRow:
    role, content = source.columns.get("role", "role"), source.columns.get("content", "content")
    turns: list[dict[str, Any]] = []
    for raw in messages:
        rest = {key: value for key, value in raw.value.items() if key not in names}
        sender, text = raw.value[names.sender], raw.value[names.text]
        if turns and _role_of(turns[-1][role], source) == _role_of(sender, source):
            turns[-1][content] += f"\n{text}"
        else:
            turns.append({role: sender, content: text, **rest})
    value = {source.columns.get("messages", "messages"): turns}
    row = RawRow(messages[0].file, min(raw.row for raw in messages), value, sum(raw.size for raw in messages))
    if not is_damaged:
        return row
    rule = _("a row beside this session cannot be read, so that a message of it may be missing")
    return replace(row, problem=rule, reason="damaged_session")
