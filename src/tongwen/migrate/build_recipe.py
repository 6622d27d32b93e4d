"""Build a recipe, or tongwen commands, from the flags that were read; handles values that depend on several flags."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tongwen.core.i18n import _
from tongwen.migrate.flags import FlagReader
from tongwen.migrate.tables import OldProgram
from tongwen.recipe.data import Synthesize
from tongwen.recipe.fields import Section
from tongwen.recipe.schema import Recipe
from tongwen.recipe.training import Prefer, Pretrain, Sft

SECTIONS: dict[str, type[Section]] = {"synthesize": Synthesize, "pretrain": Pretrain, "sft": Sft, "prefer": Prefer}
POSITIONAL = ("MODEL", "SRC")


def build_recipe(reader: FlagReader, place: str) -> dict[str, Any]:
    """Return the recipe as nested mappings, its keys in the order of the schema. Problems are added to the reader."""
    settings = {key: value for key, (_, value) in reader.settings.items() if value is not None}
    section = reader.section
    _multiply_batch(reader, settings, place)
    _name_method(settings, section)
    _list_entries(settings, section)
    if section == "prefer":
        _render_as_sft(reader, settings)
    if settings.get("vocab.tokenizer") == settings.get("base"):
        settings.pop("vocab.tokenizer", None)
    if reader.context.lengths:
        settings[f"{section}.max_length"] = sum(reader.context.lengths.values())
    if settings.get("pretrain.train") == "lora+embeddings":  # the old scripts had one learning rate for everything
        settings["pretrain.embedding_learning_rate"] = settings["pretrain.learning_rate"]
    if "base" not in settings:
        reader.add_problem(
            place,
            _("this names no model"),
            _("this is only a part: also give the file or command that names the model"),
        )
    settings.setdefault("out", f"runs/{section}")
    settings["name"] = re.sub(r"[^\w.\-]", "-", Path(settings["out"]).name) or section
    settings.setdefault("seed", 42)
    for verdict in reader.verdicts:
        if verdict.becomes in settings:
            verdict.becomes += f": {_short(settings[verdict.becomes])}"
    recipe: dict[str, Any] = {}
    for key, value in settings.items():
        node = recipe
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    order = list(SECTIONS[section].model_fields)
    recipe[section] = dict(sorted(recipe.get(section, {}).items(), key=lambda pair: order.index(pair[0])))
    return {key: recipe[key] for key in Recipe.model_fields if key in recipe}


def as_yaml(recipe: dict[str, Any], heading: str) -> str:
    """Return the recipe's text under a comment that names its origin."""
    text: str = yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False, width=100)
    return "".join(f"# {line}\n" for line in heading.splitlines()) + text


def build_commands(reader: FlagReader, program: OldProgram) -> list[list[str]]:
    """Return the tongwen commands that replace an old program, in their order."""
    options = {key: value for key, (_, value) in reader.settings.items() if value not in (None, False)}
    out = [["fetch", id_] for id_ in reader.context.fetch]
    command = list(program.command)
    if "SRC" in options:
        options["SRC"] = _llama_folder(options["SRC"], options.pop("size", "7B"))
    if "--prompts" in options and command == ["chat"]:
        command, options = ["generate"], {"--model": options.pop("MODEL"), "--form": "chinese-llama-alpaca", **options}
        options.setdefault("--out", "predictions.json")
    if program.finds_base:
        options = _with_base(options, reader)
    line = [*command, *(str(options.pop(name)) for name in POSITIONAL if name in options)]
    for option, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            line += [option] if one is True else [option, str(one)]
    return [*out, [*line, *program.after]]


def _short(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
    )


def _multiply_batch(reader: FlagReader, settings: dict[str, Any], place: str) -> None:
    """Set the samples per step over all devices. BELLE divided its accumulation by the devices; the others did not."""
    factors, key = reader.context.batch, f"{reader.section}.batch_size"
    devices = factors.get("devices", 1) * factors.get("machines", 1)
    if "shared" in factors:
        settings[key] = factors.get("per_device", 1) * max(factors["shared"] // devices, 1) * devices
    elif factors.keys() & {"per_device", "accumulate"}:
        settings[key] = factors.get("per_device", 1) * factors.get("accumulate", 1) * devices
    whole_batch = factors.get("whole")
    if whole_batch not in (None, settings.get(key)):
        reader.add_problem(
            place,
            _("train_batch_size is {whole} in DeepSpeed's file, but the other values multiply to {words}").format(
                whole=whole_batch, words=settings.get(key)
            ),
            _("make them agree, or write train_batch_size: auto"),
        )


def _name_method(settings: dict[str, Any], section: str) -> None:
    """Set the method: a quantised base means qlora; in pre-training, lora and full move to the key `train`."""
    method = f"{section}.adapter.method"
    if f"{section}.adapter.quantize" in settings:
        settings[method] = "qlora"
    if section == "pretrain" and settings.get(method) in ("lora", "full"):
        settings.setdefault("pretrain.train", settings.pop(method))
    if settings.get(method) == "full":
        for key in [key for key in settings if key.startswith(f"{section}.adapter.") and key != method]:
            del settings[key]


def _render_as_sft(reader: FlagReader, settings: dict[str, Any]) -> None:
    """Give `prefer` the settings of `sft` about rendering that it shares; it has no others of them."""
    for key in [key for key in settings if key.startswith("sft.")]:
        value, name = settings.pop(key), key.replace("sft.", "prefer.")
        if name.removeprefix("prefer.") in Prefer.model_fields:
            settings[name] = value
            for verdict in reader.verdicts:
                verdict.becomes = name if verdict.becomes == key else verdict.becomes


def _list_entries(settings: dict[str, Any], section: str) -> None:
    """Name LLaMA-Factory's data sets by their entries in dataset_info.json."""
    folder, names = settings.pop("dataset_dir", ""), settings.pop("dataset", [])
    kind = {"pretrain": "documents", "prefer": "preferences"}.get(section, "dialogues")
    if names:
        settings[f"prepare.{kind}"] = [{"path": f"{folder}/dataset_info.json", "entry": name} for name in names]


def _llama_folder(folder: str, size: str) -> str:
    """Return the folder of one size of LLaMA: the old converter searched below the given folder."""
    return folder if size == "tokenizer_only" else str(Path(folder) / size)


def _with_base(options: dict[str, Any], reader: FlagReader) -> dict[str, Any]:
    """Add the base that the adapter names, and the folder that the old program named for the result."""
    file = Path(options["--adapter"][0]) / "adapter_config.json"
    try:
        base = str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] or "BASE")
    except (OSError, ValueError, KeyError, TypeError):
        base = "BASE"
        reader.notes.append(_("{file} does not name its base: fill it in yourself").format(file=file))
    return {"--base": base, **options, "--out": f"{options['--out']}/{Path(base).name}-finetune"}
