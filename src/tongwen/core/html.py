"""HTML reports, rendered from the templates in the `html_templates` folder of each package. They share one style and load
nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tongwen.core.i18n import language

PACKAGE = Path(__file__).parents[1]
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # the head and the rows
# Distinct on light and dark backgrounds, also for colour-blind readers (Okabe and Ito); the first is the page's own.
COLOURS = ("var(--accent)", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#8f6fd1")


def render(template: str, **values: Any) -> Markup:
    """Render a template. Every value that is not Markup is escaped.

    template: package and file, such as `train/report.html.jinja`.
    """
    return Markup(_environment().get_template(template).render(values))  # noqa: S704 (autoescape has escaped it)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["language"] = lambda: "zh-CN" if language() == "zh" else "en"
    return environment


def _source(template: str) -> str:
    package, _, file = template.rpartition("/")
    return (PACKAGE / package / "html_templates" / file).read_text(encoding="utf-8")


def curve(
    points: list[tuple[float, float]], x_label: str, y_label: str, *, width: int = 720, smooth: bool = True
) -> Markup:
    """Draw one line as inline SVG, with grid lines and labels. width: of the view box (the drawing scales to the page);
    smooth: emphasise the running mean."""
    return curves({"": points}, x_label, y_label, width=width, smooth=smooth)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    width: int = 720,
    smooth: bool = True,
) -> Markup:
    """Draw several lines in one SVG, each with a colour and a name; a line without points is left out."""
    drawn = {name: list(points) for name, points in lines.items() if points}
    if not drawn:
        return Markup()
    height, left, bottom, top = 260, 56, 36, 10
    every = [point for points in drawn.values() for point in points]
    low, high = min(y for _, y in every), max(y for _, y in every)
    pad = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    low, high = (max(low - pad, 0.0) if low >= 0 else low - pad), high + pad
    digits = 3 if high - low > 0.02 * abs(high) else 5
    first = min(x for x, _ in every)
    last = max(*(x for x, _ in every), first + 1)

    def at(x: float, y: float) -> str:
        return f"{left + (x - first) / (last - first) * (width - left - 12):.1f},{top + (high - y) / (high - low) * (height - top - bottom):.1f}"

    quarters = [part / 4 for part in range(5)]
    heights = [low + (high - low) * part for part in quarters]
    steps = [first + (last - first) * part for part in quarters]
    coloured = list(zip(cycle(COLOURS), drawn.items(), strict=False))
    return render(
        "core/curves.html.jinja",
        width=width,
        height=height,
        left=left,
        right=width - 12,
        top=top,
        bottom=height - bottom,
        y_marks=[(at(first, value).split(",")[1], _label(value, digits)) for value in heights],
        x_marks=[(at(value, low).split(",")[0], f"{value:.0f}") for value in steps],
        lines=[
            (
                colour,
                " ".join(at(x, y) for x, y in points),
                " ".join(at(x, y) for x, y in (running_mean(points) if smooth else points)),
            )
            for colour, (_, points) in coloured
        ],
        names=[(colour, name) for colour, (name, _) in coloured if name],
        x_label=x_label,
        y_label=y_label,
    )


def _label(value: float, digits: int) -> str:
    """Format a number short enough for an axis label."""
    text = f"{value:.{digits}g}"
    return text if len(text) <= 6 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the exponential mean over about a twentieth of the points, bias-corrected at the start."""
    keep = 1 - 1 / max(len(points) / 20, 1.0)
    mean = weight = 0.0
    out = []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, mean / weight))
    return out
