"""The state of a run as HTML."""

from __future__ import annotations

from urllib.parse import quote

from markupsafe import Markup

from tongwen.core.html import curve, render
from tongwen.core.i18n import _
from tongwen.serving.web.backend import RunView

WIDTH = 440  # of a curve's drawing: two side by side


def as_html(view: RunView) -> Markup:
    step, before, after = _("step"), _("before"), _("after")
    return render(
        "serving/web/run.html.jinja",
        facts=view.facts,
        headings={
            "reports": _("Reports"),
            "log": _("Log"),
            "samples": _("Before and after"),
        },
        reports=[(name, f"/report?name={quote(file)}") for name, file in view.reports],
        curves=[(title, curve(points, step, "", width=WIDTH, smooth=smooth)) for title, points, smooth in view.curves],
        log=view.log,
        samples=[
            (sample["question"], [(before, sample["before"]), (after, sample["after"])]) for sample in view.samples
        ],
    )
