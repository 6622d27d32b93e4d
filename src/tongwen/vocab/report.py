"""The vocabulary report for people: what a piece brings, what it costs, what did not change, and the advice."""

from __future__ import annotations

from typing import Any

from tongwen.core.html import Table, curve, render
from tongwen.core.i18n import say


def as_html(title: str, report: dict[str, Any]) -> str:
    """report.html from report.json's content; sections that were not measured are left out."""
    return str(
        render(
            "vocab/report.html.jinja",
            title=title,
            summary=report["summary"],
            facts=_facts(report),
            headings={
                "gain": say("What pieces bring", "增加词的收益"),
                "fertility": say("Fertility", "编码效率"),
                "kept": say("What stays as it was", "保持不变"),
                "bits_per_byte": say("Before any training", "训练之前"),
                "examples": say("Examples", "示例"),
            },
            advice=_advice(report["advice"]) if report.get("advice") else None,
            gain=_gain(report["curve"]) if report.get("curve") else None,
            fertility=_fertility(report["fertility"]),
            kept=_kept(report["kept"]) if report.get("kept") else None,
            bits_per_byte=_bits_per_byte(report["bits_per_byte"]) if report.get("bits_per_byte") else None,
            examples=[
                [(say("before", "之前"), example["before"]), (say("after", "之后"), example["after"])]
                for example in report.get("examples") or ()
            ],
        )
    )


def _advice(advice: dict[str, Any]) -> dict[str, Any]:
    verdict = say("Extend", "建议扩充") if advice["extend"] else say("Do not extend", "不建议扩充")
    return {"verdict": verdict, "reasons": advice["reasons"]}


def _gain(points: list[dict[str, Any]]) -> dict[str, Any]:
    """What more pieces bring: two curves over their number, and the same as a table."""
    pieces = say("pieces added", "增加的词数")
    shorter = [(point["pieces"], point["characters_per_token"]) for point in points]
    cost = [(point["pieces"], point["cost"]) for point in points]
    cost_label = say("cost of a character, head included; the base is 1", "处理一个字的成本（含输出层），底座为 1")
    head = (pieces, say("characters per token", "字/token"), say("cost", "成本"), say("learnable", "可学"))
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
            curve(shorter, pieces, say("characters per token", "每个 token 的字数")),
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
    out = [(ratio, say("characters per token", "每个 token 的字数"))]
    sizes = report["sizes"]
    grown = f" → {sizes['after']:,}" if "after" in sizes else ""
    out.append((f"{sizes['before']:,}{grown}", say("tokens in the vocabulary", "词表大小")))
    if rows := report.get("rows"):
        out.append(
            (f"{rows['filled']:,} + {rows['added']:,}", say("spare rows filled + rows added", "填充的空行 + 新增行"))
        )
    if kept := report.get("kept"):
        out.append(
            (
                f"{kept['source_changed']} / {kept['source_texts']:,}",
                say("old texts with other ids", "旧文本 id 改变数"),
            )
        )
        out.append((f"{kept['new_round_trip_failures']}", say("new round-trip failures", "新增的往返失败")))
    if bits := report.get("bits_per_byte"):
        base, grown = list(bits.values())[:2]
        out.append((f"{base:.2f} → {grown:.2f}", say("bits per byte, untrained", "未训练时 bits per byte")))
    return out


def _fertility(texts: dict[str, Any]) -> Table:
    rows = []
    for name, found in texts.items():
        old, new = found["before"], found.get("after")
        for unit, label in (
            ("characters_per_token", say("characters per token", "字/token")),
            ("bytes_per_token", say("bytes per token", "字节/token")),
        ):
            row = [f"{name}: {label}", f"{old[unit]:.3f}"]
            rows.append([*row, f"{new[unit]:.3f}", f"{new[unit] / old[unit]:.2f} x"] if new else row)
    head = [say("text", "文本"), say("before", "之前")]
    if any(found.get("after") for found in texts.values()):
        head += [say("after", "之后"), ""]
    return head, rows


def _kept(kept: dict[str, Any]) -> Table:
    labels = {
        "source_texts": say("texts without the script", "不含该文字的文本"),
        "source_changed": say("of these with other ids", "其中 id 改变的"),
        "round_trips": say("texts decoded again", "往返检查的文本"),
        "new_round_trip_failures": say("that the base gives back and this does not", "底座能还原而现在不能的"),
        "pieces": say("new pieces", "新词"),
        "occur": say("that occur in the sample", "在样本中出现的"),
        "unreachable": say("that can never be produced", "永远不会产生的"),
        "beginnings": say("beginnings of a character", "字符的前半部分"),
        "speed": say("time to encode a text, the base is 1", "编码同一文本的时间，底座为 1"),
        "fast_disagrees": say("texts that tokenizer.json encodes in another way", "tokenizer.json 编码不同的文本"),
    }
    rows = [
        (label, f"{kept[name]:,}" if isinstance(kept[name], int) else f"{kept[name]:.3g}")
        for name, label in labels.items()
        if kept.get(name) is not None
    ]
    return ("", ""), rows
