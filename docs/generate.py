"""Write what is made from the code: docs/cli*.md from `--help`, docs/recipe*.md from the schema, the table of failures in
docs/from-older-projects*.md, and recipes/ from `tongwen init`.

`python docs/generate.py` writes them; with `--check` it only says which are stale, and fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    os.environ["COLUMNS"] = "80"
    from tongwen.stages.init import STARTS, render

    recipes = HERE.parent / "recipes"
    recipes.mkdir(exist_ok=True)
    stale = [str(file) for file in recipes.iterdir() if file.stem not in STARTS]
    for language, ending in (("en", ""), ("zh", "_zh")):
        os.environ["TONGWEN_LANG"] = language
        older = HERE / f"from-older-projects{ending}.md"
        made = {"cli": cli_page(), "recipe": recipe_page(), "families": families_page()}
        pages = {HERE / f"{name}{ending}.md": text for name, text in made.items()} | {older: with_failures(older)}
        if language == "en":
            pages |= {recipes / f"{name}.yaml": render(name) for name in STARTS}
        for file, text in pages.items():
            if file.is_file() and file.read_text(encoding="utf-8") == text:
                continue
            stale.append(str(file.relative_to(HERE.parent)))
            if "--check" not in sys.argv:
                file.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"stale: {', '.join(stale)}; run: make docs", file=sys.stderr)
        return 1
    return 0


def families_page() -> str:
    """What each family can do, from its facts; tests/test_families.py and tests/test_gguf.py hold them to it."""
    from tongwen.families import FAMILIES
    from tongwen.language import say

    heads = (
        say("family", "系列"),
        say("models", "模型"),
        say("LoRA, full", "LoRA、全参数"),
        "QLoRA",
        say("packed", "打包"),
        say("plain text", "纯文本"),
        say("merge", "合并"),
        "GGUF",
        "vLLM",
    )
    rows, notes = [heads, ("---",) * len(heads)], []
    for name, family in FAMILIES.items():
        for about, limit in (
            (say("packed", "打包"), family.padded),
            (say("plain text", "纯文本"), family.dialogues_only),
        ):
            if limit:
                notes.append(f"- `{name}`, {about}: {say(*limit)}")
        merged = say("in memory", "内存中") if family.experts else say("streamed", "流式")
        packed, text = ("no" if family.padded else "✓"), ("no" if family.dialogues_only else "✓")
        vllm = say("listed", "列出") if family.vllm else "no"
        rows.append((f"`{name}`", family.models, "✓", "✓", packed, text, merged, "✓" if family.gguf else "no", vllm))
    table = "\n".join(f"| {' | '.join(row)} |".replace("| no ", say("| no ", "| 否 ")) for row in rows)
    return say(FAMILIES_EN, FAMILIES_ZH).format(table=table, notes="\n".join(notes))


FAMILIES_EN = """# Model families

Made from `src/tongwen/families.py` by `make docs`; do not edit. Each ✓ is what a test does at tiny size: the model is
trained in full on plain text, with LoRA and with QLoRA on dialogues, its adapter is merged, the merged model computes what base and adapter compute together,
and it answers. Packed: several samples lie in one row without seeing each other; where it says no, batches are padded.
GGUF: llama.cpp gives the same text, greedily. vLLM needs a GPU and was not run: "listed" is what its own documentation says.

{table}

{notes}

A family that is not listed is trained when transformers itself knows it: the audit at the start proves on its first
micro-batch that every trained tensor learns and that packed samples do not see each other. GGUF is then refused by name.

- **ChatGLM-6B** needs no remote code: `import tongwen.model.families.chatglm` is all that transformers needs to open what
  was trained here. The first checkpoints, with 150,528 tokens, open too. ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B in their
  first form also say `model_type: chatglm` and are refused by name; take the `-hf` form of GLM-4.
- **Baichuan-7B** is a LLaMA with its three projections in one matrix: `tongwen convert Baichuan-7B --to hf --out
  Baichuan-7B-llama`. Baichuan-13B (ALiBi) and Baichuan2 (a normalised head) are refused by name.
- **The first LLaMA conversions** say that a text ends with token 1 and is padded with -1, and name no special tokens. They
  are trained as they were meant, and it is said; their files stay as they are.
"""
FAMILIES_ZH = """# 模型系列

由 `make docs` 从 `src/tongwen/families.py` 生成，请勿手改。每个 ✓ 都有微型模型的测试：在纯文本上全参数训练，在对话上用 LoRA 与 QLoRA 训练，合并适配器，
合并结果与“底座 + 适配器”的计算一致，并能回答。打包：多个样本在同一行而互不可见；写“否”的使用填充批次。GGUF：llama.cpp
贪心解码给出相同文本。vLLM 需要 GPU，未实际运行：“列出”仅表示其文档列有该架构。

{table}

{notes}

未列出的系列，只要 transformers 本身支持即可训练：开始时的审计会在首个微批上证明每个被训练的张量都会学习、打包的样本互不可见。
其 GGUF 会按名称拒绝。

- **ChatGLM-6B** 不需要远程代码：`import tongwen.model.families.chatglm` 之后 transformers 即可打开这里训练的模型。最早的
  150,528 词表检查点同样可用。ChatGLM2-6B、ChatGLM3-6B 与最初形式的 GLM-4-9B 也自称 `model_type: chatglm`，会按名称拒绝；请用
  GLM-4 的 `-hf` 版本。
- **Baichuan-7B** 就是把三个投影合为一个矩阵的 LLaMA：`tongwen convert Baichuan-7B --to hf --out Baichuan-7B-llama`。
  Baichuan-13B（ALiBi）与 Baichuan2（归一化的输出层）会按名称拒绝。
- **最早的 LLaMA 转换版**声称文本以 token 1 结束、以 -1 填充，且没有特殊符号的名字。它们会按本意训练并说明；文件保持原样。
"""


def cli_page() -> str:
    from tongwen.cli import make_parser
    from tongwen.language import say

    parser = make_parser()
    parts = [
        say("# Commands", "# 命令"),
        "",
        say("Made from `--help` by `make docs`; do not edit.", "由 `make docs` 从 `--help` 生成，请勿手改。"),
    ]
    parts += ["", "```", parser.format_help().rstrip(), "```"]
    for action in parser._subparsers._group_actions if parser._subparsers else []:
        assert isinstance(action, argparse._SubParsersAction)
        for name, command in action.choices.items():
            parts += ["", f"## tongwen {name}", "", "```", command.format_help().rstrip(), "```"]
    return "\n".join(parts) + "\n"


def recipe_page() -> str:
    from tongwen.recipe.pages import to_markdown

    return to_markdown()


def with_failures(file: Path) -> str:
    """The page with its table made anew."""
    from tongwen.language import say
    from tongwen.past.failures import failures

    start, end = "<!-- failures -->\n", "<!-- /failures -->"
    text = file.read_text(encoding="utf-8")
    head, rest = text.split(start)
    rows = [say("| | what was seen | why | here |", "| | 现象 | 原因 | 此处 |"), "|---|---|---|---|"]
    for one in failures().values():
        cells = (one.id, *(say(*pair).replace("|", "\\|") for pair in (one.says, one.why, one.here)))
        rows.append(f"| {' | '.join(cells)} |")
    return f"{head}{start}\n" + "\n".join(rows) + f"\n\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    raise SystemExit(main())
