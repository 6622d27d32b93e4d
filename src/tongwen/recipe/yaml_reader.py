"""Read a recipe's YAML and overrides as plain values, and remember the place of each.

YAML is read node by node to keep each key's line and detect duplicate keys. Numbers, `on` and `off` follow YAML 1.2:
`1e-4` is a number and `on` is text (PyYAML follows 1.1, where it is the other way round). What a recipe from elsewhere
could exhaust is limited: depth, values that aliases repeat, and numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import yaml

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _

ValuePath = tuple[str | int, ...]  # path of a value in the recipe: ("sft", "adapter", "rank")


DEPTH = 32  # of nested values
REPEATED_VALUES = 10_000  # values that all aliases together may repeat
LARGEST = 2**63 - 1
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}


class LimitedLoader(yaml.SafeLoader):
    """SafeLoader with limits of depth, and of what aliases repeat: ten lines of aliases can stand for 10^10 values."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._repeated = 0
        self._sizes: dict[yaml.Node, int] = {}  # values in a finished node, repeated ones included

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        is_alias, place = self.check_event(yaml.AliasEvent), self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self._depth == DEPTH:
            raise LimitExceeded(_("values are nested more than {depth} deep").format(depth=DEPTH), place)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias:
            if node not in self._sizes:
                raise LimitExceeded(_("this alias stands inside of what it stands for"), place)
            self._repeated += self._sizes[node]
            if self._repeated > REPEATED_VALUES:
                raise LimitExceeded(_("aliases repeat more than {count:,} values").format(count=REPEATED_VALUES), place)
        elif isinstance(node, yaml.CollectionNode):
            parts = [part for one in node.value for part in (one if isinstance(one, tuple) else (one,))]
            self._sizes[node] = 1 + sum(self._sizes[part] for part in parts)
        elif node is not None:
            self._sizes[node] = 1
        return node


class LimitExceeded(yaml.MarkedYAMLError):
    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(None, None, problem, mark)


class Loader(LimitedLoader):
    """The scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's interface)


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:\d+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:\d+\.\d*|\.?\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", r"^(?:<<)$", "<"),
):
    Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


class RecipeReader:
    """One reading of a recipe: the place of each value, the problems found, and notices about translated settings.

    on_file: called with the name of each further file before it is read; raises RecipeError to refuse it.
    """

    def __init__(self, file: str, on_file: Callable[[str], object] = lambda name: None) -> None:
        self.file, self.on_file = file, on_file
        self.places: dict[ValuePath, str] = {}
        self.problems: list[RecipeError] = []
        self.notices: list[str] = []

    def place(self, path: ValuePath) -> str:
        """Return file and line of the value, or of the nearest value around it, and the dotted name."""
        around = path
        while around and around not in self.places:
            around = around[:-1]
        name = ".".join(str(part) for part in path)
        return " · ".join(part for part in (self.places.get(around, self.file), name) if part)

    def add_problem(self, path: ValuePath, rule: str, remedy: str = "") -> None:
        self.problems.append(RecipeError(rule, place=self.place(path), remedy=remedy))

    def add_notice(self, path: ValuePath, text: str) -> None:
        self.notices.append(f"{self.place(path)}: {text}")

    def value(self, node: yaml.Node, path: ValuePath, source: str) -> Any:
        """Return the plain value of a node. Remembers places; reports duplicate keys and what is no value."""
        self.places[path] = f"{source}:{node.start_mark.line + 1}" if source == self.file else source
        if node.tag not in TAGS:
            self.add_problem(path, _("the tag {tag!r} is not supported").format(tag=node.tag))
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, source)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index), source) for index, item in enumerate(node.value)]
        try:
            value = Loader("").construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, IndexError) as error:  # `!!bool hello` is a KeyError
            self.add_problem(path, _("{node!r} cannot be read: {error}").format(node=node.value[:80], error=error))
            return None
        if problem := _no_value(value):
            self.add_problem(path, f"{node.value[:80]!r}: {problem}")
            return None
        return value

    def _mapping(self, node: yaml.MappingNode, path: ValuePath, source: str) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            key_path = (*path, key)
            if not key or _no_value(key):
                self.places[key_path] = f"{source}:{key_node.start_mark.line + 1}"
                self.add_problem(key_path, _("a key must be a word"))
                continue
            if key in mapping:
                self.places[key_path] = f"{source}:{key_node.start_mark.line + 1}"
                self.add_problem(
                    key_path,
                    _("the key {key!r} occurs twice").format(key=key),
                    _("keep one"),
                )
                continue
            mapping[key] = self.value(value_node, key_path, source)
        return mapping


def _no_value(value: Any) -> str:
    """Return what keeps a value from being one of any setting; empty for most."""
    if isinstance(value, (int, float)) and not abs(value) <= LARGEST:  # true for NaN, too
        return _("no setting takes such a number")
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        return _("no setting takes such a character")
    return ""


def parse(text: str, reader: RecipeReader) -> dict[str, Any]:
    """Return the values of a recipe's text. Raises RecipeError if it is not YAML, or not a mapping."""
    file = reader.file
    try:
        node = yaml.compose(text, Loader=Loader)
    except LimitExceeded as error:
        assert error.problem and error.problem_mark
        place = f"{file}:{error.problem_mark.line + 1}"
        raise RecipeError(error.problem, place=place, remedy=_("write plain values")) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(
            _("this is not valid YAML: {problem}").format(problem=error.problem),
            place=f"{file}:{line}",
            remedy=_("check the indentation and quotes of this line"),
        ) from None
    except yaml.reader.ReaderError as error:
        raise RecipeError(
            _("this is not valid YAML: {problem}").format(problem=f"{chr(error.character)!r}: {error.reason}"),
            place=f"{file}:{text.count(chr(10), 0, error.position) + 1}",
        ) from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            _("a recipe must be a mapping of keys to values"),
            place=f"{file}:1",
            remedy=_("`tongwen init` writes one"),
        )
    data: dict[str, Any] = reader.value(node, (), file)
    return data


def read_foreign(text: str, *, is_json: bool) -> Any:
    """Return the values of another program's JSON, or of its YAML 1.1. Raises ValueError."""
    try:
        values = json.loads(text) if is_json else LimitedLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError, LookupError, TypeError, AttributeError) as error:  # of odd tags, too
        raise ValueError(str(error)) from None
    if _is_deeper(values, DEPTH):
        raise ValueError(_("values are nested more than {depth} deep").format(depth=DEPTH))
    return values


def _is_deeper(values: Any, depth: int) -> bool:
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return depth < 0 or any(_is_deeper(part, depth - 1) for part in parts)


def apply_override(data: dict[str, Any], override: str, reader: RecipeReader) -> None:
    """Set the value of `section.key=value` in the data; its place is the command line."""
    name, equals, text = override.partition("=")
    source = _("command line `{override}`").format(override=override)
    parts = name.strip().split(".")
    if not equals or not all(parts):
        reader.problems.append(RecipeError(_("write an override as section.key=value"), place=source))
        return
    section = data
    for part in parts[:-1]:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    try:
        node = yaml.compose(text, Loader=Loader) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
    except yaml.YAMLError:
        node = yaml.ScalarNode("tag:yaml.org,2002:str", text)
    path = tuple(parts)
    reader.places = {known: place for known, place in reader.places.items() if known[: len(path)] != path}
    node.start_mark = node.start_mark or yaml.Mark("", 0, 0, 0, None, 0)
    section[parts[-1]] = reader.value(node, path, source)
