"""Broken and hostile model files, one kind a row: exit code 4, nothing runs, at most 30 seconds and 3 GB (bench/sandbox.py)."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.sandbox import Input, Sandbox

WEIGHTS, CONFIG, TOKENIZER = "base/model.safetensors", "base/config.json", "base/tokenizer.json"
INDEX, ADAPTER = "base/model.safetensors.index.json", "adapter/adapter_config.json"
OWN = ["generate", "--model", "base", "--prompts", "prompts.txt", "--out", "out", "--max-new-tokens", "2"]
GENERATE = [*OWN, "--template", "chatml"]
ADAPTED = [*GENERATE, "--adapter", "adapter"]
MERGE = ["merge", "--base", "base", "--adapter", "adapter", "--out", "out"]
DEEP = b"[" * 200_000 + b"]" * 200_000
NORM = "model.norm.weight"
Change = Callable[[bytes], bytes]


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the header of a safetensors file; a result replaces it."""

    def spoil(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        found = json.loads(content[8 : 8 + size])
        result = change(found)
        text = result if isinstance(result, bytes) else json.dumps(found if result is None else result).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    return spoil


def of_norm(**facts: Any) -> Change:
    """Change what the header says of one tensor."""
    return header(lambda found: found[NORM].update(facts))


def swapped(found: dict[str, Any]) -> None:
    """Two tensors share their bytes."""
    found[NORM]["data_offsets"] = next(one for name, one in found.items() if one.get("shape") == [32] and name != NORM)[
        "data_offsets"
    ]


def twice(content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + size].decode().rstrip()
    entry = json.loads(text)[NORM]
    text = text[:-1] + f", {json.dumps(NORM)}: {json.dumps({**entry, 'data_offsets': [0, 128]})}}}"
    return len(text).to_bytes(8, "little") + text.encode() + content[8 + size :]


def fields(**changes: Any) -> Change:
    """Change fields of a JSON object."""
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def inside(*path: Any, to: Any) -> Change:
    """Change one value inside a JSON file."""

    def spoil(content: bytes) -> bytes:
        found = json.loads(content)
        *way, last = path
        place = found
        for key in way:
            place = place[key]
        place[last] = to
        return json.dumps(found).encode()

    return spoil


def content_of(text: bytes) -> Change:
    return lambda content: text


class Runs:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("canary",))


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def zip_bomb() -> bytes:
    """A `.bin` file of 10 MB that unpacks to 10 GB."""
    sound = zipfile.ZipFile(io.BytesIO(saved({NORM: torch.zeros(32)})))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name in sound.namelist():
            if not name.endswith("/data/0"):
                packed.writestr(name, sound.read(name))
                continue
            with packed.open(name, "w", force_zip64=True) as stream:
                for _block in range(2000):
                    stream.write(bytes(1 << 20))
    return file.getvalue()


def gguf(layers: int, tensors: int = 0) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    facts = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    facts += [text("llama.block_count") + struct.pack("<II", 4, layers)]
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(facts)) + b"".join(facts) + bytes(64)


def replace_bomb(steps: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}
    start = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a"}
    return {"type": "Sequence", "normalizers": [start, *[step] * steps]}


IN_WEIGHTS: dict[str, Change] = {
    "a header length beyond the file": lambda content: struct.pack("<Q", 1 << 62) + content[8:],
    "a header length of 0": lambda content: bytes(8) + content[8:],
    "a header length of all bits": lambda content: b"\xff" * 8 + content[8:],
    "five bytes": lambda content: content[:5],
    "a header that is no JSON": header(lambda found: b"x" * 64),
    "a header that is a list": header(lambda found: [found]),
    "a header that is null": header(lambda found: b"null"),
    "a deep header": header(lambda found: DEEP),
    "a header that is not UTF-8": header(lambda found: b'{"\xff": 1}'),
    "an entry that is a number": header(lambda found: found.update({NORM: 3})),
    "an entry without offsets": header(lambda found: found[NORM].pop("data_offsets")),
    "shared bytes": header(swapped),
    "negative offsets": of_norm(data_offsets=[-128, 0]),
    "offsets in the wrong order": of_norm(data_offsets=[128, 0]),
    "offsets as text": of_norm(data_offsets=["a", "b"]),
    "offsets beyond the file": of_norm(data_offsets=[1 << 40, (1 << 40) + 128]),
    "a size of NaN": of_norm(shape=[float("nan")]),
    "an infinite size": of_norm(shape=[float("inf")]),
    "a negative size": of_norm(shape=[-32]),
    "a size that overflows": of_norm(shape=[1 << 40, 1 << 40]),
    "a shape as text": of_norm(shape="32"),
    "an unknown dtype": of_norm(dtype="X9"),
    "a dtype that is a number": of_norm(dtype=3),
    "a dtype that is null": of_norm(dtype=None),
    "a dtype of another width": of_norm(dtype="F64"),
    "integers as weights": of_norm(dtype="I32"),
    "a name twice": twice,
    "a name in the wrong case": header(lambda found: found.update({NORM.upper(): found.pop(NORM)})),
    "all tensors gone": header(lambda found: b"{}"),
}
IN_CONFIG: dict[str, Change] = {
    "an array": content_of(b"[]"),
    "null": content_of(b"null"),
    "text": content_of(b'"llama"'),
    "nothing": content_of(b""),
    "half a file": lambda content: content[: len(content) // 2],
    "a deep array": content_of(DEEP),
    "bytes that are no text": content_of(b"\xff\xfe\0"),
    "20,000 layers": fields(num_hidden_layers=20_000),
    "a trillion layers": fields(num_hidden_layers=10**12),
    "layers without meaning": fields(num_hidden_layers=10**26),
    "a negative number of layers": fields(num_hidden_layers=-1),
    "layers as text": fields(num_hidden_layers="2"),
    "layers as NaN": fields(num_hidden_layers=float("nan")),
    "a billion tokens": fields(vocab_size=10**9),
    "tokens without meaning": fields(vocab_size=10**26),
    "a vocabulary as text": fields(vocab_size="many"),
    "a vocabulary of null": fields(vocab_size=None),
    "a huge hidden size": fields(hidden_size=10**8, head_dim=None),
    "a negative hidden size": fields(hidden_size=-32),
    "a hidden size of null": fields(hidden_size=None),
    "half a unit": fields(hidden_size=32.5),
    "an infinite hidden size": fields(hidden_size=float("inf")),
    "a huge feed-forward layer": fields(intermediate_size=10**10),
    "no heads": fields(num_attention_heads=0),
    "heads as an object": fields(num_attention_heads={"a": 4}),
    "more heads for keys than for queries": fields(num_key_value_heads=3),
    "a huge head": fields(head_dim=10**9),
    "a head of no width": fields(head_dim=0),
    "an unknown activation": fields(hidden_act="os.system"),
    "an activation that is a list": fields(hidden_act=["silu"]),
    "an unknown family": fields(model_type="strange"),
    "a family that is a list": fields(model_type=["llama"]),
    "a family that is a number": fields(model_type=3),
    "an unknown quantization": fields(quantization_config={"quant_method": "x"}),
    "a quantization that is a list": fields(quantization_config=[1]),
}
COPIED = {"an unknown activation", "an activation that is a list"}  # a merge hands them on as they are
IN_TOKENIZER: dict[str, Change] = {
    "an array": content_of(b"[]"),
    "null": content_of(b"null"),
    "nothing": content_of(b""),
    "half a file": lambda content: content[: len(content) // 2],
    "a deep array": content_of(DEEP),
    "no model": fields(model=None),
    "an unknown model": inside("model", "type", to="X"),
    "a vocabulary as a list": inside("model", "vocab", to=[1, 2]),
    "an id below 0": inside("model", "vocab", "a", to=-1),
    "an id without end": inside("model", "vocab", "a", to=10**26),
    "merges of nothing": inside("model", "merges", to=[["q", "qqqq"]]),
    "merges as text": inside("model", "merges", to="a b"),
    "a normalizer that explodes": fields(normalizer=replace_bomb(40)),
    "a decoder that explodes": fields(decoder={"type": "Sequence", "decoders": replace_bomb(40)["normalizers"]}),
    "a normalizer with a long text": fields(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 100_000}),
    "a long text before each": fields(normalizer={"type": "Prepend", "prepend": "x" * 10_000_000}),
    "a normalizer in a normalizer": fields(normalizer={"type": "Sequence", "normalizers": [replace_bomb(20), replace_bomb(20)]}),
    "a regular expression that is none": fields(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
    "an unknown normalizer": fields(normalizer={"type": "X"}),
    "padding without end": fields(padding={"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}),
    "added tokens as an object": fields(added_tokens={"a": 1}),
}  # fmt: skip
IN_ADAPTER: dict[str, Change] = {
    "an array": content_of(b"[]"),
    "null": content_of(b"null"),
    "nothing": content_of(b""),
    "a deep array": content_of(DEEP),
    "a rank as text": fields(r="8"),
    "a rank of NaN": fields(r=float("nan")),
    "a rank without end": fields(r=10**26),
    "an infinite alpha": fields(lora_alpha=float("inf")),
    "a rank of 0": fields(r=0),
    "targets as a number": fields(target_modules=3),
    "targets of null": fields(target_modules=[None]),
    "targets that backtrack": fields(target_modules="(.*)*x"),
    "targets that branch": fields(target_modules="(.|.)" * 40 + "!"),
    "exclusions that backtrack": fields(exclude_modules="((.*)*)*x"),
    "ranks that backtrack": fields(rank_pattern={"((.*)*)*x": 8}),
    "scales that backtrack": fields(alpha_pattern={"((.*)*)*x": 8}),
    "layers that backtrack": fields(layers_pattern="((.*)*)*x", layers_to_transform=[0], target_modules=["q_proj"]),
    "targets that are no regular expression": fields(target_modules="(q_proj"),
    "ranks that are no regular expression": fields(rank_pattern={"(": 8}),
    "ranks as a list": fields(rank_pattern=[1]),
    "ranks as text": fields(rank_pattern={"q_proj": "x"}),
    "an unknown type": fields(peft_type="X"),
    "a type that is a list": fields(peft_type=["LORA"]),
    "modules as text": fields(modules_to_save="lm_head"),
}
INDEXES: dict[str, bytes] = {
    "an array": b"[]",
    "null": b"null",
    "a map that is a list": b'{"weight_map": ["a"]}',
    "a map of numbers": b'{"weight_map": {"a": 1}}',
    "an absolute path": b'{"weight_map": {"a": "/etc/passwd"}}',
    "a path upwards": b'{"weight_map": {"a": "../prompts.txt"}}',
    "a missing shard": b'{"weight_map": {"a": "b.safetensors"}}',
    "an empty name": b'{"weight_map": {"a": ""}}',
    "a dot": b'{"weight_map": {"a": "."}}',
    "a NUL": b'{"weight_map": {"a": "\\u0000"}}',
    "a long name": b'{"weight_map": {"a": "' + b"x" * 5000 + b'"}}',
    "a shard that is the config": b'{"weight_map": {"a": "config.json"}}',
    "a deep array": DEEP,
}
BINS: dict[str, Callable[[], bytes]] = {
    "a pickle that runs code": lambda: pickle.dumps(Runs()),
    "a tensor file that runs code": lambda: saved({NORM: Runs()}),
    "text": lambda: b"hello",
    "an empty archive": lambda: b"PK\x05\x06" + bytes(18),
    "a number": lambda: saved(3),
    "names that are numbers": lambda: saved({1: torch.zeros(2)}),
    "a zip bomb": zip_bomb,
    "a pickle cut off": lambda: pickle.dumps({"a": 1})[:-3],
}
GGUFS: dict[str, bytes] = {
    "20,000 layers": gguf(20_000),
    "a count of tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(64),
    "a count of facts": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(64),
    "nothing": b"",
    "another version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0) + bytes(64),
    "another magic": b"GGML" + bytes(64),
    "no facts": b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64),
}
JSON_FILES: dict[str, tuple[str, bytes]] = {
    "a tokenizer's config that is an array": ("base/tokenizer_config.json", b"[]"),
    "a tokenizer's config that is null": ("base/tokenizer_config.json", b"null"),
    "a tokenizer's config cut off": ("base/tokenizer_config.json", b"{"),
    "a deep config of a tokenizer": ("base/tokenizer_config.json", DEEP),
    "an array of options": ("base/generation_config.json", b"[]"),
    "options cut off": ("base/generation_config.json", b"{"),
    "deep options": ("base/generation_config.json", DEEP),
    "a switch that is an object": ("base/generation_config.json", b'{"output_hidden_states": {"a": [1]}}'),
    "an end token without meaning": ("base/generation_config.json", b'{"eos_token_id": {"a": []}}'),
}

RENDER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{% set x = 'a' * 3000000000 %}{{ x | length }}",
    "doubling": "{% set ns = namespace(x='a' * 1000) %}{% for i in range(23) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a long answer": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "no template": "{% for",
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    before = Path.cwd()
    yield Sandbox(tmp_path_factory.mktemp("sandbox"))
    os.chdir(before)


def refused(sandbox: Sandbox, command: list[str], files: dict[str, bytes], gone: tuple[str, ...] = ()) -> None:
    """The command ends with 4, within the limits, and runs nothing."""
    outcome = sandbox.run(Input(command, files, gone=gone))
    assert not outcome.fault, f"{outcome.fault}\n{outcome.text}"
    assert outcome.code == 4, f"exit {outcome.code}\n{outcome.text}"
    assert re.search(r"\w: ", outcome.text), "no place"
    assert not (sandbox.work / "canary").exists() and not (sandbox.work / "out").exists()


def changed(sandbox: Sandbox, name: str, change: Change) -> dict[str, bytes]:
    file = sandbox.models / name
    return {name: change(file.read_bytes() if file.is_file() else b"")}


@pytest.mark.parametrize("command", [GENERATE, ADAPTED, MERGE])
def test_sound_files_are_accepted(command: list[str], sandbox: Sandbox) -> None:
    outcome = sandbox.run(Input(command))
    assert outcome.code == 0 and not outcome.fault, outcome.text


def test_sound_template_is_accepted(sandbox: Sandbox) -> None:
    assert sandbox.run(Input(OWN, {"base/chat_template.jinja": RENDER.encode()})).code == 0


@pytest.mark.parametrize("kind", IN_WEIGHTS)
def test_broken_weights_are_refused(kind: str, sandbox: Sandbox) -> None:
    for command in (GENERATE, MERGE):
        refused(sandbox, command, changed(sandbox, WEIGHTS, IN_WEIGHTS[kind]))


@pytest.mark.parametrize("kind", IN_CONFIG)
def test_broken_config_is_refused(kind: str, sandbox: Sandbox) -> None:
    for command in (GENERATE, MERGE) if kind not in COPIED else (GENERATE,):
        refused(sandbox, command, changed(sandbox, CONFIG, IN_CONFIG[kind]))


@pytest.mark.parametrize("kind", IN_TOKENIZER)
def test_broken_tokenizer_is_refused(kind: str, sandbox: Sandbox) -> None:
    refused(sandbox, GENERATE, changed(sandbox, TOKENIZER, IN_TOKENIZER[kind]))


@pytest.mark.sample(*(kind for kind in IN_ADAPTER if "backtrack" not in kind), "targets that backtrack")
@pytest.mark.parametrize("kind", IN_ADAPTER)
def test_broken_adapter_config_is_refused(kind: str, sandbox: Sandbox) -> None:
    for command in (ADAPTED, MERGE):
        refused(sandbox, command, changed(sandbox, ADAPTER, IN_ADAPTER[kind]))


@pytest.mark.parametrize("kind", INDEXES)
def test_broken_index_is_refused(kind: str, sandbox: Sandbox) -> None:
    for command in (GENERATE, MERGE):
        refused(sandbox, command, {INDEX: INDEXES[kind]}, gone=(WEIGHTS,))


@pytest.mark.parametrize("kind", BINS)
def test_hostile_bin_is_refused(kind: str, sandbox: Sandbox) -> None:
    content = BINS[kind]()
    for command in (GENERATE, MERGE):
        refused(sandbox, command, {"base/pytorch_model.bin": content}, gone=(WEIGHTS,))


@pytest.mark.parametrize("kind", GGUFS)
def test_broken_gguf_is_refused(kind: str, sandbox: Sandbox) -> None:
    command = [word.replace("base", "x.gguf") for word in GENERATE]
    for engine in ("batched", "llama.cpp"):
        refused(sandbox, [*command, "--engine", engine], {"x.gguf": GGUFS[kind]})


@pytest.mark.parametrize("kind", JSON_FILES)
def test_other_broken_files_are_refused(kind: str, sandbox: Sandbox) -> None:
    name, content = JSON_FILES[kind]
    refused(sandbox, GENERATE, {name: content})


@pytest.mark.parametrize("kind", TEMPLATES)
def test_hostile_template_is_stopped(kind: str, sandbox: Sandbox) -> None:
    refused(sandbox, OWN, {"base/chat_template.jinja": (TEMPLATES[kind] + RENDER).encode()})
