"""Present the results of an evaluation: a table in the terminal, and report.html, which needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tongwen.core.html import Table, render
from tongwen.core.i18n import _

SHOWN = 20  # rows of a task in the report; rows.jsonl has all of them


def score_table(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows): each task's main figure with its 95 % interval, before and after if both are known."""
    compared = any("before" in one for one in scores.values())
    head = [_("task"), _("rows")]
    head += [_("before"), _("after"), _("change")] if compared else [_("score")]
    body = []
    for title, one in scores.items():
        cells = (
            [_with_interval(one["before"]), _with_interval(one), _signed(one["change"])]
            if compared
            else [_with_interval(one)]
        )
        body.append(
            [
                f"{title} ({next(iter(one['figures']))})" if title not in one["figures"] else title,
                str(one["rows"]),
                *cells,
            ]
        )
    return head, body


def write_report(
    file: Path, summary: str, scores: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Write the page: all figures, their groups, and some rows with their answers."""
    tasks = [
        {
            "title": title,
            "figures": _figures(one),
            "groups": _groups(one["groups"]) if "groups" in one else None,
            "rows": [(row["question"], _answers(row)) for row in rows[title][:SHOWN] if "answer" in row],
        }
        for title, one in scores.items()
    ]
    page = render(
        "infer/report.html.jinja",
        title=_("Evaluation"),
        summary=summary,
        facts=[(f"{one['value']:.4g}", title) for title, one in scores.items()],
        scores=score_table(scores),
        note=_(
            "In brackets: the 95 % interval (bootstrap over rows). If the interval of a change contains 0, the change may be chance."
        ),
        tasks=tasks,
    )
    file.write_text(page, encoding="utf-8")


def _with_interval(one: Mapping[str, float]) -> str:
    return f"{one['value']:.4g} [{one['low']:.4g}, {one['high']:.4g}]"


def _signed(one: Mapping[str, float]) -> str:
    return f"{one['value']:+.4g} [{one['low']:+.4g}, {one['high']:+.4g}]"


def _figures(one: Mapping[str, Any]) -> Table:
    before = one.get("before", {}).get("figures")
    if before is None:
        return ("", _("score")), [(name, f"{value:.4g}") for name, value in one["figures"].items()]
    head = ("", _("before"), _("after"))
    return head, [(name, f"{before[name]:.4g}", f"{value:.4g}") for name, value in one["figures"].items()]


def _groups(groups: Mapping[str, Mapping[str, float]]) -> Table:
    names = [name for name in next(iter(groups.values())) if name != "rows"]
    body = [(title, str(one["rows"]), *(f"{one[name]:.4g}" for name in names)) for title, one in groups.items()]
    return (_("group"), _("rows"), *names), body


def _answers(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = (("before", _("before")), ("answer", _("answer")), ("wanted", _("data")))
    return [(label, row[name]) for name, label in names if name in row]
