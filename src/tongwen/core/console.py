"""Terminal output: rank 0 only, 80 columns, no progress bars without a terminal.

With `--json` the human-readable text goes to stderr, and stdout gets one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tongwen.core.distributed import is_main_process
from tongwen.core.i18n import _


class Screen:
    """The console for human-readable text, one per process."""

    def __init__(self) -> None:
        self.json = False
        self.console = Console(highlight=False, soft_wrap=False)

    def use_json(self) -> None:
        self.json = True
        self.console = Console(highlight=False, soft_wrap=False, stderr=True)

    @property
    def is_active(self) -> bool:
        return is_main_process()


SCREEN = Screen()


def header(title: str, detail: str = "") -> None:
    """Print the first line of a stage."""
    if SCREEN.is_active:
        SCREEN.console.print()
        SCREEN.console.print(f"[bold cyan]{title}[/]  [dim]{plain(detail)}[/]".rstrip(), soft_wrap=True)


def info(text: str) -> None:
    """Print a line."""
    if SCREEN.is_active:
        SCREEN.console.print(plain(text), soft_wrap=not SCREEN.console.is_terminal)


def notice(text: str) -> None:
    """Print a notice about something that was derived, translated or left out."""
    if SCREEN.is_active:
        SCREEN.console.print(f"[yellow]![/] {plain(text)}", soft_wrap=not SCREEN.console.is_terminal)


def success(text: str) -> None:
    """Print the result of a step."""
    if SCREEN.is_active:
        SCREEN.console.print(f"[green]✓[/] {plain(text)}", soft_wrap=not SCREEN.console.is_terminal)


def error(text: str) -> None:
    """Print an error to stderr, also on other ranks than 0."""
    Console(stderr=True, highlight=False).print(f"[bold red]✗[/] {plain(text)}", soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Print a table; the first column is left-aligned, columns of numbers are right-aligned."""
    if not SCREEN.is_active:
        return
    out = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        numeric = index > 0 and all(_is_numeric(row[index]) for row in rows)
        out.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        out.add_row(*(plain(_cell(cell)) for cell in row))
    SCREEN.console.print(out)


def emit(value: dict[str, Any]) -> None:
    """Print the JSON object of `--json`; do nothing without that flag."""
    if SCREEN.json and SCREEN.is_active:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()


class Bar:
    """A progress bar in a terminal; without a terminal, one line per tenth."""

    def __init__(self, progress: Progress | None, total: int, label: str, start: int) -> None:
        self._progress, self._total, self._label = progress, max(total, 1), label
        self._task = progress.add_task(label, total=total, completed=start, note="") if progress else None
        self._tenth = 10 * start // self._total

    def update(self, done: int, note: str = "") -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)
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
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=SCREEN.console, transient=True) as shown:
        yield Bar(shown, total, label, start)


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """Show a spinner while the block runs; print its duration when it took over 2 s."""
    started = time.monotonic()
    if SCREEN.is_active and SCREEN.console.is_terminal:
        with SCREEN.console.status(plain(label)):
            yield
    else:
        yield
    if SCREEN.is_active and (took := time.monotonic() - started) > 2:
        SCREEN.console.print(f"[dim]{plain(label)} · {took:.0f} s[/]")


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


def plain(text: str) -> str:
    """Escape brackets, so that rich does not read them as markup."""
    return text.replace("[", "\\[")


def _cell(cell: Any) -> str:
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def _is_numeric(cell: Any) -> bool:
    return (
        isinstance(cell, (int, float))
        or cell == ""
        or str(cell).replace(",", "").replace(".", "").replace("%", "").strip().isdigit()
    )
