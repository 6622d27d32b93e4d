"""Each setting that holds any string declares what its strings name."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tongwen.recipe.fields import Section
from tongwen.recipe.load import load_recipe
from tongwen.recipe.references import references
from tongwen.recipe.schema import Recipe

# Settings of any string that names no file, model or machine. A new one is looked at before it gets a line here.
TEXTS = {
    "Recipe.name",  # checked: no separator
    "Recipe.out",  # checked as an output
    *(f"SourceConfig.{name}" for name in ("columns", "ignore", "roles", "separator", "encoding", "entry", "language")),
    "Synthesize.model",
    "Synthesize.topics",
    "Prepare.fill",
    "Vocab.words",
    "Vocab.special_tokens",
    *(f"AdapterConfig.{name}" for name in ("targets", "exclude", "target_parameters", "also_train")),
    "TaskConfig.name",
    "Export.quantize",
}


def holds_any_string(annotation: object) -> bool:
    if annotation in (str, typing.Any):
        return True
    if typing.get_origin(annotation) is typing.Literal:
        return False
    return any(holds_any_string(one) for one in typing.get_args(annotation) if not isinstance(one, FieldInfo))


def sections(section: type[BaseModel] = Recipe) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        for one in inner(field.annotation):
            yield from sections(one)


def inner(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for one in typing.get_args(annotation):
        yield from inner(one)


def test_each_setting_of_any_string_declares_what_it_names() -> None:
    found = {
        f"{section.__name__}.{name}": dict(field.json_schema_extra or {})["names"]  # type: ignore[arg-type]
        for section in sections()
        for name, field in section.model_fields.items()
        if holds_any_string(field.annotation)
    }
    assert {key.split(".")[0] for key in found} >= {"Recipe", "SourceConfig", "Synthesize", "Sft", "TaskConfig"}
    undeclared = {key.replace("Pretrain.", "Training.").replace("Sft.", "Training.") for key in found if not found[key]}
    assert undeclared == TEXTS


def test_each_reference_has_its_key_and_kind(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: a\nbase: models/b\nout: o\n"
        "prepare: {dialogues: [d.jsonl, {path: e.jsonl, columns: {output: answer}}], held_out: h.jsonl,"
        " executor_options: {x: {y: [z]}}}\n"
        "sft: {template: t.jinja, engine: zero2, adapter: {continue_from: c}, trainer: {optim_args: l}}\n"
        "evaluate: {tasks: [{task: exact_match, data: v.jsonl}]}\n",
        encoding="utf-8",
    )
    assert [(one.key, one.kind, one.value) for one in references(load_recipe(file)[0])] == [
        ("base", "model", "models/b"),
        ("prepare.dialogues.0.path", "file", "d.jsonl"),
        ("prepare.dialogues.1.path", "file", "e.jsonl"),
        ("prepare.held_out", "file", "h.jsonl"),
        ("prepare.executor_options.x.y.0", "arguments", "z"),
        ("sft.adapter.continue_from", "model", "c"),
        ("sft.engine", "name or file", "zero2"),
        ("sft.trainer.optim_args", "arguments", "l"),
        ("sft.template", "name or file", "t.jinja"),
        ("evaluate.tasks.0.data.path", "file", "v.jsonl"),
    ]
