"""What an examination leaves for people: a table in the terminal, and report.html, which asks nothing of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tongwen.core.html import Table, render
from tongwen.core.i18n import say

SHOWN = 20  # rows of a task in the report; all of them stand in rows.jsonl


def score_table(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): each task's main figure with its 95 % interval, before and after where both are known."""
    compared = any("before" in one for one in scores.values())
    head = [say("task", "任务"), say("rows", "行数")]
    head += [say("before", "之前"), say("after", "之后"), say("change", "变化")] if compared else [say("score", "分数")]
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
    """The page: all figures, their groups, and some rows with what was answered."""
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
        title=say("Evaluation", "评测"),
        summary=summary,
        facts=[(f"{one['value']:.4g}", title) for title, one in scores.items()],
        scores=score_table(scores),
        note=say(
            "In brackets: 95 % of the scores that other rows of the same kind would give (bootstrap over rows). A change whose bracket holds 0 may be chance.",
            "括号内为 95% 区间（对行做自助抽样）。变化的区间若包含 0，则可能只是偶然。",
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
        return ("", say("score", "分数")), [(name, f"{value:.4g}") for name, value in one["figures"].items()]
    head = ("", say("before", "之前"), say("after", "之后"))
    return head, [(name, f"{before[name]:.4g}", f"{value:.4g}") for name, value in one["figures"].items()]


def _groups(groups: Mapping[str, Mapping[str, float]]) -> Table:
    names = [name for name in next(iter(groups.values())) if name != "rows"]
    body = [(title, str(one["rows"]), *(f"{one[name]:.4g}" for name in names)) for title, one in groups.items()]
    return (say("group", "分组"), say("rows", "行数"), *names), body


def _answers(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = (("before", say("before", "之前")), ("answer", say("answer", "回答")), ("wanted", say("data", "数据")))
    return [(label, row[name]) for name, label in names if name in row]
