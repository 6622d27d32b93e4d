"""Limits for what a model's small files may ask for, checked before anything is built from them.

A config.json of one kilobyte can ask for a billion layers, and a tokenizer.json can turn a word into gigabytes. The files of
the weights say how large the model is, so the config may not claim much more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tongwen.core.artifact import read_json
from tongwen.core.errors import ArtifactError, ModelError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import INDEX, find_tensors

LAYERS = re.compile(r"((num|n|en|de).*_layers?|num_layers|depth|(encoder|decoder)_layers)")
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # where they stand, whole numbers
SIZES = (*NEEDED, "intermediate_size", "head_dim", "num_key_value_heads", "n_embd", "n_head", "n_layer")
FLAGS = {  # of generation_config.json
    *("do_sample", "output_attentions", "output_hidden_states", "output_logits", "output_scores"),
    *("return_dict_in_generate", "use_cache"),
}
WHOLE = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
EXPERTS = re.compile(r"(num|n)_.*experts")
MOST = 4096  # layers of a model whose files do not list their tensors; experts of any model
BITS = 8  # numbers that one byte of weights can hold, at most
SPARE = 1 << 26  # numbers that need not be in the files: tables of positions
GROWTH = 64  # how many times as long a normalizer may make a text; the ordinary ones at most triple it
ADDED = 1 << 12  # characters that a normalizer may add
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
PADDED = 1 << 20  # tokens to which a tokenizer may pad


def check_config(folder: Path) -> None:
    """Raise ModelError when config.json has sizes that mean nothing, or claims more layers than the files have tensors.

    This comes before transformers reads it, which makes lists of that length.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    lists_tensors = any((folder / name).is_file() for name in (INDEX, "model.safetensors"))
    tensors = find_tensors(folder) if lists_tensors else {}
    layers = len(tensors) or MOST
    config = read_json(file)
    _check_numbers(config, file)
    for stored in () if config.get("quantization_config") else tensors.values():
        if stored.name.endswith(".weight") and stored.dtype in WHOLE:
            raise ModelError(
                _("{name} is of type {dtype}, which no weight has").format(name=stored.name, dtype=stored.dtype),
                place=str(stored.file),
                remedy=_("download the whole model again"),
            )
    for key, value in _whole_numbers(config):
        most = layers if LAYERS.fullmatch(key) else MOST if EXPERTS.fullmatch(key) else value
        if value > most:
            raise ModelError(
                _("{key} is {value}, but the files have only {count} tensors").format(
                    key=key, value=value, count=layers
                ),
                place=str(file),
                remedy=_("download the whole model again"),
            )


def check_options(folder: Path) -> None:
    """Raise ModelError when generation_config.json cannot be read: transformers passes over it, and its stop tokens."""
    file = folder / "generation_config.json"
    found = read_json(file) if file.is_file() else {}
    for key in found.keys() & FLAGS:
        if found[key] is not None and not isinstance(found[key], bool):
            raise ModelError(
                _("{key} is {config!r}").format(key=key, config=found[key]),
                place=str(file),
                remedy=_("download the whole model again"),
            )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = found.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
            raise ModelError(
                _("{key} is {config!r}").format(key=key, config=value),
                place=str(file),
                remedy=_("download the whole model again"),
            )


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError for a size that is no positive number, or larger than all weights together."""
    most = sum(weights.stat().st_size for pattern in WEIGHTS for weights in file.parent.glob(pattern)) * BITS
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for part in parts:
        for key in SIZES:
            value = part.get(key)
            is_elsewhere = value is None and (key not in NEEDED or "text_config" in part)
            if key not in part or isinstance(value, list) or is_elsewhere:
                continue
            # Beside qk_nope_head_dim it is the part with positions, which GLM-5 does without.
            least = 0 if key == "head_dim" and part.get("qk_nope_head_dim") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least or (most and value > most):
                raise ModelError(
                    _("{key} is {value!r}, which these weights do not have").format(key=key, value=value),
                    place=str(file),
                    remedy=_("download the whole model again"),
                )


def check_size(model: Any, files: Iterator[Path], place: str) -> None:
    """Raise ModelError when a model (on the meta device) has more numbers than its files can hold."""
    claimed = sum(part.numel() for part in {*model.parameters(), *model.buffers()})
    held = sum(file.stat().st_size for file in files)
    if claimed > held * BITS + SPARE:
        raise ModelError(
            _("config.json describes a model of {claimed:,} numbers, but its files have only {held:,} bytes").format(
                claimed=claimed, held=held
            ),
            place=place,
            remedy=_("download the whole model again"),
        )


def check_tokenizer(file: Path) -> None:
    """Raise ArtifactError when a tokenizer.json would make a text much longer, or pad it without end."""
    if not file.is_file():
        return
    found = read_json(file)
    for part in ("normalizer", "decoder"):
        if _growth_of([*_steps(found.get(part))], file) > GROWTH:
            raise _refused(
                _("its {part} makes a text more than {growth} times as long").format(part=part, growth=GROWTH), file
            )
    padding = found.get("padding")
    if isinstance(padding, dict):
        lengths = [value for _key, value in _whole_numbers(padding)]
        if max(lengths, default=0) > PADDED:
            raise _refused(_("it pads to {length} tokens").format(length=max(lengths)), file)


def _growth_of(steps: list[Mapping[str, Any]], file: Path) -> float:
    """Return how many times as long the steps of a normalizer or decoder can make a text. What one step writes grows again
    only in a later step that finds its pattern there; what a regular expression finds is not known."""
    replaced: list[tuple[str, float]] = []  # what a step writes, and how many times as long a text is then
    for step in steps:
        content, added = step.get("content"), step.get("prepend")
        if isinstance(added, str) and len(added) > ADDED:
            raise _refused(_("it prepends {count} characters").format(count=len(added)), file)
        if step.get("type") != "Replace" or not isinstance(content, str):
            continue
        pattern = step.get("pattern")
        plain = pattern.get("String") if isinstance(pattern, dict) else None
        searched = plain if isinstance(plain, str) else ""
        before = max((growth for text, growth in replaced if searched in text), default=1.0)
        replaced.append((content, before * max(1.0, len(content) / max(len(searched), 1))))
    return max((growth for _unused, growth in replaced), default=1.0)


def _steps(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps inside sequences, in order."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += reversed(one)
        elif isinstance(one, dict):
            yield one
            waiting += [inner for inner in one.values() if isinstance(inner, list)]


def _whole_numbers(value: Any) -> Iterator[tuple[str, int]]:
    """Yield (key, number) for every whole number in nested objects."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _whole_numbers(inner)
        elif isinstance(inner, int) and not isinstance(inner, bool):
            yield key, inner


def _refused(rule: str, file: Path) -> ArtifactError:
    return ArtifactError(rule, place=str(file), remedy=_("use the tokenizer of another copy of this model"))
