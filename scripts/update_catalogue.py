"""Update the Chinese catalogue from the code: src/tongwen/core/locale/zh_CN/LC_MESSAGES/tongwen.po, and the .mo that Python
reads.

`make messages` runs it. A new text is added without a translation; a text no longer in the code is deleted; a changed text
keeps its translation and is marked `fuzzy`. Translate these in the .po, delete the `fuzzy`, and run it again. With `--check`
it writes nothing, lists stale files, and fails if there are any; tests/core/test_i18n.py does the same and refuses texts
without a translation.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from babel.messages import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tongwen"
PO = PACKAGE / "core" / "locale" / "zh_CN" / "LC_MESSAGES" / "tongwen.po"
MO = PO.with_suffix(".mo")
# Functions with literal texts for users, and the indexes of those arguments.
MARKS = {"_": (0,), "N_": (0,), "setting": (1,), "ngettext": (0, 1)}
HEADER = """# Chinese texts of tongwen. `make messages` keeps the entries in step with the code; translate them here.
msgid ""
msgstr ""
"Language: zh_CN\\n"
"MIME-Version: 1.0\\n"
"Content-Type: text/plain; charset=utf-8\\n"
"Content-Transfer-Encoding: 8bit\\n"

"""


class Texts(Catalog):
    """A catalogue whose header has no dates and no Babel version, so that the .mo only changes with its texts."""

    mime_headers = (("Content-Type", "text/plain; charset=utf-8"),)


def main() -> int:
    catalog = updated()
    made = {PO: po_of(catalog), MO: mo_of(catalog)}
    stale = [file for file, content in made.items() if not file.is_file() or file.read_bytes() != content]
    if "--check" in sys.argv:
        names = ", ".join(str(file.relative_to(ROOT)) for file in stale)
        print(f"stale: {names}; run: make messages" if stale else "the catalogue is up to date", file=sys.stderr)
        return int(bool(stale))
    for file in stale:
        file.write_bytes(made[file])
    todo = [message for message in catalog if message.id and (message.fuzzy or not message.string)]
    print(f'{len(catalog)} texts, {len(todo)} to be translated: search for `fuzzy` and `msgstr ""` in {PO.name}')
    return 0


def texts() -> Iterator[tuple[Path, int, str]]:
    """Yield (file, line, English text) of every text for users, in the order of the files."""
    for file in sorted([*PACKAGE.rglob("*.py"), ROOT / "scripts" / "generate_docs.py"]):
        yield from ((file, line, text) for line, text in in_python(file.read_text(encoding="utf-8")))
    yield from of_sections()
    for file in sorted(PACKAGE.rglob("*.yaml")):
        found = in_template if file.parent.name == "recipe_templates" else in_table
        yield from ((file, line, text) for line, text in found(file.read_text(encoding="utf-8")))


def in_python(source: str) -> Iterator[tuple[int, str]]:
    """Yield literals in calls of MARKS, from the syntax tree: a tokenizer does not see into f-strings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MARKS:
            for text in (node.args[place] for place in MARKS[node.func.id] if len(node.args) > place):
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found.append((node.lineno, text.col_offset, text.value))
    yield from ((line, text) for line, _, text in sorted(found))


def of_sections() -> Iterator[tuple[Path, int, str]]:
    """Yield the docstring of each section of the recipe, which `tongwen schema` shows."""
    from tongwen.recipe.docs import about, sections

    for _unused, model in sections():
        yield Path(inspect.getfile(model)).resolve(), inspect.getsourcelines(model)[1], about(model)


def in_table(source: str) -> Iterator[tuple[int, str]]:
    """Yield scalars with the tag `!_`."""
    waiting, seen = [yaml.compose(source)], set()
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode) and node.tag == "!_":
            yield node.start_mark.line + 1, node.value
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [value for _, value in node.value]


def in_template(source: str) -> Iterator[tuple[int, str]]:
    """Yield the comment of each line."""
    from tongwen.commands.init import COMMENT

    for number, line in enumerate(source.splitlines(), 1):
        yield from ((number, found[1]) for found in COMMENT.finditer(line))


def updated() -> Catalog:
    """The catalogue with the texts of the code, and the translations that the file has."""
    template = Catalog()
    for file, line, text in texts():
        template.add(text, locations=[(str(file.relative_to(ROOT)), line)])
    catalog = saved()
    known = {message.id for message in catalog}
    catalog.update(template, no_fuzzy_matching=True)
    gone = {message.id: message.string for message in catalog.obsolete.values()}  # Babel would compare with all texts
    for message in catalog:
        if message.id not in known and (similar := difflib.get_close_matches(message.id, gone, n=1)):
            message.string = gone[similar[0]]
            message.flags.add("fuzzy")
    catalog.obsolete.clear()
    return catalog


def saved() -> Catalog:
    """Return the saved catalogue."""
    return read_po(io.BytesIO(PO.read_bytes()), locale="zh_CN")


def po_of(catalog: Catalog) -> bytes:
    for message in catalog:
        if not re.search(r"%[(rs]", message.id):  # `99 % of` is no placeholder
            message.flags.discard("python-format")
    out = io.BytesIO()
    write_po(out, catalog, width=0, omit_header=True, include_lineno=False)
    return HEADER.encode() + out.getvalue()


def mo_of(catalog: Catalog) -> bytes:
    """Return the content of the .mo file, which Python's gettext reads."""
    texts = Texts()
    for message in catalog:
        if message.id:
            texts.add(message.id, message.string, flags=message.flags)
    out = io.BytesIO()
    write_mo(out, texts)
    return out.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
