"""The vocabulary report as HTML: the gain and cost of new pieces, what stays unchanged, and the advice."""

from __future__ import annotations

from typing import Any

from tongwen.core.html import Table, curve, render
from tongwen.core.i18n import _


def as_html(title: str, report: dict[str, Any]) -> str:
    """Return report.html from report.json's content, without sections that were not measured."""
    return str(
        render(
            "vocab/report.html.jinja",
            title=title,
            summary=report["summary"],
            facts=_facts(report),
            headings={
                "gain": _("Gain from new pieces"),
                "fertility": _("Fertility"),
                "kept": _("What stays unchanged"),
                "bits_per_byte": _("Before any training"),
                "examples": _("Examples"),
            },
            advice=_advice(report["advice"]) if report.get("advice") else None,
            gain=_gain(report["curve"]) if report.get("curve") else None,
            fertility=_fertility(report["fertility"]),
            kept=_kept(report["kept"]) if report.get("kept") else None,
            bits_per_byte=_bits_per_byte(report["bits_per_byte"]) if report.get("bits_per_byte") else None,
            examples=[
                [(_("before"), example["before"]), (_("after"), example["after"])]
                for example in report.get("examples") or ()
            ],
        )
    )


def _advice(advice: dict[str, Any]) -> dict[str, Any]:
    verdict = _("Extend") if advice["extend"] else _("Do not extend")
    return {"verdict": verdict, "reasons": advice["reasons"]}


def _gain(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the gain from new pieces: two curves over their number, and the same as a table."""
    pieces = _("pieces added")
    shorter = [(point["pieces"], point["characters_per_token"]) for point in points]
    cost = [(point["pieces"], point["cost"]) for point in points]
    cost_label = _("cost per character, including the head (base = 1)")
    head = (pieces, _("characters per token"), _("cost"), _("learnable"))
    rows = [
        (
            f"{point['pieces']:,}",
            f"{point['characters_per_token']:.3f}",
            f"{point['cost']:.3f}",
            f"{point['seen_enough']:,}",
        )
        for point in points
    ]
    return {
        "curves": [
            curve(shorter, pieces, _("characters per token")),
            curve(cost, pieces, cost_label),
        ],
        "table": (head, rows),
    }


def _bits_per_byte(bits: dict[str, float]) -> Table:
    return ("", "bits per byte"), [(name, f"{value:.3f}") for name, value in bits.items()]


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    first = next(iter(report["fertility"].values()))
    old, new = first["before"], first.get("after")
    ratio = f"{old['characters_per_token']:.2f}" + (f" → {new['characters_per_token']:.2f}" if new else "")
    out = [(ratio, _("characters per token"))]
    sizes = report["sizes"]
    grown = f" → {sizes['after']:,}" if "after" in sizes else ""
    out.append((f"{sizes['before']:,}{grown}", _("tokens in the vocabulary")))
    if rows := report.get("rows"):
        out.append((f"{rows['filled']:,} + {rows['added']:,}", _("spare rows filled + rows added")))
    if kept := report.get("kept"):
        out.append(
            (
                f"{kept['source_changed']} / {kept['source_texts']:,}",
                _("old texts whose ids changed"),
            )
        )
        out.append((f"{kept['new_round_trip_failures']}", _("new round-trip failures")))
    if bits := report.get("bits_per_byte"):
        base, grown = list(bits.values())[:2]
        out.append((f"{base:.2f} → {grown:.2f}", _("bits per byte, untrained")))
    if matched := report.get("matched"):
        out.append((f"{matched['unseen']:,}", _("pieces that the text for matching does not show")))
    return out


def _fertility(texts: dict[str, Any]) -> Table:
    rows = []
    for name, found in texts.items():
        old, new = found["before"], found.get("after")
        for unit, label in (
            ("characters_per_token", _("characters per token")),
            ("bytes_per_token", _("bytes per token")),
        ):
            row = [f"{name}: {label}", f"{old[unit]:.3f}"]
            rows.append([*row, f"{new[unit]:.3f}", f"{new[unit] / old[unit]:.2f} x"] if new else row)
    head = [_("text"), _("before")]
    if any(found.get("after") for found in texts.values()):
        head += [_("after"), ""]
    return head, rows


def _kept(kept: dict[str, Any]) -> Table:
    labels = {
        "source_texts": _("texts without this script"),
        "source_changed": _("of these, with changed ids"),
        "round_trips": _("texts checked by round trip"),
        "new_round_trip_failures": _("that the base restores and this tokenizer does not"),
        "pieces": _("new pieces"),
        "occur": _("that occur in the sample"),
        "unreachable": _("that can never be produced"),
        "beginnings": _("first parts of a character"),
        "speed": _("time to encode a text (base = 1)"),
        "fast_disagrees": _("texts that tokenizer.json encodes differently"),
    }
    rows = [
        (label, f"{kept[name]:,}" if isinstance(kept[name], int) else f"{kept[name]:.3g}")
        for name, label in labels.items()
        if kept.get(name) is not None
    ]
    return ("", ""), rows
