"""What a run leaves for people: report.html, which asks nothing of the network, and a few lines in the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tongwen.core import console
from tongwen.core.console import human_bytes, human_count, human_time
from tongwen.core.html import Table, curve, render
from tongwen.core.i18n import say
from tongwen.train.loss_plot import is_installed, write_png


def write_report(folder: Path, title: str, report: dict[str, Any], metrics: list[dict[str, Any]], recipe: str) -> None:
    """report.html, and loss.png where matplotlib is installed.

    report: what report.json holds; metrics: the lines of metrics.jsonl; recipe: the resolved one.
    """
    held_out, through = report.get("held_out") or {}, report["throughput"]
    facts = [
        (f"{_change(held_out)}", say("held-out bits per byte", "留出集 bits per byte")),
        (
            f"{report['trainable']['share']:.2%}",
            say(
                f"trained: {human_count(report['trainable']['parameters'])} parameters",
                f"训练参数 {human_count(report['trainable']['parameters'])}",
            ),
        ),
        (f"{report['mask']['learned_share']:.0%}", say("of the tokens are learned", "的 token 计入损失")),
        (f"{report['mask']['stop_learned_share']:.0%}", say("of the samples learn to stop", "的样本学到停止符")),
        (f"{through['tokens_per_second']:.0f}", say("tokens per second", "token / 秒")),
        (human_time(through["seconds"]), say("training time", "训练时间")),
        (human_bytes(report["peak_memory_bytes"]), say("peak memory", "峰值内存")),
    ]
    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    page = render(
        "train/report.html.jinja",
        title=title,
        summary=report["summary"],
        facts=facts,
        notices=report["notices"],
        headings={
            "groups": say("Held out, by language", "按语言的留出集"),
            "ledger": say("Ledger", "账目"),
            "mask": say("What is learned", "学习内容"),
            "samples": say("Before and after", "训练前后"),
            "recipe": say("Recipe", "配方"),
        },
        curves=_curves(losses, metrics),
        groups=_groups(held_out["groups"], metrics) if held_out.get("groups") else None,
        ledger=[_ledger(name, table) for name, table in report["ledger"].items()],
        roles=_roles(report["mask"]["roles"]),
        lengths=_lengths(report["mask"]["lengths"]),
        samples=[(sample["question"], _answers(sample)) for sample in report.get("samples") or ()],
        recipe=recipe,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    if is_installed():
        write_png(folder / "loss.png", title, losses)


def held_out_table(
    old: dict[str, Any] | None, new: dict[str, Any] | None, samples: dict[str, int]
) -> dict[str, Any] | None:
    """The scores of what was held out, before and after, in all and by group. samples: of each group."""
    if old is None or new is None:
        return None
    return {
        "bits_per_byte": {"before": old["bits_per_byte"], "after": new["bits_per_byte"]},
        "loss": {"before": old["loss"], "after": new["loss"]},
        "samples": sum(samples.values()),
        "bytes": new["bytes"],
        "tokens": new["tokens"],
        "groups": {
            name: {
                "bits_per_byte": {"before": old["groups"][name]["bits_per_byte"], "after": one["bits_per_byte"]},
                "samples": samples[name],
                "bytes": one["bytes"],
            }
            for name, one in new["groups"].items()
        },
    }


def _say_change(what: str, scores: dict[str, float]) -> None:
    """Good is what has fallen."""
    change = scores["after"] / scores["before"] - 1 if scores["before"] else math.nan
    tell = console.notice if scores["after"] > scores["before"] else console.good
    tell(f"{what} {scores['before']:.3f} → {scores['after']:.3f} ({change:+.1%})")


def say_result(report: dict[str, Any], out: Path) -> None:
    """What the stage has done, in a few lines."""
    through = report["throughput"]
    if held_out := report["held_out"]:
        _say_change(say("held-out bits per byte", "留出集 bits per byte"), held_out["bits_per_byte"])
        for name, group in held_out["groups"].items():
            _say_change(f"  {name}", group["bits_per_byte"])
    console.good(
        f"{human_time(through['seconds'])} · {through['tokens_per_second']:.0f} token/s · "
        f"{say('peak', '峰值')} {human_bytes(report['peak_memory_bytes'])} · {out / 'report.html'}"
    )


def _change(held_out: dict[str, Any]) -> str:
    scores = held_out.get("bits_per_byte")
    return f"{scores['before']:.3f} → {scores['after']:.3f}" if scores else ""


def _curves(losses: list[tuple[float, float]], metrics: list[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """(heading, drawing): the loss, and what was held out where it was scored on the way."""
    step = say("step", "步")
    drawn = [(say("Loss", "损失"), curve(losses, step, say("nats per learned token", "每个学习 token 的 nats")))]
    scores = [(line["step"], line["bits_per_byte"]) for line in metrics if "bits_per_byte" in line]
    if len(scores) > 1:
        drawn.append((say("Held-out bits per byte", "留出集 bits per byte"), curve(scores, step, "bits per byte")))
    return drawn


def _groups(groups: dict[str, Any], metrics: list[dict[str, Any]]) -> Table:
    """What each language's bits per byte were and have become: what was learned, and what was forgotten."""
    head = (say("language", "语言"), say("before", "训练前"), say("on the way", "途中"), say("after", "训练后"))
    rows = []
    for name, group in groups.items():
        scores, key = group["bits_per_byte"], f"bits_per_byte_{name}"
        way = " · ".join(f"{line[key]:.3f}" for line in metrics if key in line)
        change = f"{scores['after'] / scores['before'] - 1:+.1%}" if scores["before"] else ""
        rows.append((name, f"{scores['before']:.3f}", way, f"{scores['after']:.3f} ({change})"))
    return head, rows


def _ledger(name: str, table: dict[str, Any]) -> dict[str, Any]:
    units, files = list(table["in"]), table.get("files", {})
    entries = [(say("in", "读入"), table["in"])]
    entries += [(f"− {reason}", lost) for reason, lost in table["lost"].items()]
    entries.append((f"= {say('kept', '保留')}", table["kept"]))
    return {
        "head": (name, *units),
        "rows": [(label, *(f"{values[unit]:,}" for unit in units)) for label, values in entries],
        "title": say(f"by file ({len(files)})", f"按文件（{len(files)}）"),
        "files": _files(files) if len(files) > 1 else None,
    }


def _files(files: dict[str, Any]) -> Table:
    """The same by file: rows in, kept, and the reasons of the rest."""
    rows = [
        (name, f"{table['in']['rows']:,}", f"{table['kept']['rows']:,}", _reasons(table["lost"]))
        for name, table in files.items()
    ]
    return (say("file", "文件"), say("rows in", "读入行"), say("kept", "保留"), say("lost", "损失")), rows


def _reasons(lost: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {count['rows']:,}" for reason, count in lost.items())


def _roles(roles: dict[str, Any]) -> Table:
    """Tokens per role with the learned share."""
    rows = [
        (role, f"{count['tokens']:,}", f"{count['learned'] / max(1, count['tokens']):.1%}")
        for role, count in roles.items()
    ]
    return (say("role", "角色"), "token", say("learned", "学习")), rows


def _lengths(lengths: list[tuple[int, int]]) -> dict[str, Any]:
    """How long the samples are, with a bar for each length."""
    most = max(count for _, count in lengths)
    return {
        "head": ("token", say("samples", "样本"), ""),
        "rows": [(f"≤ {edge:,}", f"{count:,}", f"{count / most * 16:.2f}") for edge, count in lengths],
    }


def _answers(sample: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (say("before", "训练前"), sample["before"]),
        *((say(f"step {step}", f"第 {step} 步"), answer) for step, answer in sample["on_the_way"].items()),
        (say("after", "训练后"), sample["after"]),
        (say("data", "数据"), sample["wanted"]),
    ]
