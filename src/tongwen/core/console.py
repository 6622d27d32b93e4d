"""Terminal output: rank 0 only, 80 columns, no progress bars without a terminal.

With `--json` the human-readable text goes to stderr, and stdout gets one JSON object. Text reaches the terminal only through
`styled`: brackets in it are no markup, and control characters are shown escaped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tongwen.core.distributed import is_main_process
from tongwen.core.i18n import _
from tongwen.core.terminal_text import UNSAFE, visible


class Screen:
    """The console for human-readable text, one per process."""

    def __init__(self) -> None:
        self.json = False
        self.console = _console()

    def use_json(self) -> None:
        self.json = True
        self.console = _console(stderr=True)

    @property
    def is_active(self) -> bool:
        return is_main_process()


def _console(*, stderr: bool = False) -> Console:
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=False, stderr=stderr)


SCREEN = Screen()


def styled(*parts: str | tuple[str, str]) -> Text:
    """Return text for the terminal, from texts and (text, style) pairs."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((visible(text.replace("\r\n", "\n")), style) for text, style in pairs))


def has_colour() -> bool:
    """Whether the terminal shows colours: it is one, and NO_COLOR is not set."""
    return SCREEN.console.color_system is not None and not SCREEN.console.no_color


def show(shown: RenderableType, *, soft_wrap: bool = False) -> None:
    """Print styled text, a tree or a table."""
    if SCREEN.is_active:
        SCREEN.console.print(shown, soft_wrap=soft_wrap)


def header(title: str, detail: str = "") -> None:
    """Print the first line of a stage."""
    show("")
    show(styled((title, "bold cyan"), *(("  ", (detail, "dim")) if detail else ())), soft_wrap=True)


def info(text: str) -> None:
    """Print a line."""
    _line(text)


def notice(text: str) -> None:
    """Print a notice about something that was derived, translated or left out."""
    _line(("!", "yellow"), f" {text}")


def success(text: str) -> None:
    """Print the result of a step."""
    _line(("✓", "green"), f" {text}")


def error(text: str) -> None:
    """Print an error to stderr, also on other ranks than 0."""
    _console(stderr=True).print(styled(("✗", "bold red"), f" {text}"), soft_wrap=True)


def _line(*parts: str | tuple[str, str]) -> None:
    show(styled(*parts), soft_wrap=not SCREEN.console.is_terminal)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Print a table; the first column is left-aligned, columns of numbers are right-aligned."""
    if not SCREEN.is_active:
        return
    out = Table(
        title=styled(title) if title else None, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for index, name in enumerate(columns):
        numeric = index > 0 and all(_is_numeric(row[index]) for row in rows)
        out.add_column(styled(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        out.add_row(*(styled(_cell(cell)) for cell in row))
    show(out)


def emit(value: dict[str, Any]) -> None:
    """Print the JSON object of `--json`; do nothing without that flag."""
    if SCREEN.json and SCREEN.is_active:
        is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        text = json.dumps(value, ensure_ascii=not is_unicode)
        # JSON leaves some characters that a terminal obeys as they are: the same value, escaped.
        sys.stdout.write(UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")
        sys.stdout.flush()


class Bar:
    """A progress bar in a terminal; without a terminal, one line per tenth."""

    def __init__(self, progress: Progress | None, total: int, label: str, start: int) -> None:
        self._progress, self._total, self._label = progress, max(total, 1), label
        self._task = progress.add_task(visible(label), total=total, completed=start, note="") if progress else None
        self._tenth = 10 * start // self._total

    def update(self, done: int, note: str = "") -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=visible(note))
        elif SCREEN.is_active and (tenth := 10 * done // self._total) > self._tenth:
            self._tenth = tenth
            info(f"{self._label} {done}/{self._total}  {note}".rstrip())


@contextmanager
def progress(total: int, label: str, start: int = 0) -> Iterator[Bar]:
    """Show a progress bar up to `total`, with the remaining time and a note such as the tokens per second."""
    if not (SCREEN.is_active and SCREEN.console.is_terminal):
        yield Bar(None, total, label, start)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    with Progress(*columns, console=SCREEN.console, transient=True) as shown:
        yield Bar(shown, total, label, start)


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """Show a spinner while the block runs; print its duration when it took over 2 s."""
    started = time.monotonic()
    if SCREEN.is_active and SCREEN.console.is_terminal:
        with SCREEN.console.status(styled(label)):
            yield
    else:
        yield
    if (took := time.monotonic() - started) > 2:
        show(styled((f"{label} · {took:.0f} s", "dim")))


def human_count(number: float) -> str:
    """1234567 -> 1.23 M"""
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(number) >= limit:
            return f"{number / (1e3 if suffix == ' k' else limit):.3g}{suffix}"
    return f"{number:g}"


def human_bytes(number: float | None) -> str:
    """Bytes in powers of 1000, as disks and GPUs are sold: 1.2 GB"""
    if number is None:
        return _("not known")
    for limit, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.3g} {suffix}"
    return f"{number:.0f} B"


def human_time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _cell(cell: Any) -> str:
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def _is_numeric(cell: Any) -> bool:
    return (
        isinstance(cell, (int, float))
        or cell == ""
        or str(cell).replace(",", "").replace(".", "").replace("%", "").strip().isdigit()
    )
