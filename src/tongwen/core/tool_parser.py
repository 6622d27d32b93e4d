"""Read tool calls back from a model's text, in the form in which its chat template writes them.

No list of models: a call of sentinels is rendered, and how it came out tells the form. Five forms are known, each with the
template's own marks around it:

    JsonCall     {"name": NAME, "arguments": {…}}
    NamedCall    NAME … {…}                             the arguments as JSON behind the name
    KeyedCall    NAME … KEY … VALUE … KEY … VALUE …      each argument between marks; a text stands there as it is
    KeywordCall  NAME(KEY=VALUE, …)                      Python's notation
    ObjectCall   NAME{KEY:VALUE, …}                      keys without quotes, texts between the template's own quotes

A parser that does not read back what the template itself writes is not used.
"""

from __future__ import annotations

import ast
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tongwen.core.continuation import shared_length
from tongwen.core.message_layout import Tools, body_of, read_arguments

NAME = r"(?P<name>[^\s<>\[\]{}()\"'|｜=,]+?)"
DECODER = json.JSONDecoder(strict=False)  # models write line breaks inside strings
PYTHON_PIECE = re.compile(
    r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[()]", re.DOTALL
)  # a text, or what a call is nested by
UNFINISHED_TAG = re.compile(r"[<\[][^<>\[\]]*\Z")
PYTHON_TAG = "<|python_tag|>"  # Llama 3 may write it ahead of a call that has no mark
# What the probes are made of. The ids have the form that Mistral's templates ask for.
NAMES, KEYS, TEXT, NUMBER = ("zf1zf", "zf2zf"), ("zk1zk", "zk2zk"), "zv1zv", 97_000_001
IDS = "abcd12345", "abcd12346"
PROBE_TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {
                    KEYS[0]: {"type": "string", "description": "d"},
                    KEYS[1]: {"type": "integer", "description": "d"},
                },
            },
        },
    }
    for name in NAMES
)


def _probe(number: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": IDS[number], "type": "function", "function": {"name": NAMES[number], "arguments": arguments}}


FULL = {KEYS[0]: TEXT, KEYS[1]: NUMBER}
ONE, TWO, EMPTY = [_probe(0, FULL)], [_probe(0, FULL), _probe(1, FULL)], [_probe(0, {})]


class ToolCall(NamedTuple):
    """A call that a model made. arguments: an object, as JSON text."""

    name: str
    arguments: str

    def to_dict(self, id_: str) -> dict[str, Any]:
        return {"id": id_, "type": "function", "function": self._asdict()}


Schemas = Mapping[str, Mapping[str, Any]]
"""name of a tool: {name of a parameter: its JSON schema}"""


def schemas_of(tools: Tools) -> Schemas:
    out = {}
    for tool in tools:
        function = body_of(tool)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        out[str(function.get("name"))] = properties if isinstance(properties, dict) else {}
    return out


def _call(name: Any, arguments: Any) -> ToolCall | None:
    arguments = read_arguments({} if arguments is None else arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


@dataclass(frozen=True)
class CallForm(ABC):
    """How one call is written. head: how a call begins, unlike other text."""

    head: str

    @abstractmethod
    def body(self, text: str, begun: re.Match[str], schemas: Schemas) -> tuple[ToolCall, int] | None:
        """Return the call and where it ends; None if it is incomplete or broken."""


class JsonCall(CallForm):
    def body(self, text: str, begun: re.Match[str], schemas: Schemas) -> tuple[ToolCall, int] | None:
        value, end = DECODER.raw_decode(text, begun.start())
        entry = body_of(value)
        names = [key for key in ("name", "tool_name") if key in entry]
        if names:
            call = _call(entry[names[0]], entry.get("arguments", entry.get("parameters")))
        else:  # {NAME: {…}}
            call = _call(*next(iter(entry.items()))) if len(entry) == 1 else None
        return (call, end) if call else None


class NamedCall(CallForm):
    def body(self, text: str, begun: re.Match[str], schemas: Schemas) -> tuple[ToolCall, int] | None:
        value, end = DECODER.raw_decode(text, begun.end())
        call = _call(begun["name"], value)
        return (call, end) if call else None


@dataclass(frozen=True)
class KeyedCall(CallForm):
    """texts, others: patterns between a key and its value, of a text and of any other value; the same in most templates.
    further, end: patterns after a value, where another key follows and where the call ends. none: what follows the name of
    a call without arguments, in place of the first key."""

    texts: str
    others: str
    further: str
    end: str
    none: str

    def body(self, text: str, begun: re.Match[str], schemas: Schemas) -> tuple[ToolCall, int] | None:
        arguments: dict[str, Any] = {}
        at = begun.end()
        if begun["none"] is not None:
            return ToolCall(begun["name"], "{}"), at
        key_of = re.compile(f"(?P<key>[^<>\"'\\n]+?)(?:(?P<text>{self.texts})|{self.others})")
        after = re.compile(f"(?P<further>{self.further})|{self.end}")
        known = schemas.get(begun["name"], {})
        while True:
            key = key_of.match(text, at)
            ended = after.search(text, key.end()) if key else None
            if key is None or ended is None:
                return None
            raw = text[key.end() : ended.start()]
            if raw.startswith("<![CDATA[") and raw.endswith("]]>"):
                raw = raw[len("<![CDATA[") : -len("]]>")]
            is_text = self.texts != self.others and key["text"] is not None
            arguments[key["key"]] = raw if is_text else _typed(raw, known.get(key["key"]))
            at = ended.end()
            if ended["further"] is None:
                return ToolCall(begun["name"], json.dumps(arguments, ensure_ascii=False)), at


class KeywordCall(CallForm):
    def body(self, text: str, begun: re.Match[str], schemas: Schemas) -> tuple[ToolCall, int] | None:
        depth, end = 1, begun.end()
        for piece in PYTHON_PIECE.finditer(text, begun.end()):
            depth += {"(": 1, ")": -1}.get(piece[0], 0)
            end = piece.end()
            if depth == 0:
                break
        else:
            return None
        words = text[begun.end() : end].replace("\n", "\\n")  # models write line breaks inside strings
        try:
            call = ast.parse(f"f({words}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                return None
            arguments = {str(one.arg): ast.literal_eval(_JsonWords().visit(one.value)) for one in call.keywords}
            return ToolCall(begun["name"], json.dumps(arguments, ensure_ascii=False)), end
        except (SyntaxError, TypeError, MemoryError):
            return None


class _JsonWords(ast.NodeTransformer):
    """JSON's words in Python's notation."""

    WORDS: Mapping[str, Any] = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.WORDS[node.id]) if node.id in self.WORDS else node


@dataclass(frozen=True)
class ObjectCall(CallForm):
    """quote: what stands around a text."""

    quote: str

    def body(self, text: str, begun: re.Match[str], schemas: Schemas) -> tuple[ToolCall, int] | None:
        value, end = self._value(text, begun.end())
        call = _call(begun["name"], value)
        return (call, end) if call else None

    def _value(self, text: str, at: int) -> tuple[Any, int]:
        """Return the value that begins here and where it ends. Raises ValueError."""
        if text.startswith(self.quote, at):
            end = text.index(self.quote, at + len(self.quote))
            return text[at + len(self.quote) : end], end + len(self.quote)
        if text[at : at + 1] in ("{", "["):
            return self._members(text, at)
        word = re.compile(r"[^,\]}\s]+").match(text, at)
        if not word:
            raise ValueError(at)
        return _typed(word[0], None), word.end()

    def _members(self, text: str, at: int) -> tuple[Any, int]:
        closing = {"{": "}", "[": "]"}[text[at]]
        found: dict[str, Any] = {}
        at += 1
        while not text.startswith(closing, at):
            key = str(len(found))
            if closing == "}":
                colon = text.index(":", at)
                key = text[at:colon].strip().removeprefix(self.quote).removesuffix(self.quote)
                at = colon + 1
            found[key], at = self._value(text, at + len(text[at:]) - len(text[at:].lstrip()))
            separator = re.compile(rf"\s*(?:,\s*|(?={re.escape(closing)}))").match(text, at)
            if not separator:
                raise ValueError(at)
            at = separator.end()
        return (found if closing == "}" else list(found.values())), at + 1


def _typed(raw: str, schema: Any) -> Any:
    """Return a value that a template writes without quotes, by the type that its schema gives; without one, as JSON if it is
    JSON."""
    types = _types(schema)
    if types == {"string"}:
        return raw
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(raw.strip())
            json.dumps(value, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        return raw if isinstance(value, str) or ("string" in types and _type_of(value) not in types) else value
    return raw


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {one for one in named or () if isinstance(one, str)}
    for word in ("anyOf", "oneOf"):
        for one in schema.get(word) or ():
            types |= _types(one)
    if not types and isinstance(schema.get("enum"), list):
        types = {_type_of(one) for one in schema["enum"]}
    return types | ({"integer"} if "number" in types else set())


def _type_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    return kinds.get(type(value), "null")


@dataclass(frozen=True)
class ToolParser:
    """The calls of one chat template.

    begin, middle: what the template writes up to the name of a call, and between name and arguments
    opening, separator, closing: patterns before the first call, between two, and after the last
    mark:     the first word of the opening; a mark without letters counts at the beginning of an answer only
    parallel: whether the template writes several calls in one answer
    stop:     the token that ends an answer with calls; "" where the answer has the usual one
    written:  all that the template writes around sentinels, for the tokens that must stay visible
    """

    form: CallForm
    begin: str
    middle: str
    opening: str
    separator: str
    closing: str
    mark: str
    parallel: bool
    stop: str
    written: str

    @property
    def anchored(self) -> bool:
        return not any(map(str.isalpha, self.mark))

    def find(self, text: str) -> int:
        """Return where calls may begin, -1 if nowhere."""
        if not self.anchored:
            return text.find(self.mark)
        stripped = text.lstrip()
        begins = (PYTHON_TAG, self.mark) if self.mark else (PYTHON_TAG, "{", "[")
        return len(text) - len(stripped) if stripped.startswith(begins) else -1

    def holds_back(self, text: str) -> bool:
        """Whether the end of a text could become the beginning of calls."""
        if self.anchored:
            return not text.strip() or PYTHON_TAG.startswith(text.strip())
        return any(text.endswith(self.mark[:size]) for size in range(1, len(self.mark))) or text != text.rstrip()

    def forced(self, name: str | None) -> str:
        """Return the beginning of an answer that calls this tool, or any."""
        return self.begin if name is None else self.begin + name + self.middle

    def read(self, text: str, schemas: Schemas) -> tuple[list[ToolCall], str]:
        """Return the complete calls of an answer without its thinking, and the rest: its content. A call that is incomplete
        or broken, and all that follows it, is content."""
        calls: list[ToolCall] = []
        content, at = "", 0
        while (found := self.find(text[at:])) >= 0:
            begin = at + found
            opened = re.compile(rf"(?:{re.escape(PYTHON_TAG)})?\s*{self.opening}").match(text, begin)
            if opened is None or self._head(text, opened.end()) is None:  # words about calls
                if self.anchored:
                    break
                content, at = content + text[at : begin + len(self.mark)], begin + len(self.mark)
                continue
            made, end = self._series(text, opened.end(), schemas)
            if not made:
                break
            calls += made
            content, at = content + text[at:begin], end
            if self.anchored:
                break
        rest = content + text[at:]
        return calls, rest.strip() if calls else rest

    def _head(self, text: str, at: int) -> re.Match[str] | None:
        return re.compile(self.form.head).match(text, at)

    def _series(self, text: str, at: int, schemas: Schemas) -> tuple[list[ToolCall], int]:
        """Return calls that follow each other, and where the last ends."""
        calls, end = [], at
        between = re.compile(rf"\s*(?:{self.separator})(?={self.form.head})")
        while begun := self._head(text, at):
            try:
                read = self.form.body(text, begun, schemas)
            except (ValueError, RecursionError):  # JSON that is incomplete, too
                read = None
            if read is None:
                break
            calls.append(read[0])
            end = read[1]
            more = between.match(text, end)
            if more is None:
                break
            at = more.end()
        closing = re.compile(rf"\s*(?:{self.closing})").match(text, end) if calls else None
        return calls, closing.end() if closing else end


def _flexible(literal: str) -> str:
    """Return a pattern of what a template writes: blanks may differ, and so may the numbers, ids and names in it."""
    for sentinel in (*IDS, *NAMES, *KEYS):
        literal = literal.replace(sentinel, "\ufdd4")
    words = [re.sub(r"\b\d+\b", r"\\d+", re.escape(word)).replace("\ufdd4", r"[^\s<>]*?") for word in literal.split()]
    return r"\s*" + r"\s*".join(words) + r"\s*" if words else r"\s*"


def _before_value(literal: str) -> str:
    """As `_flexible`, but of the blanks at the end no more are taken than the template writes: others belong to the value."""
    blanks = literal[len(literal.rstrip()) :]
    return _flexible(literal.strip()).removesuffix(r"\s*") + (f"(?:{re.escape(blanks)})?" if blanks else "")


def _after_value(literal: str) -> str:
    blanks = literal[: len(literal) - len(literal.lstrip())]
    return (f"(?:{re.escape(blanks)})?" if blanks else "") + _flexible(literal.strip()).removeprefix(r"\s*")


def derive(one: str, two: str | None, empty: str | None, plain: str, stop: str) -> ToolParser | None:
    """Return the parser of the template that wrote these answers: one call, two calls, a call without arguments (None where
    it writes none), and the beginning of an answer of text. None if no form reads them back."""
    name_at = one.rfind(NAMES[0], 0, one.find(KEYS[0])) if KEYS[0] in one else -1
    if name_at < 0:  # the name behind its arguments
        name_at = one.find(NAMES[0])
    second_at = two.find(NAMES[1]) if two else -1
    if name_at < 0 or (two and second_at < 0):
        return None
    for find in (_json_form, _named_form, _keyword_form, _object_form, _keyed_form):
        if (found := find(one, name_at, two, empty)) is None:
            continue
        form, begins, ends = found
        head = one[:begins]
        opening = head.lstrip().removeprefix(plain.strip()).lstrip() if plain.strip() else head
        separator = two[ends : _start_of_second(two, ends, form, begins, name_at)] if two else ""
        parser = ToolParser(
            form,
            one[:name_at],
            _middle(form, one, name_at + len(NAMES[0])),
            _flexible(opening),
            _flexible(separator) if separator.strip() else r"\s*[;,]?\s*",
            "|".join(map(_flexible, filter(str.strip, (one[ends:], (two and _shared(one[ends:], two[ends:])) or "")))),
            re.split(rf"\s|{'|'.join(IDS)}", opening.strip())[0],
            two is not None,
            stop,
            one + (two or ""),
        )
        if parser.mark in NAMES or (parser.anchored and not isinstance(form, (JsonCall, KeywordCall))):
            continue
        if _reads_back(parser, one, two, empty):
            return parser
    return None


def _start_of_second(two: str, ends: int, form: CallForm, begins: int, name_at: int) -> int:
    """Return where the second call begins: as far ahead of its name as the first."""
    return max(two.find(NAMES[1], ends) - (name_at - begins), ends)


def _shared(one: str, other: str) -> str:
    """Return the whole marks with which both texts begin."""
    return UNFINISHED_TAG.sub("", one[: shared_length(one, other)])


def _middle(form: CallForm, one: str, after: int) -> str:
    """Return what a call has between its name and its arguments, whatever they are."""
    if isinstance(form, KeyedCall):
        return _shared(one[after:], form.none)
    if isinstance(form, KeywordCall):
        return "("
    return one[after : one.find("{", after)].rstrip()


def _reads_back(parser: ToolParser, one: str, two: str | None, empty: str | None) -> bool:
    schemas = schemas_of(PROBE_TOOLS)
    for text, probes in ((one, ONE), (two, TWO), (empty, EMPTY)):
        if text is None:
            continue
        calls, _rest = parser.read(text, schemas)
        wanted = [probe["function"] for probe in probes]
        if [(call.name, json.loads(call.arguments)) for call in calls] != [(w["name"], w["arguments"]) for w in wanted]:
            return False
    return True


Found = tuple[CallForm, int, int]
"""the form, and where the first call begins and ends"""


def _json_at(text: str, at: int) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at


def _json_form(one: str, name_at: int, two: str | None, empty: str | None) -> Found | None:
    at = one.rfind("{", 0, name_at)
    while at >= 0:
        value, end = _json_at(one, at)
        if isinstance(value, dict) and end > name_at and KEYS[0] in one[at:end]:
            outer = one.rfind("{", 0, at)
            wider, wider_end = _json_at(one, outer) if outer >= 0 else (None, 0)
            if not (isinstance(wider, dict) and wider_end > end):
                return JsonCall(r"(?=\{)"), at, end
        at = one.rfind("{", 0, at)
    return None


def _named_form(one: str, name_at: int, two: str | None, empty: str | None) -> Found | None:
    at = one.find("{", name_at)
    value, end = _json_at(one, at)
    if value != FULL:
        return None
    return NamedCall(NAME + _flexible(one[name_at + len(NAMES[0]) : at]) + r"(?=\{)"), name_at, end


def _keyword_form(one: str, name_at: int, two: str | None, empty: str | None) -> Found | None:
    after = name_at + len(NAMES[0])
    if f"{KEYS[0]}=" not in one or not one.startswith("(", after):
        return None
    return KeywordCall(NAME + r"\("), name_at, one.find(")", after) + 1


def _object_form(one: str, name_at: int, two: str | None, empty: str | None) -> Found | None:
    after = name_at + len(NAMES[0])
    found = re.compile(rf"\{{{KEYS[0]}:(?P<quote>\S+?){TEXT}(?P=quote),{KEYS[1]}:{NUMBER}\}}").match(one, after)
    return (ObjectCall(NAME + r"(?=\{)", found["quote"]), name_at, found.end()) if found else None


def _keyed_form(one: str, name_at: int, two: str | None, empty: str | None) -> Found | None:
    after = name_at + len(NAMES[0])
    pieces = re.compile(
        rf"(?s:(?P<first>.*?){KEYS[0]}(?P<text>.+?){TEXT}(?P<further>.+?){KEYS[1]}(?P<other>.+?){NUMBER}(?P<end>.*))"
    ).match(one, after)
    if not pieces:
        return None
    end = pieces["end"]
    if two:  # a second call follows: what both have is the end of a call
        following = two[pieces.start("end") :]
        end = end if following.startswith(end) else _shared(end, following)
    none = empty[empty.find(NAMES[0]) + len(NAMES[0]) :] if empty else ""
    if empty:
        tail = pieces["end"][len(end) :]
        none = none[: len(none) - len(tail)] if tail and none.endswith(tail) else none
    head = rf"{NAME}(?:{_flexible(pieces['first'])}|(?P<none>{_flexible(none)}))" if none.strip() else None
    form = KeyedCall(
        head or rf"{NAME}(?:{_flexible(pieces['first'])}|(?P<none>(?!)))",
        _before_value(pieces["text"]),
        _before_value(pieces["other"]),
        _after_value(pieces["further"]),
        _after_value(end),
        none,
    )
    return form, name_at, pieces.start("end") + len(end)
