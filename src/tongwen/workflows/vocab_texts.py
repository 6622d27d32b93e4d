"""Texts that a vocabulary is learned from and measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import resources

from tongwen.core import console
from tongwen.core.errors import RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document, Preference, Record
from tongwen.data.clean import Cleaner
from tongwen.data.input_parts import kind_of, list_parts
from tongwen.data.prepare_steps import iter_rows
from tongwen.hub.download import local_copy
from tongwen.recipe.data import Clean, Prepare, SourceConfig

NO_CLEANING = Clean(unicode=False, control=False, mojibake=False, html=False, unwrap=False, repetition=False)
SAMPLE_CHARACTERS = 1_000_000  # most characters to measure: takes seconds


def shipped_texts() -> list[str]:
    """Return the dialogues that come with the package: real text without a download."""
    with resources.as_file(resources.files("tongwen.commands") / "demo_data" / "dialogues.jsonl") as file:
        return list(iter_texts([str(file)], lambda text: None))


def iter_texts(paths: Sequence[str], notify: Callable[[str], None] = console.notice) -> Iterator[str]:
    """Yield the unchanged texts of files in any known format; dialogues turn by turn. Unreadable rows are counted and
    reported through `notify`."""
    section = Prepare(documents=[SourceConfig(path=path) for path in paths], clean=NO_CLEANING)
    for input_part in list_parts(section, local_copy, notify):
        part = replace(input_part, kind=kind_of(input_part.file, input_part.source))
        refused, first = 0, ""
        for raw, record in iter_rows(part, section, Cleaner(section.clean, part.kind), notify):
            if isinstance(record, (Document, Dialogue)):
                yield from texts_of(record)
            elif isinstance(record, RowRejected):
                refused, first = refused + 1, first or f"{raw.file}:{raw.row}: {record.rule}"
        if refused:
            notify(_("{refused:,} rows cannot be read, the first: {first}").format(refused=refused, first=first))


def texts_of(record: Record) -> Iterator[str]:
    if isinstance(record, Document):
        yield record.text
        return
    messages = (*record.prompt, *record.chosen) if isinstance(record, Preference) else record.messages
    yield from (message.content for message in messages if message.content)


def split(texts: Iterable[str]) -> tuple[Iterator[str], list[str]]:
    """Return (texts to learn from, every tenth text up to SAMPLE_CHARACTERS). The list fills during reading."""
    rest: list[str] = []
    return _without_tenth(texts, rest), rest


def _without_tenth(texts: Iterable[str], rest: list[str]) -> Iterator[str]:
    size = 0
    for index, text in enumerate(texts):
        if index % 10 == 0 and size < SAMPLE_CHARACTERS:
            rest.append(text)
            size += len(text)
        else:
            yield text


def sample_texts(texts: Iterable[str]) -> list[str]:
    """Return about SAMPLE_CHARACTERS of texts, spread evenly over all; at least one text."""
    return _evenly(list(texts))


def _evenly(texts: list[str]) -> list[str]:
    total = sum(map(len, texts))
    step = max(1, -(-total // SAMPLE_CHARACTERS))
    return texts[::step]
