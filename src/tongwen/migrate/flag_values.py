"""Convert old values: a reader for each kind of value that the tables name.

A reader gets the flag and its old value (text, or a value from JSON or YAML). It returns the new value, a CorrectedValue
(another value, and why) or a RemovedFlag (no setting is needed, and why). It raises ValueError for an invalid value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tongwen.core.i18n import _

TRUE, FALSE = ("true", "yes", "y", "t", "on", "1"), ("false", "no", "n", "f", "off", "0")
EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "transformer.wte", "word_embeddings"}
# Templates of LLaMA-Factory that tongwen ships, because models do not include them.
TEMPLATES = {"alpaca": "alpaca", "vicuna": "vicuna", "belle": "belle-v2", "chatml": "chatml"}
# Words of other launchers for options of torchrun.
TORCHRUN = {
    "num_nodes": "nnodes",
    "num_machines": "nnodes",
    "machine_rank": "node_rank",
    "main_process_ip": "master_addr",
    "main_process_port": "master_port",
}


@dataclass(frozen=True)
class CorrectedValue:
    """A value that had to be changed, and why."""

    value: Any
    why: str


@dataclass(frozen=True)
class RemovedFlag:
    """A value that needs no setting any more, and why; empty: the table gives the reason."""

    why: str = ""


@dataclass
class MigrationContext:
    """State that the readers share.

    current_id: name of a model -> its id today
    read_file:  (path, flag that names it) -> its content, whose keys are read like flags
    batch:      per_device, accumulate or shared, devices, machines, whole: the factors of the samples per step
    launch:     options of torchrun on several machines
    environment: variables that are set in front of the new command
    lengths:    maximum lengths of the parts of a sample, which are added up at the end
    fetch:      ids of adapters that must be fetched first
    """

    current_id: Callable[[str], str]
    read_file: Callable[[str, str], Mapping[str, Any]]
    batch: dict[str, int] = field(default_factory=dict)
    launch: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    fetch: list[str] = field(default_factory=list)


Reader = Callable[[MigrationContext, str, Any], Any]


# -- numbers and texts ---------------------------------------------------------------------------------------------


def text(context: MigrationContext, flag: str, value: Any) -> Any:
    if value is None or value == "":
        raise ValueError(_("it has no value"))
    return value


def plain(context: MigrationContext, flag: str, value: Any) -> Any:
    return scalar(context, flag, text(context, flag, value))


def scalar(context: MigrationContext, flag: str, value: Any) -> Any:
    """Return a number, a truth value or a text; a flag without a value is true."""
    if not isinstance(value, str):
        return True if value is None else value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value.lower(), value)


def number(context: MigrationContext, flag: str, value: Any) -> Any:
    found = scalar(context, flag, text(context, flag, value))
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise ValueError(_("{value!r} is not a valid number").format(value=value))
    return found


def count(context: MigrationContext, flag: str, value: Any) -> int:
    found = number(context, flag, value)
    if found != int(found):
        raise ValueError(_("{value!r} is not an integer").format(value=value))
    return int(found)


def epochs(context: MigrationContext, flag: str, value: Any) -> str:
    return f"{number(context, flag, value):g} epochs"


def steps(context: MigrationContext, flag: str, value: Any) -> Any:
    found = count(context, flag, value)
    return f"{found} steps" if found > 0 else RemovedFlag(_("epochs take precedence"))


def switch(context: MigrationContext, flag: str, value: Any) -> bool:
    lowered = "true" if value is None else str(value).lower()
    if lowered not in TRUE + FALSE:
        raise ValueError(_("{value!r} is neither true nor false").format(value=value))
    return lowered in TRUE


def items(context: MigrationContext, flag: str, value: Any) -> list[str]:
    found = value if isinstance(value, list) else str(text(context, flag, value)).split(",")
    return [item.strip() for item in map(str, found) if item.strip()]


def seed(context: MigrationContext, flag: str, value: Any) -> Any:
    if value != "$RANDOM":
        return count(context, flag, value)
    return CorrectedValue(
        42,
        _("fixed and recorded: with a different seed, each machine would split the data differently"),
    )


def choice(context: MigrationContext, flag: str, value: Any) -> Any:
    """Return the first of `[pth|huggingface]`, as manuals write a choice: the first is the script's default."""
    found = re.fullmatch(r"\[(\w+)\|.*\]", str(text(context, flag, value)))
    if found is None:
        return value
    return CorrectedValue(found[1], _("{value} is a choice; tongwen takes the first").format(value=value))


def auto(context: MigrationContext, flag: str, value: Any) -> Any:
    return RemovedFlag() if value == "auto" else number(context, flag, value)


def targets(context: MigrationContext, flag: str, value: Any) -> Any:
    return "all-linear" if value == "all" else items(context, flag, value)


def whole_embeddings(context: MigrationContext, flag: str, value: Any) -> Any:
    others = sorted(set(items(context, flag, value)) - EMBEDDINGS)
    if others:
        raise ValueError(_("{others} are not embeddings").format(others=others))
    return "lora+embeddings"


def template(context: MigrationContext, flag: str, value: Any) -> Any:
    builtin = TEMPLATES.get(str(value))
    return builtin or CorrectedValue("own", _("the model has its own; `tongwen look RECIPE` shows it"))


# -- batch sizes and launchers -------------------------------------------------------------------------------------


def _factor(name: str) -> Reader:
    """Return a reader that records a factor of the batch size; build_recipe multiplies the factors."""

    def read(context: MigrationContext, flag: str, value: Any) -> None:
        context.batch[name] = count(context, flag, value)

    return read


def whole_batch(context: MigrationContext, flag: str, value: Any) -> RemovedFlag:
    if value != "auto":
        context.batch["whole"] = count(context, flag, value)
    return RemovedFlag(_("batch_size sets it"))


def devices(context: MigrationContext, flag: str, value: Any) -> Any:
    if not str(value).isdigit():
        return several(context, flag, value)
    context.batch["devices"] = int(value)
    return int(value)


def engine(context: MigrationContext, flag: str, value: Any) -> Any:
    if context.batch.get("devices", 1) * context.batch.get("machines", 1) == 1:
        return RemovedFlag(_("a single device has nothing to share"))
    return value


def processes(context: MigrationContext, flag: str, value: Any) -> Any:
    """Record accelerate's processes, which are those of all machines together."""
    context.batch["processes"] = count(context, flag, value)
    return context.batch["processes"]


def machines(context: MigrationContext, flag: str, value: Any) -> Any:
    if str(value) == "1":
        return RemovedFlag()
    if str(value).isdigit():
        context.batch["machines"] = int(value)
    return several(context, flag, value)


def several(context: MigrationContext, flag: str, value: Any) -> CorrectedValue:
    context.launch[TORCHRUN.get(flag, flag)] = str(text(context, flag, value))
    return CorrectedValue(None, _("still passed to torchrun on each machine"))


def included(context: MigrationContext, flag: str, value: Any) -> CorrectedValue:
    """Read DeepSpeed's `host:0,1@other:0,1`, or accelerate's `0,1`: the machines, and the GPUs of each."""
    if value == "all":
        return CorrectedValue(None, _("all GPUs of each machine"))
    hosts = [host.partition(":") for host in str(text(context, flag, value)).split("@")]
    chosen = {gpus or (name if not colon and name[:1].isdigit() else "") for name, colon, gpus in hosts}
    if len(chosen) > 1:
        raise ValueError(_("each machine has other GPUs: {gpus}").format(gpus=" / ".join(sorted(chosen))))
    if len(hosts) > 1:
        context.batch["machines"] = len(hosts)
        context.launch |= {"nnodes": str(len(hosts)), "master_addr": hosts[0][0]}
    (gpus,) = chosen
    if not gpus:
        return CorrectedValue(None, _("all GPUs of each machine"))
    context.environment["CUDA_VISIBLE_DEVICES"] = gpus
    context.batch["devices"] = len(gpus.split(","))
    return CorrectedValue(
        context.batch["devices"], _("CUDA_VISIBLE_DEVICES={gpus} is set in front of the new command").format(gpus=gpus)
    )


def hosts(context: MigrationContext, flag: str, value: Any) -> CorrectedValue:
    """Read DeepSpeed's list of machines, `host slots=N` in each line."""
    name = str(text(context, flag, value))
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return CorrectedValue(None, _("{file} cannot be read here: name its first machine yourself").format(file=name))
    listed = [line.split("#")[0].split() for line in lines if line.split("#")[0].strip()]
    if not listed:
        raise ValueError(_("{file} names no machine").format(file=name))
    slots = {part for words in listed for part in words[1:]}
    if len(listed) > 1:
        context.batch.setdefault("machines", len(listed))
        context.launch = {"nnodes": str(len(listed)), "master_addr": listed[0][0]} | context.launch
    if len(slots) == 1 and (found := re.fullmatch(r"slots=(\d+)", next(iter(slots)))):
        context.batch.setdefault("devices", int(found[1]))
    return CorrectedValue(
        None, _("{count} machines, the first is {first}").format(count=len(listed), first=listed[0][0])
    )


def length_part(context: MigrationContext, flag: str, value: Any) -> CorrectedValue:
    context.lengths[flag] = count(context, flag, value)
    return CorrectedValue(
        None,
        _("question and answer share one length; the answer is never cut"),
    )


# -- files and models ----------------------------------------------------------------------------------------------


def file(context: MigrationContext, flag: str, value: Any) -> None:
    context.read_file(str(text(context, flag, value)), flag)


def engine_file(context: MigrationContext, flag: str, value: Any) -> Any:
    """Read accelerate's configuration file, and return it as the engine if it configures one."""
    name = str(text(context, flag, value))
    if context.read_file(name, flag).get("distributed_type") in ("FSDP", "DEEPSPEED"):
        return name
    return CorrectedValue(None, _("its own keys, above"))


def folder(context: MigrationContext, flag: str, value: Any) -> str:
    return str(text(context, flag, value)).rstrip("/") or "."


def own_folder(context: MigrationContext, flag: str, value: Any) -> Any:
    """Return the output folder: a separate one, never the working directory."""
    name = folder(context, flag, value)
    if name != ".":
        return name
    return CorrectedValue("merged", _("results go to their own folder"))


def stem(context: MigrationContext, flag: str, value: Any) -> str:
    return str(Path(str(text(context, flag, value))).with_suffix(""))


def model(context: MigrationContext, flag: str, value: Any) -> Any:
    """Return an existing folder, or the current id of a model on a hub."""
    name = folder(context, flag, value)
    new = name if Path(name).exists() else context.current_id(name)
    return name if new == name else CorrectedValue(new, _("{name} has moved: {new}").format(name=name, new=new))


def trained(context: MigrationContext, flag: str, value: Any) -> Any:
    """Return the result of an old training, or of the stage with which tongwen replaced it."""
    name = folder(context, flag, value)
    if not (Path(name) / "config.json").is_file():
        for place in (Path(name), Path(name).parent):
            for stage in ("sft", "pretrain"):
                if (place / stage / "manifest.json").is_file():
                    return CorrectedValue(str(place / stage), _("the training result is in this folder"))
    return model(context, flag, name)


def adapters(context: MigrationContext, flag: str, value: Any) -> Any:
    """Return the adapters in their order; those on a hub are fetched first."""
    out, why = list[str](), list[str]()
    for name in items(context, flag, value):
        found = trained(context, flag, name)
        place, reason = (found.value, found.why) if isinstance(found, CorrectedValue) else (found, "")
        if context.current_id(name) != name and not Path(name).exists():
            context.fetch.append(place)
            place = f"models/{place.split('/')[-1]}"
        out.append(place)
        why += [reason] if reason else []
    return CorrectedValue(out, "; ".join(why)) if why else out


def data(context: MigrationContext, flag: str, value: Any) -> Any:
    """Return a data file; if it does not exist, the file of that name one folder below, where `tongwen fetch` stores it."""
    name = str(text(context, flag, value))
    below = sorted(Path(name).parent.glob(f"*/{Path(name).name}")) if not Path(name).exists() else []
    return CorrectedValue(str(below[0]), _("it was fetched to this path")) if below else name


def _sources(pattern: str, **fields: Any) -> Reader:
    """Return a reader that makes a data source of a folder's files."""

    def read(context: MigrationContext, flag: str, value: Any) -> list[dict[str, Any]]:
        return [{"path": f"{folder(context, flag, value)}/{pattern}", **fields}]

    return read


def _inside(pattern: str) -> Reader:
    def read(context: MigrationContext, flag: str, value: Any) -> str:
        return pattern.format(folder(context, flag, value))

    return read


READERS: dict[str, Reader] = {
    "plain": plain, "text": text, "path": folder, "folder": folder, "own_folder": own_folder, "scalar": scalar, "number": number, "share": number, "count": count,
    "epochs": epochs, "steps": steps, "switch": switch, "list": items, "seed": seed, "choice": choice, "auto": auto,
    "targets": targets, "whole_embeddings": whole_embeddings, "template": template,
    "per_device": _factor("per_device"), "accumulate": _factor("accumulate"), "shared_accumulate": _factor("shared"),
    "whole_batch": whole_batch, "devices": devices, "engine": engine, "stem": stem, "machines": machines, "processes": processes, "included": included, "hosts": hosts, "several": several, "length_part": length_part,
    "file": file, "engine_file": engine_file, "model": model, "trained": trained, "adapters": adapters, "data": data,
    "text_folder": _sources("*.txt", records="line"), "json_folder": _sources("*.json"), "train_folder": _sources("*train*.txt"),
    "tokenizer_file": _inside("{}/tokenizer.model"),
}  # fmt: skip
