"""look: show samples as the model will see them, with the learned tokens coloured, in the terminal or as an HTML page."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from tongwen.core import console, originals
from tongwen.core.errors import RecipeError
from tongwen.core.html import render
from tongwen.core.i18n import _, ngettext
from tongwen.data.token_store import TokenStore
from tongwen.recipe.schema import Recipe
from tongwen.workflows.data_preview import coloured, pieces, token_kinds
from tongwen.workflows.record_encoders import (
    RecordEncoder,
    make_dialogue_encoder,
    make_document_encoder,
    make_preference_encoder,
)
from tongwen.workflows.stage_inputs import TRAINING, base_of_stage
from tongwen.workflows.tokenized_data import describe_mask, encode_in_memory


def run(recipe: Recipe, count: int, page: str) -> int:
    """Encode what the recipe trains on and show the first `count` samples of each training stage, token by token."""
    if not recipe.training:
        raise RecipeError(
            _("there is nothing to look at: the recipe has no training stage"),
            place=recipe.name,
            remedy="sft: {}",
        )
    found = {}
    names = [name for name in TRAINING if name in recipe.stages]
    own = "sft" if recipe.sft else names[0]  # the stage whose page has the given name
    pages = {name: str(Path(page).with_suffix(f".{name}.html")) if page and name != own else page for name in names}
    for name in {*pages.values()} - {""}:
        originals.check_sealed(Path(name))
    if recipe.pretrain:
        reader = make_document_encoder(base_of_stage(recipe, "pretrain", finished=True), recipe.pretrain)
        found["pretrain"] = _show(recipe, reader, reader.end, "", count, pages["pretrain"])
    if recipe.sft:
        base = base_of_stage(recipe, "sft", finished=True)
        dialogues = make_dialogue_encoder(base, recipe.sft)
        stop = int(dialogues.tokenizer.convert_tokens_to_ids(dialogues.template.stop))
        found["sft"] = _show(recipe, dialogues, stop, recipe.sft.template, count, pages["sft"])
    if recipe.prefer:
        preferences = make_preference_encoder(base_of_stage(recipe, "prefer", finished=True), recipe.prefer)
        stop = int(preferences.tokenizer.convert_tokens_to_ids(preferences.template.stop))
        found["prefer"] = _show(recipe, preferences, stop, recipe.prefer.template, count, pages["prefer"])
    console.emit({**list(found.values())[-1], "stages": found})
    return 0


def _show(recipe: Recipe, reader: RecordEncoder, stop: int, template: str, count: int, page: str) -> dict[str, Any]:
    """Show one stage's samples. stop: the id that ends them."""
    tokenizer = reader.tokenizer
    data = encode_in_memory(recipe, reader)
    store, mask, rejected = data.samples, data.mask, data.rejected
    shown = range(min(count, len(store)))
    description = describe_mask(mask)
    if page:
        text = render(
            "commands/look.html.jinja",
            title=recipe.name,
            source=f"{recipe.base} · {template}" if template else recipe.base,
            mask=description,
            kinds=token_kinds(),
            samples=[
                (str(store.origin(index)), store.lengths[index], coloured(tokenizer, store, index, stop))
                for index in shown
            ],
        )
        originals.write_sealed(Path(page), text, originals.HTML)
        console.success(page)
    else:
        for index in shown:
            length = store.lengths[index]
            console.header(str(store.origin(index)), ngettext("{n} token", "{n} tokens", length).format(n=length))
            _print(tokenizer, store, index, stop)
    legend = "" if page or console.has_colour() else _("⟦…⟧: learned") + "\n"
    console.info(f"\n{legend}{description}")
    first = {one["reason"]: one for one in reversed(rejected)}
    for reason, count in Counter(one["reason"] for one in rejected).most_common():
        console.notice(
            ngettext(
                "{count} sample would be left out of training: {file}:{row}: {rule}",
                "{count} samples would be left out of training, the first: {file}:{row}: {rule}",
                count,
            ).format(count=count, **first[reason])
        )
    return {"mask": mask, "ledger": data.ledger.to_dict(), "rejected": len(rejected)}


def _print(tokenizer: Any, store: TokenStore, index: int, stop: int) -> None:
    """Print a sample, what is learned in colour, or in double brackets where there is none."""
    if not console.has_colour():
        groups = groupby(pieces(tokenizer, store, index), key=itemgetter(2))
        texts = ((learned, "".join(text for text, _token, _learned in group)) for learned, group in groups)
        console.show(console.styled(*(f"⟦{text}⟧" if learned else text for learned, text in texts)))
        return
    parts = [
        (text, ("black on yellow" if token == stop else "black on green") if learned else "dim")
        for text, token, learned in pieces(tokenizer, store, index)
    ]
    console.show(console.styled(*parts))
