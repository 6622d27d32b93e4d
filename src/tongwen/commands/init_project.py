"""init bot, init from-documents: a recipe together with the data or the endpoint that it starts from."""

from __future__ import annotations

import importlib.resources
import json
import re
from pathlib import Path

from tongwen.commands.init import COMMENT
from tongwen.core import console, originals
from tongwen.core.errors import DataError, RecipeError
from tongwen.core.i18n import _
from tongwen.data.synthesis.generate import about_documents
from tongwen.recipe.data import SourceConfig
from tongwen.workflows.data_synthesis import read_documents

BASE = "Qwen/Qwen3-0.6B"
BOT_FILES = ("self_introduction.jsonl", "dialogues.jsonl", "held_out.jsonl")


def write_bot(out: str, name: str, author: str, base: str) -> int:
    """Write a recipe that teaches a model its name, and the data beside it.

    Raises:
        RecipeError: A name is missing, or one of the files exists already.
    """
    if not name or not author:
        raise RecipeError(_("a bot needs a name and an author"), place="init bot", remedy="--name 小同 --author 同文")
    recipe = Path(out or "bot.yaml")
    folder = "" if recipe.parent == Path() else f"{recipe.parent.as_posix()}/"
    fill = json.dumps({"name": name, "author": author}, ensure_ascii=False)
    text = _render("bot", name=_run_name(recipe), base=base or BASE, folder=folder, fill=fill)
    shipped = importlib.resources.files("tongwen.commands") / "demo_data"
    files = {recipe.parent / file: (shipped / file).read_text(encoding="utf-8") for file in BOT_FILES}
    return _write(recipe, text, files)


def write_from_documents(out: str, documents: str, base: str, endpoint: str, model: str) -> int:
    """Write a recipe that has conversations made about documents, and say what they cost.

    Raises:
        RecipeError: No documents are named.
        DataError: The documents cannot be read, or hold no text.
    """
    if not documents:
        raise RecipeError(_("which documents?"), place="init from-documents", remedy="tongwen init from-documents DIR")
    texts = list(read_documents([SourceConfig(path=documents, records="file")]))
    pieces = sum(1 for _piece in about_documents(texts))
    if not pieces:
        raise DataError(_("no text of at least 40 characters"), place=documents)
    characters = sum(len(text) for text, _place in texts)
    recipe = Path(out or "from-documents.yaml")
    values = {"name": _run_name(recipe), "base": base or BASE, "documents": json.dumps(documents, ensure_ascii=False)}
    values |= {"endpoint": endpoint or "http://127.0.0.1:8000/v1", "model": model or "MODEL"}
    _write(recipe, _render("from-documents", **values, rows=str(pieces), requests=str(2 * pieces)), {})
    console.info(
        _(
            "{characters} characters in {pieces} pieces: about {pieces} requests, {prompt} tokens to read and {reply} to write"
        ).format(
            characters=f"{characters:,}",
            pieces=pieces,
            prompt=console.human_count(characters + 600 * pieces),  # a character of Chinese is about a token
            reply=console.human_count(600 * pieces),
        )
    )
    return 0


def _run_name(recipe: Path) -> str:
    return re.sub(r"[^\w.\-]+", "-", recipe.stem)


def _render(template: str, **values: str) -> str:
    """Return the recipe with its comments in the user's language."""
    folder = importlib.resources.files("tongwen.commands") / "recipe_templates"
    text = COMMENT.sub(lambda found: f"# {_(found[1])}", (folder / f"{template}.yaml").read_text(encoding="utf-8"))
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], text)


def _write(recipe: Path, text: str, files: dict[Path, str]) -> int:
    """Write the recipe and the files beside it, or none of them."""
    originals.check_new(recipe)
    for file, content in files.items():
        originals.check_new(file, content)
    for file, content in files.items():
        originals.write_new(file, content)
    originals.write_new(recipe, text)
    console.success(_("{out} · next: tongwen check {out}").format(out=recipe))
    for file in files:
        console.info(f"  {file}")
    console.emit({"out": str(recipe), "files": [str(file) for file in files]})
    return 0
