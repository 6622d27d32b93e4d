"""Generated input: recipes, rows, model files, manifests, command lines and requests from grammars, none of which may end in a traceback.

    python bench/fuzz.py --out bench/results/fuzz.json        (or: make fuzz)

torch is imported once; every input goes to a fork that runs the real command (or, for requests, the real routes) on a tiny
model. The harness knows five laws: an exit code of the contract, no traceback, at most 30 seconds of CPU time, at most 3 GB,
and no file changed outside the output. Further: no terminal escape reaches the output, and a request is never answered with 500.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # not bench/, whose gguf.py is another
os.environ["OMP_NUM_THREADS"] = "1"

import yaml  # noqa: E402
from bench.sandbox import MEMORY, RECIPE, SECONDS, Input, Sandbox, encode, recipe_with  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tests.conftest import dialogues  # noqa: E402

from tongwen.cli import parser as cli_parser  # noqa: E402
from tongwen.core import artifact, safetensors_io  # noqa: E402
from tongwen.recipe.schema import Recipe  # noqa: E402

HUGE = 10**26
NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    0.5,
    1.0,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    HUGE,
    -HUGE,
    2**31,
    2**63,
    -(2**63),
]
TEXTS = ["", " ", ".", "..", "[/x]", "[bold]", "\0", "\x1b[31mred", "\x9b2J", "\r\n", "../../x", "/etc/passwd", "/dev/zero", "/dev/null",
         "/proc/self/mem", "x" * 300, "\u202eabc", "\ud800", "{{x}}", "{0}{name}%s%d", "(a+)+$", "(.*)*x", "[", "*", "**/*", "${HOME}", "1e400", ".nan", "10:20",
         "null", "true", "yes", "1 epochs", "3 steps", "24GB", "auto", "lora", "all-linear", "chatml", "base", "data.jsonl", "http://[", "Nobody/Nothing", "modelscope:a/b",
         "x.gguf", "２", "１e９", "中文", "!!python/object:os.system"]  # fmt: skip
ROW_KEYS = ["instruction", "input", "output", "messages", "conversations", "role", "content", "from", "value", "text", "system", "history", "tools",
            "tool_calls", "function", "name", "arguments", "chosen", "rejected", "prompt", "completion", "label", "weight", "train", "reasoning_content", "thinking", "id", "type"]  # fmt: skip
YAML_PARTS = ["name: x\n", "base: base\n", "prepare: ", "sft: ", "out: out\n", "dialogues: data.jsonl", "a: ", "&x ", "*x", "<<: ", "[", "]", "{", "}", "- ", ", ", "\n",
              "  ", "\t", '"', "'", "#", "!!binary ", "!!python/name:os.system ", "!!set ", "? ", "| \n", "> \n", "%YAML 1.1\n", "---\n", "...\n", "1e400", "0x_", "0o9", "2001-01-01",
              ".inf", ".NaN", "~", "\0", "\ufeff", "\x85", "\ud7ff", "é", "[/x]", "=", "1_000", "10:20:30"]  # fmt: skip
SUFFIXES = [
    "jsonl",
    "json",
    "csv",
    "tsv",
    "txt",
    "md",
    "parquet",
    "arrow",
    "jsonl.gz",
    "jsonl.zst",
    "jsonl.xz",
    "jsonl.bz2",
    "json.gz",
    "zip",
    "tar",
    "xlsx",
    "html",
    "x",
    "",
]
MAGIC = [b"PAR1", b"ARROW1\0\0", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh9", b"PK\x03\x04", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff", b"[", b"{", b"GGUF", b"\x80\x02"]  # fmt: skip

scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(-5, 5000), st.floats(), st.text(max_size=8)
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(TEXTS[4:]) | st.sampled_from(ROW_KEYS), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip

mild = st.sampled_from([0, 1, 2, 8, 0.1, 0.5, True, False, "auto", "lora", "full", "all-linear", "1 steps", "1 epochs", "fp32", "messages", "alpaca", [], {}])  # fmt: skip


# -- grammars ----------------------------------------------------------------------------------------------------------


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths to all values inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths_of(inner, (*path, key))


@st.composite
def spoiled(draw: st.DrawFn, value: Any, names: Sequence[str] = ()) -> Any:
    """The value with one to three of its parts replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        paths = list(paths_of(value))
        if not paths or draw(st.integers(0, 30)) == 0:
            return draw(values)
        *way, last = draw(st.sampled_from(paths))
        inside = value
        for key in way:
            inside = inside[key]
        what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if what == "replace":
            inside[last] = draw(st.one_of(values, mild))
        elif what == "remove":
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw(st.sampled_from([*names, *TEXTS[4:]]))] = draw(values)
        else:
            inside.append(draw(values))
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut, with some replaced, inserted or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        piece = draw(st.binary(max_size=9) | st.sampled_from(MAGIC))
        how = draw(st.sampled_from(["cut", "insert", "overwrite", "repeat", "flip"]))
        if how == "cut":
            content = content[:at]
        elif how == "insert":
            content = content[:at] + piece + content[at:]
        elif how == "overwrite":
            content = content[:at] + piece + content[at + len(piece) :]
        elif how == "repeat":
            content = content[:at] + content[at : at + 100] * 3 + content[at:]
        elif content:
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
    return content


def spoiled_json(content: bytes, names: Sequence[str] = ()) -> st.SearchStrategy[bytes]:
    return spoiled(json.loads(content), names).map(encode) | damaged(content)


def setting_names(model: Any = Recipe) -> dict[str, list[str]]:
    """Return section -> its settings, from the schema."""
    schema = model.model_json_schema()
    return {
        "": list(schema["properties"]),
        **{name: list(one.get("properties", ())) for name, one in schema["$defs"].items()},
    }


SETTINGS = sorted({name for names in setting_names().values() for name in names})
SECTIONS = [
    "prepare",
    "sft",
    "pretrain",
    "vocab",
    "merge",
    "evaluate",
    "export",
    "synthesize",
    "sft.adapter",
    "prepare.clean",
    "prepare.dedup",
]
READS = [["check", "recipe.yaml"], ["check", "recipe.yaml", "--json"], ["plan", "recipe.yaml"], ["look", "recipe.yaml", "-n", "1"],
         ["run", "recipe.yaml", "--until", "prepare"]]  # fmt: skip
reads = st.sampled_from(READS)


@st.composite
def recipes(draw: st.DrawFn) -> Input:
    recipe = json.loads(json.dumps(RECIPE))
    if draw(st.integers(0, 3)) == 0:
        recipe[draw(st.sampled_from(SECTIONS[2:8]))] = draw(
            st.dictionaries(st.sampled_from(SETTINGS), st.one_of(mild, values), max_size=2)
        )
    recipe = draw(spoiled(recipe, SETTINGS))
    text = yaml.safe_dump(recipe, allow_unicode=True) if draw(st.booleans()) else json.dumps(recipe, ensure_ascii=False)
    override = st.tuples(st.sampled_from(SECTIONS), st.sampled_from(SETTINGS), st.one_of(mild, scalars))
    overrides = draw(st.lists(override, min_size=1, max_size=2)) if draw(st.integers(0, 3)) == 0 else []
    words = [f"{section}.{name}={value}" for section, name, value in overrides]
    return Input([*draw(reads), *map(argument, words)], {"recipe.yaml": text.encode("utf-8", "surrogatepass")})


@st.composite
def yaml_texts(draw: st.DrawFn) -> Input:
    text = "".join(
        draw(st.lists(st.sampled_from(YAML_PARTS) | st.sampled_from(SETTINGS).map("{}: ".format), max_size=30))
    )
    content = text.encode("utf-8", "surrogatepass")
    return Input(
        draw(st.sampled_from(READS[:2])),
        {"recipe.yaml": draw(damaged(content)) if draw(st.integers(0, 3)) == 0 else content},
    )


row_objects = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(ROW_KEYS), inner, max_size=5),
    max_leaves=12,
)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "x"])}, optional={"content": row_objects, "tool_calls": row_objects, "reasoning_content": row_objects}),
    max_size=5,
).map(lambda rows: {"messages": rows})  # fmt: skip
GOOD_ROW = {"instruction": "问", "input": "", "output": "答"}


@st.composite
def row_files(draw: st.DrawFn) -> Input:
    rows = draw(st.lists(spoiled(GOOD_ROW, ROW_KEYS) | turns | row_objects, max_size=6))
    rows += [{**GOOD_ROW, "instruction": f"第{number}问"} for number in range(draw(st.sampled_from([0, 8])))]
    suffix = draw(st.sampled_from(["jsonl", "jsonl", "json", "csv", "txt", "jsonl.gz"]))
    content = encode(rows) if suffix == "json" else b"\n".join(map(encode, rows))
    content = draw(damaged(content)) if draw(st.integers(0, 3)) == 0 else content
    kind = draw(st.sampled_from(["dialogues", "documents"]))
    source: Any = {
        "path": f"rows.{suffix}",
        "format": draw(st.sampled_from(["alpaca", "messages", "sharegpt", "text"])),
    }
    source = source if draw(st.integers(0, 4)) == 0 else f"rows.{suffix}"
    prepare = {kind: [source], "held_out": draw(st.sampled_from([0, 1, 0.5]))}
    recipe = recipe_with(prepare=prepare) if kind == "dialogues" else {"recipe.yaml": encode({"name": "x", "base": "base", "out": "out", "prepare": prepare})}  # fmt: skip
    return Input(
        draw(reads), {**recipe, f"rows.{suffix}": gzip.compress(content) if suffix.endswith("gz") else content}
    )


@st.composite
def data_files(draw: st.DrawFn) -> Input:
    suffix = draw(st.sampled_from(SUFFIXES))
    content = draw(st.sampled_from(MAGIC)) + draw(
        st.binary(max_size=200) | st.sampled_from([b"\n".join(map(encode, dialogues(8))), b"a,b\n1,2\n" * 9])
    )
    content = draw(damaged(content)) if draw(st.booleans()) else content
    name = f"rows.{suffix}".rstrip(".")
    kind = draw(st.sampled_from(["dialogues", "documents"]))
    return Input(
        draw(reads),
        {
            name: content,
            **({"recipe.yaml": encode({"name": "x", "base": "base", "out": "out", "prepare": {kind: name}})}),
        },
    )


GENERATE = ["generate", "--model", "base", "--prompts", "prompts.txt", "--out", "out", "--max-new-tokens", "2"]
MODEL_COMMANDS = [
    ["verify", "base"],
    ["show", "base"],
    ["merge", "--base", "base", "--adapter", "adapter", "--out", "out"],
    ["convert", "base", "--to", "gguf", "--out", "out"],
    ["convert", "base", "--to", "pth", "--out", "out"],
    ["convert", "base", "--to", "fp8", "--out", "out"],
    [*GENERATE, "--template", "chatml"],
    [*GENERATE, "--adapter", "adapter"],
    [
        "evaluate",
        "--model",
        "base",
        "--task",
        "bits_per_byte",
        "--data",
        "data.jsonl",
        "--out",
        "out",
        "--limit",
        "2",
        "--template",
        "chatml",
    ],
    ["plan", "recipe.yaml"],
    ["check", "recipe.yaml"],
    ["tokenizer", "report", "--base", "base", "--text", "prompts.txt"],
    ["tokenizer", "extend", "--base", "base", "--corpus", "prompts.txt", "--pieces", "3", "--out", "out"],
]
model_commands = st.sampled_from(MODEL_COMMANDS)


def with_header(content: bytes, header: bytes, length: int | None = None) -> bytes:
    size = int.from_bytes(content[:8], "little")
    return (len(header) if length is None else length).to_bytes(8, "little") + header + content[8 + size :]


@st.composite
def tensor_headers(draw: st.DrawFn, models: Path) -> Input:
    name = draw(st.sampled_from(["base/model.safetensors", "adapter/adapter_model.safetensors"]))
    content = (models / name).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    odd = {"dtype": st.sampled_from([*safetensors_io.ITEM_BYTES, "F4", "", None, 3])}
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(list(header)))
        change = draw(
            st.one_of(
                values,
                st.fixed_dictionaries({}, optional={**odd, "shape": st.lists(scalars, max_size=3), "data_offsets": st.lists(scalars, max_size=3)}).map(
                    lambda new, key=key: {**header[key], **new} if isinstance(header[key], dict) else new
                ),
            )
        )  # fmt: skip
        header[draw(st.sampled_from([key, key, key.replace(".1.", ".7."), "../x"]))] = change
    length = draw(st.none() | st.sampled_from([0, 1, 1 << 20, 1 << 40, (1 << 64) - 1]))
    new = with_header(content, encode(header), length) if draw(st.integers(0, 3)) else draw(damaged(content))
    return Input(draw(model_commands), {name: new})


CONFIG_NAMES = ["quantization_config", "text_config", "rope_scaling", "rope_parameters", "auto_map", "num_hidden_layers", "layer_types", "sliding_window", "num_local_experts", "tie_word_embeddings"]  # fmt: skip


@st.composite
def configs(draw: st.DrawFn, models: Path) -> Input:
    name = draw(st.sampled_from(["base/config.json", "base/config.json", "base/generation_config.json"]))
    return Input(draw(model_commands), {name: draw(spoiled_json((models / name).read_bytes(), CONFIG_NAMES))})


@st.composite
def adapter_configs(draw: st.DrawFn, models: Path) -> Input:
    name = "adapter/adapter_config.json"
    command = draw(
        st.sampled_from([command for command in MODEL_COMMANDS if "adapter" in command] + [["verify", "adapter"], ["show", "adapter"]])
    )  # fmt: skip
    return Input(
        command, {name: draw(spoiled_json((models / name).read_bytes(), ["rank_pattern", "use_dora", "use_rslora"]))}
    )


@st.composite
def tokenizers(draw: st.DrawFn, models: Path) -> Input:
    name = draw(
        st.sampled_from(
            [
                "tokenizer.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
                "added_tokens.json",
                "special_tokens_map.json",
            ]
        )
    )
    file = models / "base" / name
    if name.endswith(".jinja"):
        content = draw(st.sampled_from(["{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages[0]", "{{ raise_exception('[/x]') }}", "{{ 1/0 }}", "{% include '/etc/passwd' %}", ""])).encode()  # fmt: skip
    else:
        content = draw(
            spoiled_json(
                file.read_bytes() if file.exists() else b'{"<|im_end|>": 2}',
                ["normalizer", "pre_tokenizer", "chat_template"],
            )
        )
    return Input(draw(model_commands), {f"base/{name}": content})


RUN_COMMANDS = [["run", "recipe.yaml"], ["run", "recipe.yaml", "--verify"], ["run", "recipe.yaml", "--from", "sft", "--again"], ["check", "recipe.yaml"], ["show", "out"],
                ["show", "out/sft"], ["verify", "out/sft"], ["verify", "out/merge"], ["look", "recipe.yaml", "-n", "1"], ["merge", "--base", "base", "--adapter", "out/sft", "--out", "out/again"],
                ["generate", "--model", "out/sft", "--prompts", "prompts.txt", "--out", "out/answers", "--max-new-tokens", "2"]]  # fmt: skip


@st.composite
def records(draw: st.DrawFn, models: Path) -> Input:
    """A finished or an interrupted run, of which one file is damaged."""
    out = models / "run" / "out"
    files = sorted(file for file in out.rglob("*") if file.is_file() and file.suffix in (".json", ".jsonl", ".yaml"))
    file = draw(st.sampled_from(files))
    content = file.read_bytes()
    if file.suffix == ".json":
        content = draw(spoiled_json(content))
    elif file.suffix == ".jsonl" and content.strip():
        lines = content.splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        content = b"\n".join([*lines[:at], draw(spoiled_json(lines[at])), *lines[at + 1 :]])
    else:
        content = draw(damaged(content))
    return Input(draw(st.sampled_from(RUN_COMMANDS)), {f"out/{file.relative_to(out)}": content})


def argument(text: str) -> str:
    """The text as the system passes it to a command: without NUL, lone surrogates as bytes."""
    return text.replace("\0", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")


PLAUSIBLE = [
    "base",
    "adapter",
    "recipe.yaml",
    "data.jsonl",
    "prompts.txt",
    "out",
    "run/out",
    "run/out/sft",
    "hf",
    "gguf",
    "bits_per_byte",
    "chatml",
]


def all_parsers() -> list[tuple[list[str], argparse.ArgumentParser]]:
    """Return (words, parser) of every command and task."""
    found: list[tuple[list[str], argparse.ArgumentParser]] = []

    def walk(words: list[str], parser: argparse.ArgumentParser) -> None:
        inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for action in inner:
            for name, one in action.choices.items():
                walk([*words, name], one)
        if not inner:
            found.append((words, parser))

    walk([], cli_parser.make_parser())
    return found


@st.composite
def command_lines(draw: st.DrawFn, parsers: list[tuple[list[str], argparse.ArgumentParser]]) -> Input:
    words, parser = draw(st.sampled_from(parsers))
    command = list(words)
    word = st.sampled_from(PLAUSIBLE) | st.sampled_from(TEXTS)
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or not (action.required or draw(st.integers(0, 3)) == 0):
            continue
        if action.dest in ("web", "run", "endpoint"):  # a server, other commands, a network
            continue
        amount = 0 if action.nargs == 0 else action.nargs if isinstance(action.nargs, int) else 1
        if action.dest == "out":
            value = ["out"]
        elif action.type is not None:
            value = [str(draw(st.sampled_from(NUMBERS) | st.integers(-3, 99))) for _ in range(amount)]
        elif action.choices:
            value = [str(draw(st.sampled_from(list(action.choices)) | word)) for _ in range(amount)]
        else:
            value = [draw(word) for _ in range(amount)]
        if action.option_strings and amount == 1:
            command.append(f"{action.option_strings[-1]}={value[0]}" if action.option_strings[-1].startswith("--") else f"{action.option_strings[0]}{value[0]}")  # fmt: skip
        else:
            command += [*action.option_strings[-1:], *value]
    return Input(list(map(argument, command)), dict(recipe_with()))


typed = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["max_new_tokens", "temperature", "top_p", "top_k", "seed", "repetition_penalty", "beams", "min_new_tokens", "x", ""]), scalars
        ).map(lambda pair: f"/set {pair[0]} {pair[1]}"),
        st.sampled_from(["/retry", "/clear", "/thinking", "/help", "/system", "/save", "/save out", "/save base/config.json", "/save /", "/save [/x]", "/save a/b", "你好"]),
        st.sampled_from(TEXTS).map("/system {}".format),
        st.sampled_from(TEXTS),
    ),
    max_size=6,
)  # fmt: skip


@st.composite
def conversations(draw: st.DrawFn) -> Input:
    lines = "\n".join(["/set max_new_tokens 2", *draw(typed)]) + "\n"
    return Input(["chat", "base", "--template", "chatml"], lines=lines)


CHAT = {"model": "m", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1, "stop": ["x"], "stream": False,
        "repetition_penalty": 1.1, "n": 1, "stream_options": {"include_usage": True}}  # fmt: skip
TEXT = {"model": "m", "prompt": "你好", "max_tokens": 2}


@st.composite
def requests(draw: st.DrawFn) -> Input:
    body = st.one_of(
        spoiled_json(encode(CHAT), ["tools", "logprobs", "response_format", "max_completion_tokens"]).map(lambda one: ("/v1/chat/completions", one)),
        spoiled_json(encode(TEXT), ["echo", "user", "suffix"]).map(lambda one: ("/v1/completions", one)),
        st.tuples(st.sampled_from(["/v1/models", "/", "/v1/x", "/v1/chat/completions/"]), st.binary(max_size=9)),
    )  # fmt: skip
    return Input([], requests=draw(st.lists(body, min_size=1, max_size=4)))


# -- the storm ---------------------------------------------------------------------------------------------------------


def grammars(models: Path) -> dict[str, tuple[st.SearchStrategy[Input], float]]:
    """Return kind -> (its inputs, its share of all)."""
    return {
        "recipes": (recipes(), 0.16),
        "yaml": (yaml_texts(), 0.10),
        "rows": (row_files(), 0.14),
        "data files": (data_files(), 0.08),
        "safetensors headers": (tensor_headers(models), 0.08),
        "config.json": (configs(models), 0.08),
        "adapter_config.json": (adapter_configs(models), 0.06),
        "tokenizer files": (tokenizers(models), 0.06),
        "records of a run": (records(models), 0.06),
        "command lines": (command_lines(all_parsers()), 0.08),
        "conversations": (conversations(), 0.03),
        "requests": (requests(), 0.07),
    }


def storm(sandbox: Sandbox, kind: str, inputs: st.SearchStrategy[Input], count: int, start: int) -> dict[str, Any]:
    """Run `count` inputs of a kind; return counts of exit codes, the extremes, and one example of each fault."""
    codes: Counter[str] = Counter()
    faults: dict[str, dict[str, Any]] = {}
    most = SimpleNamespace(seconds=0.0, memory=0)
    if kind == "requests" and sandbox.backend is None:
        sandbox.open_backend()

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def each(one: Input) -> None:
        outcome = sandbox.run(one)
        codes[str(outcome.code)] += 1
        most.seconds, most.memory = max(most.seconds, outcome.seconds), max(most.memory, outcome.memory)
        if outcome.fault:
            known = faults.setdefault(outcome.fault, {"count": 0, **one.describe(), "text": outcome.text[-3000:]})
            known["count"] += 1

    each()
    return {
        "inputs": sum(codes.values()),
        "exit_codes": dict(sorted(codes.items())),
        "most_cpu_seconds": round(most.seconds, 1),
        "most_megabytes": most.memory >> 20,
        "faults": faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=6000)
    parser.add_argument("--kinds", nargs="*", help="only these kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out.absolute() if args.out else None
    found: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        sandbox = Sandbox(Path(folder))
        for kind, (inputs, share) in grammars(sandbox.models).items():
            if args.kinds and kind not in args.kinds:
                continue
            found[kind] = storm(sandbox, kind, inputs, max(1, round(args.inputs * share)), args.seed)
            print(kind, {**found[kind], "faults": len(found[kind]["faults"])}, flush=True)
            for name, fault in found[kind]["faults"].items():
                print("  FAULT", fault["count"], name, flush=True)
            if out:
                _write(out, found, args.seed, began)
    if any(kind["faults"] for kind in found.values()):
        sys.exit(1)


def _write(out: Path, kinds: dict[str, Any], start: int, began: float) -> None:
    import subprocess

    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    out.write_text(
        json.dumps(
            {
                "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
                "cpus": os.cpu_count(),
                "python": sys.version.split()[0],
                "versions": artifact.versions(),
                "seed": start,
                "seconds": round(time.monotonic() - began),
                "limits": {"cpu_seconds": SECONDS, "gigabytes": MEMORY >> 30},
                "inputs": sum(kind["inputs"] for kind in kinds.values()),
                "faults": sum(len(kind["faults"]) for kind in kinds.values()),
                "kinds": kinds,
            },
            indent=1,
            ensure_ascii=True,
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
