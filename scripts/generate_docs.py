"""Generate pages from the code: docs/cli*.md from `--help`, docs/recipe*.md from the schema, docs/families*.md from the family
facts, docs/memory*.md from the estimates of `tongwen plan`, the table of failures in docs/from-older-projects*.md, the memory
table of the READMEs, and recipes/ from `tongwen init`.

`python scripts/generate_docs.py` writes them; with `--check` it only lists stale ones, and fails if there are any.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tongwen.core.i18n import N_, _, use_language

DOCS = Path(__file__).parents[1] / "docs"
QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
LLAMA = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
# Published shapes: hidden, intermediate, layers, heads, tied head.
MODELS = {
    "Qwen3-0.6B": (QWEN3, 1024, 3072, 28, 16, True),
    "Qwen3-1.7B": (QWEN3, 2048, 6144, 28, 16, True),
    "Qwen3-4B": (QWEN3, 2560, 9728, 36, 32, True),
    "Qwen3-8B": (QWEN3, 4096, 12288, 36, 32, False),
    "Qwen3-32B": (QWEN3, 5120, 25600, 64, 64, False),
    "Llama-3.1-70B": (LLAMA, 8192, 28672, 80, 64, False),
}
LENGTHS = (2048, 8192)


def main() -> int:
    os.environ["COLUMNS"] = "80"
    from tongwen.commands.init import STARTS, render

    recipes = DOCS.parent / "recipes"
    recipes.mkdir(exist_ok=True)
    stale = [str(file) for file in recipes.iterdir() if file.stem not in STARTS]
    for language, ending in (("en", ""), ("zh", "_zh")):
        os.environ["TONGWEN_LANG"] = language
        older = DOCS / f"from-older-projects{ending}.md"
        made = {"cli": cli_page(), "recipe": recipe_page(), "families": families_page(), "memory": memory_page()}
        pages = {DOCS / f"{name}{ending}.md": text for name, text in made.items()} | {older: with_failures(older)}
        readme = DOCS.parent / f"README{ending}.md"
        pages[readme] = with_memory(readme, made["memory"])
        if language == "en":
            pages |= {recipes / f"{name}.yaml": render(name) for name in STARTS}
        for file, text in pages.items():
            if file.is_file() and file.read_text(encoding="utf-8") == text:
                continue
            stale.append(str(file.relative_to(DOCS.parent)))
            if "--check" not in sys.argv:
                file.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"stale: {', '.join(stale)}; run: make docs", file=sys.stderr)
        return 1
    return 0


def with_twin(name: str, page: str) -> str:
    """Return the page with a link to the same page in the other language, below its title."""
    title, rest = page.split("\n", 1)
    other, ending = ("zh", "_zh") if os.environ["TONGWEN_LANG"] == "en" else ("en", "")
    with use_language(other):
        return f"{title}\n\n[{_('English')}]({name}{ending}.md)\n{rest}"


def families_page() -> str:
    """Return the page of family features; tests/laws/test_families.py and tests/export/test_gguf.py verify them."""
    from tongwen.core.model_families import FAMILIES
    from tongwen.export.gguf_architectures import ARCHITECTURES

    heads = (
        _("family"),
        _("models"),
        _("LoRA, full"),
        "QLoRA",
        _("packed"),
        _("plain text"),
        _("merge"),
        "GGUF",
        "vLLM",
    )
    rows, notes = [heads, ("---",) * len(heads)], []
    for name, family in FAMILIES.items():
        for about, limit in (
            (_("packed"), family.padded),
            (_("plain text"), family.dialogues_only),
        ):
            if limit:
                notes.append(f"- `{name}`, {about}: {_(limit)}")
        merged = _("in memory") if family.experts else _("streamed")
        packed, text = ("no" if family.padded else "✓"), ("no" if family.dialogues_only else "✓")
        vllm = _("listed") if family.vllm else "no"
        rows.append(
            (f"`{name}`", family.models, "✓", "✓", packed, text, merged, "✓" if name in ARCHITECTURES else "no", vllm)
        )
    others = ", ".join(f"`{name}`" for name in ARCHITECTURES if name not in FAMILIES)
    notes.append(_("- GGUF is verified for these families, too: {others}").format(others=others))
    table = "\n".join(f"| {' | '.join(row)} |".replace("| no ", _("| no ")) for row in rows)
    page = _(FAMILIES_PAGE).format(table=table, notes="\n".join(notes)) + architectures_section()
    return with_twin("families", page)


def architectures_section() -> str:
    """Return the part of the page that bench/families.py measured: what each architecture of transformers does."""
    found = json.loads((DOCS.parent / "bench" / "results" / "families.json").read_text(encoding="utf-8"))
    by_outcome: dict[str, list[str]] = {"trained": [], "refused": [], "not": [], "failed": []}
    for kind, one in found["architectures"].items():
        outcome = one["outcome"].split()[0]
        row = f"`{kind}`"
        if outcome == "trained":
            packed = (
                _("packed") if one["batches"] == "packed" else _("padded: {why}").format(why=reason(one["why_padded"]))
            )
            row = f"| {row} | {packed} | {one['merge_difference']:.1e} | {'✓' if one['gguf'] == 'same' else '—'} |"
        elif outcome in ("refused", "failed"):
            row = f"| {row} | {one['outcome'].split()[-1]} | {reason(one['message'])} |"
        by_outcome[outcome].append(row)
    trained = [one for one in found["architectures"].values() if one["outcome"] == "trained"]
    return _(ARCHITECTURES).format(
        version=found["versions"]["transformers"],
        total=found["of"],
        tried=found["counts"]["tried"],
        trained=len(trained),
        worst=f"{max(one['merge_difference'] for one in trained):.1e}",
        table="\n".join(by_outcome["trained"]),
        refused="\n".join(by_outcome["refused"] + by_outcome["failed"]),
        unbuilt=_(", ").join(by_outcome["not"]),
    )


# The start of a message, and what the page says in its place.
REASONS = {
    "it has its own attention": N_("it has its own attention implementation"),
    "its layers carry a state": N_("its layers carry a state from token to token"),
    "ALiBi adds": N_("ALiBi adds a bias by absolute distance"),
    "soft-capped": N_("soft-capped attention scores"),
    "packed documents break": N_("its code does not accept packed documents"),
    "its attention has an argument": N_("its attention has an argument of its own"),
    "packed attention changes": N_("packed attention changes its scores"),
    "documents in one pack": N_("packed documents see each other"),
    "does not predict": N_("it does not predict the next token of a text"),
    "cannot read a text alone": N_("it needs a picture or another input beside the text"),
    "depends on a later token": N_("the score of a token depends on later tokens"),
    "get no gradient": N_("tensors that should be trained get no gradient"),
}


def reason(message: str) -> str:
    """Return the reason in a message, in the page's language."""
    known = next((text for start, text in REASONS.items() if start in message), "")
    return _(known) if known else message.splitlines()[0].partition(": ")[2].replace("|", "\\|")


ARCHITECTURES = N_("""
## Every architecture in transformers

`make families` builds a tiny random model of each architecture that transformers {version} opens as a language model, alone
or with towers for pictures and sound, and runs the commands that a user types (`bench/families.py`, results in
`bench/results/families.json`, each outcome with the commit at which it was measured). Of {total} architectures {tried} could be
built, and {trained} of these train. Each of these was audited, trained with LoRA on all linear layers, stopped after its first step and continued to the bit, and merged. Its merged logits are within
{worst} of peft's live model, and `tongwen generate` writes the greedy text that plain transformers writes. GGUF ✓: llama.cpp
writes the same greedy tokens.

| model type | batches | merge: largest difference | GGUF |
| --- | --- | --- | --- |
{table}

These are refused, before anything is trained. `check` reads the base's config.json; `run` asks the model itself.

| model type | refused by | why |
| --- | --- | --- |
{refused}

These could not be built at tiny size, so nothing is known about them: {unbuilt}.
""")


FAMILIES_PAGE = N_("""# Model families

Made from `src/tongwen/core/model_families.py` by `make docs`; do not edit. Each ✓ is tested at tiny size: the model is
trained in full on plain text, with LoRA and with QLoRA on dialogues, its adapter is merged, the merged model computes what base and adapter compute together,
and it answers. Packed: several samples lie in one row without seeing each other; where the table says no, batches are padded.
GGUF: llama.cpp gives the same greedy text. vLLM needs a GPU and was not run: "listed" means that its documentation lists it.

{table}

{notes}

A family that is not listed can be trained if transformers itself supports it: the audit at the start proves on its first
micro-batch that every trained tensor learns and that packed samples do not see each other. GGUF is then refused by name,
before anything is trained: by `check` where the base is a folder, by `plan` and `run` wherever it is.

- **ChatGLM-6B** needs no remote code: `import tongwen.model.families.chatglm` is all that transformers needs to open what
  was trained here. The first checkpoints, with 150,528 tokens, open too. ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B in their
  first form also say `model_type: chatglm` and are refused by name; take the `-hf` form of GLM-4.
- **Baichuan-7B** is a LLaMA with its three projections in one matrix: `tongwen convert Baichuan-7B --to hf --out
  Baichuan-7B-llama`. Baichuan-13B (ALiBi) and Baichuan2 (a normalised head) are refused by name.
- **The first LLaMA conversions** say that a text ends with token 1 and is padded with -1, and name no special tokens. They
  are trained as intended, and tongwen reports it; their files stay unchanged.
""")


def cli_page() -> str:
    from tongwen.cli.parser import make_parser

    parser = make_parser()
    parts = [
        _("# Commands"),
        "",
        _("Made from `--help` by `make docs`; do not edit."),
    ]
    parts += ["", "```", parser.format_help().replace(f"{DOCS.parent}{os.sep}", "").rstrip(), "```"]
    for action in parser._subparsers._group_actions if parser._subparsers else []:
        assert isinstance(action, argparse._SubParsersAction)
        for name, command in action.choices.items():
            parts += ["", f"## tongwen {name}", "", "```", command.format_help().rstrip(), "```"]
    return with_twin("cli", "\n".join(parts) + "\n")


def recipe_page() -> str:
    from tongwen.recipe.docs import to_markdown

    return with_twin("recipe", to_markdown())


def with_memory(file: Path, page: str) -> str:
    """Return the README with the table of that page."""
    start, end = "<!-- memory -->\n", "<!-- /memory -->"
    text = file.read_text(encoding="utf-8")
    head, _unused, rest = text.partition(start)
    table = "".join(line for line in page.splitlines(keepends=True) if line.startswith("|"))
    return head + start + table + end + rest.partition(end)[2]


def with_failures(file: Path) -> str:
    """Return the page with a new table of failures."""
    from tongwen.migrate.failures import failures

    start, end = "<!-- failures -->\n", "<!-- /failures -->"
    text = file.read_text(encoding="utf-8")
    head, rest = text.split(start)
    rows = [_("| | what was seen | why | here |"), "|---|---|---|---|"]
    for one in failures().values():
        cells = (one.id, *(_(pair).replace("|", "\\|") for pair in (one.symptom, one.cause, one.handling)))
        rows.append(f"| {' | '.join(cells)} |")
    return f"{head}{start}\n" + "\n".join(rows) + f"\n\n{end}{rest.split(end)[1]}"


def memory_page() -> str:

    names = {"lora": "LoRA", "qlora": "QLoRA (nf4)", "full": _("full")}
    head = [_("model"), *(f"{name}, {length}" for name in names.values() for length in LENGTHS)]
    rows = [memory_row(name, names) for name in MODELS]
    table = "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *rows])
    page = _("""# Memory against plan

Made by the code of `tongwen plan` with `make docs`; do not edit.

GB of one GPU: bf16, one document of 2,048 or 8,192 tokens at a time, all of them learned, activation checkpointing on, LoRA
of rank 16 on all linear layers, AdamW, and 0.6 GB for CUDA itself. The same estimate was compared with real runs on
a CPU (`bench/plan_memory.py`) and, without checkpointing, on an H100: the plan gives 61.1 GB (8B, LoRA), 21.8 (1B, LoRA) and
47.6 (1B, full) without CUDA's share; the measured peaks were 56.3, 20.6 and 46.5.

{table}

`tongwen plan RECIPE --gpu 24GB` uses your own recipe and data, splits the sum by purpose, and says what to change when it
does not fit.
""").format(table=table)
    return with_twin("memory", page)


def memory_row(name: str, methods: Iterable[str]) -> str:
    """A check computes only the first number again; all of them take minutes (--check --all)."""
    file = DOCS / "memory.md"
    cells = [(method, length) for method in methods for length in LENGTHS]
    numbers = [""] * len(cells)
    if "--check" in sys.argv and "--all" not in sys.argv:
        row = next(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |"))
        numbers = [number.strip() for number in row.split("|")[2:-1]]
        cells = cells[:1] if name == next(iter(MODELS)) else []
    for place, (method, length) in enumerate(cells):
        numbers[place] = f"{peak(name, method, length) / 1e9:.1f}"
    return f"| {name} | {' | '.join(numbers)} |"


@cache
def peak(name: str, method: str, length: int) -> int:
    """Return the estimated peak in bytes."""
    import torch
    from transformers import LlamaConfig, Qwen3Config

    from tongwen.recipe.training import AdapterConfig
    from tongwen.workflows.training.memory_estimate import MicroBatch, TrainingSetup, estimate_memory

    family, hidden, intermediate, layers, heads, tied = MODELS[name]
    config = (Qwen3Config if family is QWEN3 else LlamaConfig)(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
        **family,
    )
    adapter = AdapterConfig(method=method)
    setting = TrainingSetup(adapter, frozenset({adapter.part}), torch.bfloat16, "cuda", checkpointing=True)
    return estimate_memory(config, setting, MicroBatch((length,), length, 2)).bytes["peak"]


if __name__ == "__main__":
    raise SystemExit(main())
