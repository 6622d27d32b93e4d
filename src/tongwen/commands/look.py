"""look: samples as the model will see them, what it learns coloured, in the terminal or as a page to send around."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core.errors import RecipeError
from tongwen.core.i18n import language, say
from tongwen.data.token_store import TokenStore
from tongwen.recipe.schema import Recipe
from tongwen.workflows.data_preview import coloured, key, pieces
from tongwen.workflows.stage_inputs import base_of_stage
from tongwen.workflows.tokenized_data import RecordEncoder, look_ahead, read_dialogues, read_documents, say_mask

STYLE = """
:root{--ink:#1c1e21;--soft:#6b7280;--line:#e3e6ea;--wash:#f6f8f9;--paper:#fff;--learn:#bbf7d0;--stop:#fde68a}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa3ad;--line:#2c3238;--wash:#1c2024;--paper:#15181b;--learn:#14532d;--stop:#854d0e}}
body{margin:0 auto;max-width:56rem;padding:2rem 1rem 4rem;background:var(--paper);color:var(--ink);
 font:16px/1.75 system-ui,"PingFang SC","Noto Sans CJK SC","Microsoft YaHei",sans-serif}
h1{font-size:1.6rem;margin:0}.soft,.p{color:var(--soft)}.key{margin:1rem 0 0}
.key span{margin-right:.6rem;padding:.1rem .5rem;border-radius:.3rem;border:1px solid var(--line)}
section{border:1px solid var(--line);border-radius:.6rem;margin:1.2rem 0;overflow:hidden}
h2{display:flex;justify-content:space-between;gap:1rem;font-size:.85rem;font-weight:500;color:var(--soft);margin:0;padding:.5rem 1rem;
 background:var(--wash);border-bottom:1px solid var(--line);overflow-wrap:anywhere}
div{padding:.8rem 1rem;white-space:pre-wrap;overflow-wrap:anywhere}
div span{border-radius:.2rem;box-shadow:inset 0 0 0 1px #8883;padding:1px 1px}.l{background:var(--learn)}.s{background:var(--stop)}
"""


def run(recipe: Recipe, count: int, page: str) -> int:
    """Encode what the recipe trains on and show the first `count` samples of each training stage, token by token."""
    if not recipe.training:
        raise RecipeError(
            say("there is nothing to look at: no training stage", "没有可查看的内容：没有训练阶段"),
            place=recipe.name,
            remedy="sft: {}",
        )
    found = {}
    if recipe.pretrain:
        reader = read_documents(base_of_stage(recipe, "pretrain", finished=True), recipe.pretrain)
        place = Path(page) if not recipe.sft else Path(page).with_suffix(".pretrain.html")
        found["pretrain"] = _show(recipe, reader, reader.end, "", count, str(place) if page else "")
    if recipe.sft:
        base = base_of_stage(recipe, "sft", finished=True)
        dialogues = read_dialogues(base, recipe.sft)
        stop = int(dialogues.tokenizer.convert_tokens_to_ids(dialogues.template.stop))
        found["sft"] = _show(recipe, dialogues, stop, recipe.sft.template, count, page)
    console.emit({**list(found.values())[-1], "stages": found})
    return 0


def _show(recipe: Recipe, reader: RecordEncoder, stop: int, template: str, count: int, page: str) -> dict[str, Any]:
    """One stage's samples. stop: the id that ends them."""
    tokenizer = reader.tokenizer
    lesson = look_ahead(recipe, reader)
    store, mask, rejected = lesson.store, lesson.mask, lesson.rejected
    shown = range(min(count, len(store)))
    said = say_mask(mask)
    if page:
        sections = "".join(
            f"<section><h2><span>{html.escape(str(store.origin(index)))}</span><span>{store.lengths[index]} token</span></h2>"
            f"<div>{coloured(tokenizer, store, index, stop)}</div></section>"
            for index in shown
        )
        Path(page).write_text(
            f'<!doctype html><html lang="{"zh-CN" if language() == "zh" else "en"}"><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{html.escape(recipe.name)}</title>'
            f"<style>{STYLE}</style><h1>{html.escape(recipe.name)}</h1>"
            f"<p class=soft>{html.escape(recipe.base)}{html.escape(f' · {template}' if template else '')}<br>{said}</p>"
            f"<p class=key>{key()}</p>{sections}</html>",
            encoding="utf-8",
        )
        console.good(page)
    else:
        for index in shown:
            console.header(str(store.origin(index)), f"{store.lengths[index]} token")
            _print(tokenizer, store, index, stop)
    console.tell(f"\n{said}")
    if rejected:
        first = "{file}:{row}: {rule}".format(**rejected[0])
        console.notice(
            say(
                f"{len(rejected)} samples would not be trained, the first: {first}",
                f"{len(rejected)} 个样本不会参与训练，第一个：{first}",
            )
        )
    return {"mask": mask, "ledger": lesson.ledger.to_dict(), "rejected": len(rejected)}


def _print(tokenizer: Any, store: TokenStore, index: int, stop: int) -> None:
    from rich.text import Text

    shown = Text()
    for text, token, learned in pieces(tokenizer, store, index):
        shown.append(text, ("black on yellow" if token == stop else "black on green") if learned else "dim")
    if console.SCREEN.speaks:
        console.SCREEN.console.print(shown)
