"""A recipe file and overrides become one frozen Recipe, or one error that lists every problem with its line.

YAML is read node by node, so that each key keeps its place and a doubled key is seen. Numbers, `on` and `off` follow
YAML 1.2: `1e-4` is a number and `on` is a word (PyYAML follows 1.1, which has it the other way round).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from tongwen.core.errors import RecipeError, raise_all
from tongwen.core.i18n import say
from tongwen.recipe import engine_config
from tongwen.recipe.aliases import OLD, OLD_REASONS, OWNED, training_arguments
from tongwen.recipe.schema import Pretrain, Recipe, Sft, Training, read_list

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")  # of `trainer`, for the optimizers that are AdamW
Path_ = tuple[str | int, ...]  # where a value stands in the recipe: ("sft", "adapter", "rank")


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
    """One reading: the values, where each stands, what is wrong, and what was translated."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[Path_, str] = {}
        self.problems: list[RecipeError] = []
        self.notices: list[str] = []

    def place(self, path: Path_) -> str:
        """File and line of the value, or of the nearest thing around it; then the dotted name."""
        around = path
        while around and around not in self.places:
            around = around[:-1]
        name = ".".join(str(part) for part in path)
        return " · ".join(part for part in (self.places.get(around, self.file), name) if part)

    def wrong(self, path: Path_, rule: str, remedy: str = "") -> None:
        self.problems.append(RecipeError(rule, place=self.place(path), remedy=remedy))

    def value(self, node: yaml.Node, path: Path_, source: str) -> Any:
        """The plain value of a node; remembers places, reports doubled keys."""
        self.places[path] = f"{source}:{node.start_mark.line + 1}" if source == self.file else source
        if isinstance(node, yaml.MappingNode):
            out: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value)
                here = (*path, key)
                if key in out:
                    self.places[here] = f"{source}:{key_node.start_mark.line + 1}"
                    self.wrong(
                        here,
                        say(f"the key {key!r} stands here twice", f"键 {key!r} 出现了两次"),
                        say("keep one", "保留一个"),
                    )
                    continue
                out[key] = self.value(value_node, here, source)
            return out
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index), source) for index, item in enumerate(node.value)]
        constructor = Loader("")
        try:
            return constructor.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self.wrong(path, say(f"{node.value!r} cannot be read: {error}", f"无法读取 {node.value!r}：{error}"))
            return None


def load_recipe(file: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Read a recipe file with `section.key=value` overrides: see `read`."""
    return read(_text_of(Path(file)), str(file), overrides)


def read(text: str, name: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Read a recipe's text. name: of its file, for messages.

    Returns the frozen recipe and notices (old names translated, batch sizes converted) to be shown to the user.
    Raises RecipeError, or SeveralErrors with every problem, each with file and line.
    """
    reading = RecipeReader(name)
    data = _compose(text, reading)
    for override in overrides:
        _apply_override(data, override, reading)
    for name, words in (("pretrain", Pretrain), ("sft", Sft)):
        if isinstance(data.get(name), dict):
            data[name] = _translate(data[name], (name,), words, data.get("devices", 1), reading)
    _add_made(data)
    recipe = _validate(data, reading)
    raise_all(reading.problems)
    assert recipe is not None
    for stage in recipe.training:
        if said := sorted(stage.idle_adapter & stage.adapter.model_fields_set):
            word, idle = _who_leaves_idle(stage), ", ".join(said)
            reading.notices.append(say(f"`{word}` does nothing with {idle}", f"`{word}` 不使用 {idle}"))
        unread = {"optim_args"} if "adamw" in stage.optimizer else {"optim_args", *ADAM}
        if said := sorted(unread & {*stage.trainer}):
            word, idle = f"optimizer: {stage.optimizer}", ", ".join(f"trainer.{name}" for name in said)
            reading.notices.append(say(f"`{word}` does nothing with {idle}", f"`{word}` 不使用 {idle}"))
    if not recipe.out:
        recipe = recipe.model_copy(update={"out": f"runs/{recipe.name}"})
    return recipe, reading.notices


def _who_leaves_idle(stage: Training) -> str:
    """The word that makes words of `adapter` say nothing."""
    if stage.adapter.continue_from:
        return "continue_from"
    trains = stage.idle_adapter == stage.adapter.idle
    return f"method: {stage.adapter.method}" if trains else f"train: {stage.stretches[-1].train}"


def _add_made(data: dict[str, Any]) -> None:
    """What `synthesize` writes is one more input of `prepare`: it stands in the resolved recipe like any other."""
    if data.get("synthesize") is None or not isinstance(prepare := data.get("prepare"), dict):
        return
    folder = data.get("out") or f"runs/{data.get('name')}"
    made = {"path": f"{folder}/synthesize/dialogues.jsonl", "format": "messages"}
    given = read_list(prepare.get("dialogues", []))
    if isinstance(given, list) and not any(isinstance(one, dict) and one.get("path") == made["path"] for one in given):
        data["prepare"] = {**prepare, "dialogues": [*given, made]}


def from_words(data: Mapping[str, Any], command: str) -> Recipe:
    """The recipe that a command line's own words make. Raises as `load_recipe` does; what is wrong stands at the command."""
    reading = RecipeReader(command)
    recipe = _validate(data, reading)
    raise_all(reading.problems)
    assert recipe is not None
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default filled in that means something; sections that do not run are left out. It
    is read again when a run goes on."""
    sections = {"pretrain": recipe.pretrain, "sft": recipe.sft}
    idle: Any = {
        name: {**dict.fromkeys(one.idle, True), "adapter": one.idle_adapter} for name, one in sections.items() if one
    }
    data = {key: value for key, value in recipe.model_dump(mode="json", exclude=idle).items() if value is not None}
    return str(yaml.safe_dump(data, allow_unicode=True, sort_keys=False, width=100))


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(
            say("there is no such recipe file", "没有这个配方文件"),
            place=str(file),
            remedy=say("`tongwen init` lists recipes to start from", "`tongwen init` 列出可用的起点"),
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(say(f"cannot be read: {error}", f"无法读取：{error}"), place=str(file)) from None


def _compose(text: str, reading: RecipeReader) -> dict[str, Any]:
    file = reading.file
    try:
        node = yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(
            say(f"this is not YAML: {error.problem}", f"这不是合法的 YAML：{error.problem}"),
            place=f"{file}:{line}",
            remedy=say("check the indentation and the quotes of this line", "请检查这一行的缩进与引号"),
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(say(f"this is not YAML: {error}", f"这不是合法的 YAML：{error}"), place=file) from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            say("a recipe is a mapping of keys to values, this is not", "配方应是键值映射"),
            place=f"{file}:1",
            remedy=say("`tongwen init` writes one to start from", "`tongwen init` 可生成一份"),
        )
    data: dict[str, Any] = reading.value(node, (), file)
    return data


def _apply_override(data: dict[str, Any], override: str, reading: RecipeReader) -> None:
    name, equals, text = override.partition("=")
    source = say(f"command line `{override}`", f"命令行 `{override}`")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        reading.problems.append(
            RecipeError(say("an override is written section.key=value", "覆盖项应写成 section.key=value"), place=source)
        )
        return
    here = data
    for part in parts[:-1]:
        if not isinstance(here.get(part), dict):
            here[part] = {}
        here = here[part]
    try:
        node = yaml.compose(text, Loader=Loader) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
    except yaml.YAMLError:
        node = yaml.ScalarNode("tag:yaml.org,2002:str", text)
    path = tuple(parts)
    reading.places = {known: place for known, place in reading.places.items() if known[: len(path)] != path}
    node.start_mark = node.start_mark or yaml.Mark("", 0, 0, 0, None, 0)
    here[parts[-1]] = reading.value(node, path, source)


def _translate(
    section: dict[str, Any], path: Path_, words: type[Training], devices: Any, reading: RecipeReader
) -> dict[str, Any]:
    """Old and foreign names of a training section become the recipe's words; what it owns is refused by name."""
    section = dict(section)
    trainer = section.get("trainer")
    if isinstance(trainer, dict):
        trainer = dict(trainer)
        section["trainer"] = trainer
        known = training_arguments()
        for key in list(trainer):
            here = (*path, "trainer", key)
            if key in OLD and key not in known:
                _translate_old(section, trainer, key, here, reading)
            elif key in OWNED:
                reading.wrong(
                    here,
                    say(f"{key!r} is said by the recipe itself", f"{key!r} 由配方自己的词表达"),
                    say(f"instead of trainer.{key}: {OWNED[key]}", f"请改用：{OWNED[key]}"),
                )
            elif known and key not in known:
                near = difflib.get_close_matches(key, known, 3)
                reading.wrong(
                    here,
                    say(
                        f"transformers' TrainingArguments has no field {key!r}",
                        f"transformers 的 TrainingArguments 没有字段 {key!r}",
                    ),
                    _did_you_mean(near),
                )
            elif known and not _is_a(value := trainer[key], known[key]):
                reading.wrong(
                    here,
                    say(f"{value!r} is no {known[key]}", f"{value!r} 不是 {known[key]}"),
                    say("correct the value, or leave the word out", "请改正取值，或删去该项"),
                )
    for key in list(section):
        if key in OLD and key not in words.model_fields:
            _translate_old(section, section, key, (*path, key), reading)
    _convert_batch(section, path, devices, reading)
    if str(section.get("engine", "")).endswith((".json", ".yaml", ".yml")):
        _hear_engine(section, path, devices, reading)
    return section


def _is_a(value: Any, annotation: str) -> bool:
    """Whether a value of YAML fits a field: dataclasses take what they are given, and fail when it is used."""
    names = {*re.findall(r"\w+", annotation)}
    kind = "None" if value is None else type(value).__name__
    return kind in names or (kind == "int" and "float" in names)


def _hear_engine(section: dict[str, Any], path: Path_, devices: Any, reading: RecipeReader) -> None:
    """What a user's engine file says of batch, optimizer, schedule and precision becomes the recipe's words, aloud."""
    here = (*path, "engine")
    try:
        told = engine_config.read(section["engine"], devices if isinstance(devices, int) else 1)
    except RecipeError as error:
        reading.problems.append(error)
        return
    file, words = section["engine"], dict(told.words)
    section["engine"] = words.pop("engine", file)
    trainer = section["trainer"] = section.get("trainer") or {}
    for holder, above, said in ((section, path, words), (trainer, (*path, "trainer"), told.trainer)):
        for key, value in said.items() if isinstance(holder, dict) else ():
            rival = "batch_tokens" if key == "batch_size" and section.get("batch_tokens") else key
            if holder.get(rival, value) not in (value, "auto"):
                theirs = repr(value) if rival == key else f"{key}: {value!r}"
                reading.wrong(
                    (*above, rival),
                    say(
                        f"the recipe says {holder[rival]!r}, {file} says {theirs}",
                        f"配方为 {holder[rival]!r}，而 {file} 为 {theirs}",
                    ),
                    say('write "auto" in that file, or the same value', '请在该文件中写 "auto"，或改为相同的值')
                    if file.endswith(".json")
                    else say("leave it out of that file, or write the same value", "请在该文件中删去，或改为相同的值"),
                )
                continue
            holder[key] = value
            reading.places.setdefault((*above, key), file)
            reading.notices.append(f"{file} → `{key}: {value}`")
    if told.dropped:
        reading.notices.append(
            f"{reading.place(here)}: "
            + say("not used, the recipe or tongwen decides: ", "未采用，由配方或 tongwen 决定：")
            + ", ".join(told.dropped)
        )
    if section["engine"] != file:
        reading.notices.append(f"{file} → `engine: {section['engine']}`")
        if section["engine"].endswith(".json"):
            _hear_engine(section, path, devices, reading)


def _translate_old(
    section: dict[str, Any], holder: dict[str, Any], key: str, here: Path_, reading: RecipeReader
) -> None:
    value, new = holder.pop(key), OLD[key]
    if not new:
        en, zh = OLD_REASONS.get(key, ("it has no effect any more", "它已不再有作用"))
        reading.notices.append(f"{reading.place(here)}: " + say(f"{key!r} is dropped: {en}", f"{key!r} 已忽略：{zh}"))
    elif new in section:
        reading.wrong(
            here,
            say(f"{key!r} and {new!r} say the same", f"{key!r} 与 {new!r} 含义相同"),
            say(f"keep {new!r}", f"保留 {new!r}"),
        )
    else:
        section[new] = value
        reading.places[(here[0], new)] = reading.places.get(here, reading.file)
        reading.notices.append(
            f"{reading.place(here)}: " + say(f"{key!r} is read as `{new}: {value}`", f"{key!r} 读作 `{new}: {value}`")
        )


def _convert_batch(section: dict[str, Any], path: Path_, devices: Any, reading: RecipeReader) -> None:
    per_device, accumulate = (
        section.pop("per_device_train_batch_size", None),
        section.pop("gradient_accumulation_steps", None),
    )
    if per_device is None and accumulate is None:
        return
    here = (*path, "per_device_train_batch_size" if per_device is not None else "gradient_accumulation_steps")
    if "batch_size" in section:
        reading.wrong(
            here,
            say("both spellings of the batch stand here", "批大小的两种写法同时出现"),
            say(
                "keep `batch_size`: samples per optimizer step over all devices",
                "保留 `batch_size`：每个优化步的总样本数",
            ),
        )
        return
    numbers = (per_device if per_device is not None else 1, accumulate if accumulate is not None else 1, devices)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 1 for number in numbers):
        reading.wrong(here, say(f"these must be whole numbers from 1: {numbers}", f"应为不小于 1 的整数：{numbers}"))
        return
    section["batch_size"] = numbers[0] * numbers[1] * numbers[2]
    batch: Path_ = (*path, "batch_size")
    reading.places[batch] = reading.places.get(here, reading.file)
    reading.notices.append(
        f"{reading.place(here)}: {numbers[0]} x {numbers[1]} x {numbers[2]} → `batch_size: {section['batch_size']}`"
        + say(" (per device x accumulation x devices)", "（每设备 x 累积 x 设备数）")
    )


def _validate(data: Mapping[str, Any], reading: RecipeReader) -> Recipe | None:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            _explain(problem, data, reading)
        return None


def _explain(problem: Any, data: Any, reading: RecipeReader) -> None:
    """One pydantic error -> one problem in our words."""
    path = _plain_path(problem["loc"], data)
    kind, value = problem["type"], problem.get("input")
    key = str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        known = list(_section_at(path[:-1]).model_fields)
        near = difflib.get_close_matches(key, known, 1 if len(known) > 9 else 3)
        remedy = _did_you_mean(near) or say("known here: ", "可用：") + ", ".join(known)
        reading.wrong(path, say(f"no such key: {key!r}", f"没有这个键：{key!r}"), remedy)
    elif kind == "missing":
        reading.wrong(path, say(f"the key {key!r} is required", f"缺少必需的键 {key!r}"), _help_of(path))
    elif kind == "tongwen":
        reading.wrong(path, problem["msg"])
    elif kind == "literal_error":
        choices = problem["ctx"]["expected"].replace("'", "")
        near = difflib.get_close_matches(str(value), re.split(r", | or ", choices), 1)
        rule = say(f"{value!r} is not one of: {choices}", f"{value!r} 不在可选值中：{choices}")
        reading.wrong(path, rule, _did_you_mean(near))
    else:
        limit = problem["msg"].removeprefix("Input ").replace("should be", say("must be", "应当 (must be)"))
        place = reading.place(path)
        if not any(known.place == place for known in reading.problems):  # a union reports each of its branches
            reading.wrong(path, say(f"{value!r} {limit}", f"{value!r} 不合规则：{limit}"), _help_of(path))


def _plain_path(location: Sequence[str | int], data: Any) -> Path_:
    """pydantic's location without the tags of union branches: only what can be walked in the data."""
    path: list[str | int] = []
    here: Any = data
    for index, part in enumerate(location):
        if (isinstance(here, dict) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        ):
            here = cast("Any", here)[part]
            path.append(part)
        elif isinstance(here, dict) and index == len(location) - 1:
            path.append(part)
    return tuple(path)


def _section_at(path: Path_) -> type[BaseModel]:
    """The schema class that holds the keys at a path."""
    section: type[BaseModel] = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        found = _sections_in(field.annotation) if field else []
        if not found:
            return section
        section = found[0]
    return section


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _sections_in(inner)]


def _help_of(path: Path_) -> str:
    names = [part for part in path if isinstance(part, str)]
    field = _section_at(path[:-1]).model_fields.get(names[-1]) if names else None
    if field is None:
        return ""
    extra = field.json_schema_extra
    zh = str(extra.get("zh", "")) if isinstance(extra, dict) else ""
    return f"{names[-1]}: " + say(field.description or "", zh)


def _did_you_mean(near: Sequence[str]) -> str:
    return say("did you mean ", "是否想写 ") + " / ".join(f"`{name}`" for name in near) if near else ""
