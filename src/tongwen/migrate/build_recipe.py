"""What a reading has gathered becomes a recipe, or the commands that do it: what depends on several flags is settled here."""

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
from tongwen.recipe.training import Pretrain, Sft

SECTIONS: dict[str, type[Section]] = {"synthesize": Synthesize, "pretrain": Pretrain, "sft": Sft}
POSITIONAL = ("MODEL", "SRC")


def build_recipe(reading: FlagReader, place: str) -> dict[str, Any]:
    """The recipe as nested mappings, its keys in the order of the schema. Problems go to the reading."""
    words = {word: value for word, (_, value) in reading.said.items() if value is not None}
    section = reading.section
    _multiply_batch(reading, words, place)
    _name_method(words, section)
    _list_entries(words, section)
    if words.get("vocab.tokenizer") == words.get("base"):
        words.pop("vocab.tokenizer", None)
    if reading.context.lengths:
        words[f"{section}.max_length"] = sum(reading.context.lengths.values())
    if words.get("pretrain.train") == "lora+embeddings":  # the old scripts had one rate for all
        words["pretrain.embedding_learning_rate"] = words["pretrain.learning_rate"]
    if "base" not in words:
        reading.wrong(
            place,
            _("this names no model"),
            _("this is only a part: also give the file or command that names the model"),
        )
    words.setdefault("out", f"runs/{section}")
    words["name"] = re.sub(r"[^\w.\-]", "-", Path(words["out"]).name) or section
    words.setdefault("seed", 42)
    for verdict in reading.verdicts:
        if verdict.becomes in words:
            verdict.becomes += f": {_short(words[verdict.becomes])}"
    recipe: dict[str, Any] = {}
    for word, value in words.items():
        here = recipe
        *above, last = word.split(".")
        for part in above:
            here = here.setdefault(part, {})
        here[last] = value
    order = list(SECTIONS[section].model_fields)
    recipe[section] = dict(sorted(recipe.get(section, {}).items(), key=lambda pair: order.index(pair[0])))
    return {key: recipe[key] for key in Recipe.model_fields if key in recipe}


def as_yaml(recipe: dict[str, Any], heading: str) -> str:
    """The recipe's text under a comment that says where it comes from."""
    text: str = yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False, width=100)
    return "".join(f"# {line}\n" for line in heading.splitlines()) + text


def build_commands(reading: FlagReader, program: OldProgram) -> list[list[str]]:
    """The tongwen commands that do what an old program did, in their order."""
    said = {word: value for word, (_, value) in reading.said.items() if value not in (None, False)}
    out = [["fetch", id_] for id_ in reading.context.fetch]
    command = list(program.command)
    if "SRC" in said:
        said["SRC"] = _llama_folder(said["SRC"], said.pop("size", "7B"))
    if "--prompts" in said and command == ["chat"]:
        command, said = ["generate"], {"--model": said.pop("MODEL"), "--form": "chinese-llama-alpaca", **said}
        said.setdefault("--out", "predictions.json")
    if program.finds_base:
        said = _with_base(said, reading)
    line = [*command, *(str(said.pop(name)) for name in POSITIONAL if name in said)]
    for option, value in said.items():
        for one in value if isinstance(value, list) else [value]:
            line += [option] if one is True else [option, str(one)]
    return [*out, [*line, *program.after]]


def _short(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
    )


def _multiply_batch(reading: FlagReader, words: dict[str, Any], place: str) -> None:
    """Samples per step over all devices. BELLE divided its accumulation by the devices, the others multiplied by them."""
    factors, word = reading.context.batch, f"{reading.section}.batch_size"
    devices = factors.get("devices", 1) * factors.get("machines", 1)
    if "shared" in factors:
        words[word] = factors.get("per_device", 1) * max(factors["shared"] // devices, 1) * devices
    elif factors.keys() & {"per_device", "accumulate"}:
        words[word] = factors.get("per_device", 1) * factors.get("accumulate", 1) * devices
    whole = factors.get("whole")
    if whole not in (None, words.get(word)):
        reading.wrong(
            place,
            _("train_batch_size is {whole} in DeepSpeed's file, but the other values multiply to {words}").format(
                whole=whole, words=words.get(word)
            ),
            _("make them agree, or write train_batch_size: auto"),
        )


def _name_method(words: dict[str, Any], section: str) -> None:
    """Quantised is qlora; and what pre-training trains is said by `train`."""
    method = f"{section}.adapter.method"
    if f"{section}.adapter.quantize" in words:
        words[method] = "qlora"
    if section == "pretrain" and words.get(method) in ("lora", "full"):
        words.setdefault("pretrain.train", words.pop(method))
    if words.get(method) == "full":
        for word in [word for word in words if word.startswith(f"{section}.adapter.") and word != method]:
            del words[word]


def _list_entries(words: dict[str, Any], section: str) -> None:
    """LLaMA-Factory's data sets, by their entries."""
    folder, names = words.pop("dataset_dir", ""), words.pop("dataset", [])
    kind = "documents" if section == "pretrain" else "dialogues"
    if names:
        words[f"prepare.{kind}"] = [{"path": f"{folder}/dataset_info.json", "entry": name} for name in names]


def _llama_folder(folder: str, size: str) -> str:
    """Where LLaMA's files of one size lie: the converter looked below the folder."""
    return folder if size == "tokenizer_only" else str(Path(folder) / size)


def _with_base(said: dict[str, Any], reading: FlagReader) -> dict[str, Any]:
    """The base that the adapter names, and the name that the old program gave to the result."""
    file = Path(said["--adapter"][0]) / "adapter_config.json"
    try:
        base = str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] or "BASE")
    except (OSError, ValueError, KeyError, TypeError):
        base = "BASE"
        reading.notes.append(_("{file} does not name its base: fill it in yourself").format(file=file))
    return {"--base": base, **said, "--out": f"{said['--out']}/{Path(base).name}-finetune"}
