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
        pages = {HERE / f"cli{ending}.md": cli_page(), HERE / f"recipe{ending}.md": recipe_page()}
        pages[older] = with_failures(older)
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
