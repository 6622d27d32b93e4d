"""look: samples as the model will see them, what it learns coloured, in the terminal or as a page to send around."""

from __future__ import annotations

import html
from pathlib import Path

from tongwen import console
from tongwen.data.encode import Encoder, TokenStore, check_store, encode_dialogues
from tongwen.data.ledger import Ledger
from tongwen.data.read import Rejected, read_dialogues
from tongwen.errors import RecipeError
from tongwen.language import say
from tongwen.model import dress, load
from tongwen.recipe.schema import Recipe

STYLE = (
    "body{margin:2rem auto;max-width:56rem;padding:0 1rem;font:16px/1.7 system-ui,'PingFang SC','Noto Sans CJK SC','Microsoft YaHei',sans-serif;"
    "color:#1c1e21;background:#fff}section{border:1px solid #e3e6ea;border-radius:.6rem;padding:1rem;margin:1rem 0;white-space:pre-wrap;overflow-wrap:anywhere}"
    "span{border-radius:.2rem;box-shadow:inset 0 0 0 1px #0001;padding:0 1px}.l{background:#bbf7d0}.s{background:#fde68a}.p{color:#6b7280}"
    "h2{font-size:1rem;color:#6b7280;margin:0 0 .5rem}.key span{margin-right:.8rem;padding:0 .4rem}"
    "@media(prefers-color-scheme:dark){body{background:#15181b;color:#e6e8eb}section{border-color:#2c3238}.l{background:#14532d}.s{background:#713f12}}"
)


def run(recipe: Recipe, count: int, page: str) -> int:
    """Encode the recipe's dialogues and show the first `count` samples, token by token."""
    if not (recipe.sft and recipe.prepare and recipe.prepare.dialogues):
        raise RecipeError(
            say("there are no dialogues to look at", "没有可查看的对话"), place=recipe.name, remedy="sft: {}"
        )
    tokenizer = load.load_tokenizer(load.locate(recipe.base))
    encoder = Encoder(tokenizer)
    template = dress.bind_template(recipe.sft.template, tokenizer, encoder.prefix)
    ledger, rejected = Ledger("rows", "tokens"), list[Rejected]()
    store = encode_dialogues(
        read_dialogues(recipe.prepare.dialogues, recipe.prepare.fill, Ledger("rows", "bytes"), rejected.append),
        template,
        encoder,
        recipe.sft,
        ledger,
        rejected.append,
    )
    mask = check_store(store, recipe.sft, rejected)
    shown = range(min(count, len(store)))
    stop = int(tokenizer.convert_tokens_to_ids(template.stop))
    if page:
        sections = "".join(
            f"<section><h2>{html.escape(str(store.origins[index]))} · {store.lengths[index]} token</h2>{_as_html(tokenizer, store, index, stop)}</section>"
            for index in shown
        )
        key = f"<p class=key><span class=p>{say('prompt', '提示')}</span><span class=l>{say('learned', '学习')}</span><span class=s>{say('stop token, learned', '停止符（学习）')}</span></p>"
        Path(page).write_text(
            f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(recipe.name)}</title>'
            f"<style>{STYLE}</style><h1>{html.escape(recipe.name)}</h1>{key}{sections}",
            encoding="utf-8",
        )
        console.good(page)
    else:
        for index in shown:
            console.header(str(store.origins[index]), f"{store.lengths[index]} token")
            _print(tokenizer, store, index, stop)
    console.tell(
        say(
            f"\n{mask['learned_share']:.0%} of {mask['tokens']:,} tokens are learned; {mask['stop_learned_share']:.0%} of {mask['samples']:,} samples learn to stop",
            f"\n{mask['tokens']:,} 个 token 中 {mask['learned_share']:.0%} 计入损失；{mask['samples']:,} 个样本中 {mask['stop_learned_share']:.0%} 学到停止符",
        )
    )
    if rejected:
        console.notice(
            say(
                f"{len(rejected)} samples would not be trained, the first: {rejected[0].origin}: {rejected[0].rule}",
                f"{len(rejected)} 个样本不会参与训练，第一个：{rejected[0].origin}: {rejected[0].rule}",
            )
        )
    console.emit({"mask": mask, "ledger": ledger.to_dict(), "rejected": len(rejected)})
    return 0


def pieces(tokenizer: object, store: TokenStore, index: int) -> list[tuple[str, int, bool]]:
    """(text, last id, learned) of one sample: tokens that together make whole characters are shown as one piece."""
    out: list[tuple[str, int, bool]] = []
    waiting: list[int] = []
    ids, learn = store.sample(index)
    for token, learned in zip(ids.tolist(), learn.tolist(), strict=True):
        waiting.append(token)
        text = str(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))  # type: ignore[attr-defined]
        if not text.endswith("\ufffd"):
            out.append((text, token, learned))
            waiting = []
    return out


def _as_html(tokenizer: object, store: TokenStore, index: int, stop: int) -> str:
    out = []
    for text, token, learned in pieces(tokenizer, store, index):
        kind = ("s" if token == stop else "l") if learned else "p"
        out.append(f'<span class="{kind}" title="{token}">{html.escape(text)}</span>')
    return "".join(out)


def _print(tokenizer: object, store: TokenStore, index: int, stop: int) -> None:
    from rich.text import Text

    shown = Text()
    for text, token, learned in pieces(tokenizer, store, index):
        shown.append(text, ("black on yellow" if token == stop else "black on green") if learned else "dim")
    if console.SCREEN.speaks:
        console.SCREEN.console.print(shown)
