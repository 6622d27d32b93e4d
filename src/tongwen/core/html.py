"""What every page has that is written for people: one look, a title, cards, tables and curves; nothing asks the network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

from tongwen.core.i18n import language

STYLE = """
:root{--ink:#1c1e21;--soft:#6b7280;--line:#e3e6ea;--accent:#0f766e;--paper:#fff;--wash:#f6f8f9}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa3ad;--line:#2c3238;--accent:#2dd4bf;--paper:#15181b;--wash:#1c2024}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:2rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
 font:16px/1.6 system-ui,-apple-system,"Segoe UI","PingFang SC","Noto Sans CJK SC","Microsoft YaHei",sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:.2rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
.soft{color:var(--soft)}.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));gap:.8rem;margin:1.4rem 0}
.card{background:var(--wash);border:1px solid var(--line);border-radius:.6rem;padding:.8rem 1rem}
.card b{display:block;font-size:1.25rem;line-height:1.3;white-space:nowrap;font-variant-numeric:tabular-nums}.card span{color:var(--soft);font-size:.85rem}
table{border-collapse:collapse;width:100%;table-layout:fixed;margin-bottom:1rem}td,th{overflow-wrap:anywhere;padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}th{font-weight:600;color:var(--soft);font-size:.85rem}
svg{width:100%;min-width:30rem;height:auto;display:block}.scroll{overflow-x:auto}
.qa{border:1px solid var(--line);border-radius:.6rem;margin:.8rem 0;overflow:hidden}.qa h3{margin:0;padding:.6rem 1rem;background:var(--wash);font-size:1rem}
.qa div{display:grid;grid-template-columns:5rem 1fr;gap:.6rem;padding:.5rem 1rem;border-top:1px solid var(--line);white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:-.4rem 0 1rem}summary{cursor:pointer;color:var(--soft)}
.bar{background:var(--accent);opacity:.7;height:.9rem;border-radius:.2rem;min-width:1px}
table.facts{table-layout:auto}table.facts .n{white-space:nowrap;overflow-wrap:normal}table.facts th.n{white-space:normal}table.facts td:first-child{min-width:6rem}mark{background:var(--wash);color:inherit;border-radius:.2rem;box-shadow:inset 0 0 0 1px var(--line);padding:0 1px}
.names{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:.2rem 0 0 3.5rem;color:var(--soft);font-size:.85rem}.names i{display:inline-block;width:1rem;height:.2rem;margin-right:.4rem;vertical-align:middle}
li{margin:.3rem 0}pre{background:var(--wash);border:1px solid var(--line);border-radius:.6rem;padding:1rem;overflow-x:auto;font-size:.85rem}
"""

# Apart from each other on light and dark, also for eyes that see few colours (Okabe and Ito); the first is the page's own.
COLOURS = ("var(--accent)", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#8f6fd1")


def document(title: str, summary: str, parts: Iterable[str]) -> str:
    """A whole page. title and summary are plain text; the parts are HTML."""
    return (
        f'<!doctype html><html lang="{"zh-CN" if language() == "zh" else "en"}"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p class=soft>{html.escape(summary)}</p>{''.join(parts)}</html>"
    )


def cards(entries: Iterable[tuple[str, str]]) -> str:
    """(value, label) side by side; one without a value is left out."""
    return (
        "<div class=cards>"
        + "".join(
            f"<div class=card><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"
            for value, label in entries
            if value
        )
        + "</div>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns after the first hold numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if place else ''}>{html.escape(cell)}</{tag}>" for place, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<div class=scroll><table class=facts><tr>{line(head, 'th')}</tr>{body}</table></div>"


def curve(
    points: list[tuple[float, float]], x_label: str, y_label: str, *, width: int = 720, smooth: bool = True
) -> str:
    """An inline SVG line with its running mean, four grid lines and labels. width: of the drawing, which scales to its
    place; smooth: whether the mean is what one looks at."""
    return curves({"": points}, x_label, y_label, width=width, smooth=smooth)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    width: int = 720,
    smooth: bool = True,
) -> str:
    """Several lines over each other, each in its colour and under its name; one that has no points is left out."""
    drawn = {name: list(points) for name, points in lines.items() if points}
    if not drawn:
        return ""
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

    grid = []
    for part in range(5):
        value = low + (high - low) * part / 4
        y = at(first, value).split(",")[1]
        grid.append(
            f'<line x1="{left}" x2="{width - 12}" y1="{y}" y2="{y}" stroke="var(--line)"/>'
            f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{_label(value, digits)}</text>'
        )
    for part in range(5):
        value = first + (last - first) * part / 4
        x = at(value, low).split(",")[0]
        anchor = "end" if part == 4 else "middle"
        grid.append(f'<text x="{x}" y="{height - bottom + 18}" text-anchor="{anchor}">{value:.0f}</text>')
    for colour, points in zip(cycle(COLOURS), drawn.values(), strict=False):
        raw = " ".join(at(x, y) for x, y in points)
        main = " ".join(at(x, y) for x, y in (running_mean(points) if smooth else points))
        grid.append(
            f'<polyline points="{raw}" fill="none" stroke="{colour}" stroke-opacity=".3"/>'
            f'<polyline points="{main}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    names = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for colour, name in zip(cycle(COLOURS), drawn, strict=False)
        if name
    )
    return (
        f'<div class=scroll><svg viewBox="0 0 {width} {height}" role="img" font-size="12" fill="var(--soft)">{"".join(grid)}'
        f'<text x="{width - 12}" y="{height - 2}" text-anchor="end">{html.escape(x_label)}</text>'
        f'<text x="{left + 6}" y="{top + 12}">{html.escape(y_label)}</text></svg></div>'
        + (f"<p class=names>{names}</p>" if names else "")
    )


def _label(value: float, digits: int) -> str:
    """A number that fits beside the axis."""
    text = f"{value:.{digits}g}"
    return text if len(text) <= 6 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean over about a twentieth of the points, corrected for its beginning."""
    keep = 1 - 1 / max(len(points) / 20, 1.0)
    mean = weight = 0.0
    out = []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, mean / weight))
    return out
