"""Read a recipe's YAML and overrides as plain values, and remember the place of each.

YAML is read node by node to keep each key's line and detect duplicate keys. Numbers, `on` and `off` follow YAML 1.2:
`1e-4` is a number and `on` is text (PyYAML follows 1.1, where it is the other way round).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _

ValuePath = tuple[str | int, ...]  # path of a value in the recipe: ("sft", "adapter", "rank")


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

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
    """One reading of a recipe: the place of each value, the problems found, and notices about translated settings."""

    def __init__(self, file: str) -> None:
        self.file = file
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
        """Return the plain value of a node. Remembers places and reports duplicate keys."""
        self.places[path] = f"{source}:{node.start_mark.line + 1}" if source == self.file else source
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, source)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index), source) for index, item in enumerate(node.value)]
        constructor = Loader("")
        try:
            return constructor.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self.add_problem(path, _("{node!r} cannot be read: {error}").format(node=node.value, error=error))
            return None

    def _mapping(self, node: yaml.MappingNode, path: ValuePath, source: str) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            key_path = (*path, key)
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


def parse(text: str, reader: RecipeReader) -> dict[str, Any]:
    """Return the values of a recipe's text. Raises RecipeError if it is not YAML, or not a mapping."""
    file = reader.file
    try:
        node = yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(
            _("this is not valid YAML: {problem}").format(problem=error.problem),
            place=f"{file}:{line}",
            remedy=_("check the indentation and quotes of this line"),
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(_("this is not valid YAML: {error}").format(error=error), place=file) from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            _("a recipe must be a mapping of keys to values"),
            place=f"{file}:1",
            remedy=_("`tongwen init` writes one"),
        )
    data: dict[str, Any] = reader.value(node, (), file)
    return data


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


def did_you_mean(near: Sequence[str]) -> str:
    """Return a remedy that lists keys or values with a similar name; empty if there are none."""
    return _("did you mean ") + " / ".join(f"`{name}`" for name in near) if near else ""
