"""List the input files of a recipe's data, in the order of their rows.

The check whether a finished `prepare` is still up to date uses this list, so this module imports only the row readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tongwen.core.errors import DataError, RecipeError, TongwenError, raise_all
from tongwen.core.i18n import _
from tongwen.data import dataset_info, formats
from tongwen.data.files import find_files, printable
from tongwen.data.message_log import join_messages, names_of_log
from tongwen.data.preference import is_preference
from tongwen.data.reader import read_rows
from tongwen.data.row import RawRow
from tongwen.recipe.data import Prepare, SourceConfig

Notify = Callable[[str], None]
KINDS = ("documents", "dialogues", "preferences")


@dataclass(frozen=True)
class InputPart:
    """One file of one source. index: among all files; kind: one of KINDS; role: `train`, `held_out` (a file
    of the recipe) or `evaluation`; number: index of its source among those of its kind; rows: how many are read, None
    for all."""

    index: int
    kind: str
    role: str
    number: int
    source: SourceConfig
    file: Path
    rows: int | None = None

    @property
    def name(self) -> str:
        """The file name as origins store it."""
        return printable(self.file)

    def folder(self, out: Path) -> Path:
        return out / "parts" / f"{self.index:05d}"


def list_parts(
    section: Prepare, download: Callable[[str, Notify], str], notify: Notify, errors: list[TongwenError] | None = None
) -> list[InputPart]:
    """Return all input files of the recipe, in the order of their rows.

    download(path, notify): returns the local folder of a hub data set. Paths without files are appended to `errors`, or
    raised without it.
    """
    found = list[TongwenError]() if errors is None else errors
    out: list[InputPart] = []

    def add(kind: str, role: str, number: int, source: SourceConfig) -> None:
        try:
            formats.check_source(source)
            of_preferences = kind == "preferences"
            for one in dataset_info.entry_source(source, of_preferences=of_preferences) if source.entry else [source]:
                if one.path.startswith(("hub:", "modelscope:")):
                    one = one.model_copy(update={"path": download(one.path, notify)})
                left = one.rows
                for file in find_files(one.path):
                    if left == 0:
                        break
                    is_of = kind or kind_of(file, one, may_be_preferences=bool(section.preferences))
                    part = InputPart(len(out), is_of, role, number, one, file, left)
                    _check_held_out(part, section)
                    out.append(part)
                    left = left and left - sum(1 for _row in raw_rows(part, _ignore))
        except (DataError, RecipeError) as error:
            found.append(error)

    if isinstance(section.held_out, str):
        add("", "held_out", 0, SourceConfig(path=section.held_out))
    for number, source in enumerate(section.evaluation):
        add("", "evaluation", number, source)
    for kind in KINDS:
        for number, source in enumerate(getattr(section, kind)):
            add(kind, "train", number, source)
    if errors is None:
        raise_all(found)
    return out


def raw_rows(part: InputPart, notify: Notify) -> Iterator[RawRow]:
    """Yield the rows of a file, as many as its source wants; of a log of messages, its sessions."""
    rows = read_rows(part.file, part.source, notify)
    if part.kind == "dialogues" and not part.source.format:
        rows = join_messages(rows, part.source, lambda text: notify(f"{part.name}: {text}"))
    return islice(rows, part.rows)


def _ignore(text: str) -> None:
    """Ignore the message: it comes again when the rows are read."""


def _check_held_out(part: InputPart, section: Prepare) -> None:
    """Raise DataError for a held-out file of a kind that the recipe does not train on: it would never be used."""
    if part.role == "held_out" and not getattr(section, part.kind):
        trained = " / ".join(kind for kind in KINDS if getattr(section, kind))
        raise DataError(
            _("held_out: this file contains {kind}, but the recipe has {trained}").format(
                kind=part.kind, trained=trained
            ),
            place=part.name,
            remedy=_("name a file of {trained}, or a share: held_out: 0.02").format(trained=trained),
        )


def kind_of(file: Path, source: SourceConfig, *, may_be_preferences: bool = False) -> str:
    """Return one of KINDS, by the first row."""
    row = next(read_rows(file, source)).value
    if may_be_preferences and is_preference(row):
        return "preferences"
    if names_of_log(row, source):
        return "dialogues"
    row = formats.with_columns(row, source) if isinstance(row, dict) else row
    text = source.format == "text" or (not source.format and formats.recognise(row) == "text")
    return "documents" if text else "dialogues"
