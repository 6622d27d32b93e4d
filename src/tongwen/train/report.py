"""What a run leaves for people: report.html, which asks nothing of the network, and a few lines in the terminal."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from tongwen.core import console
from tongwen.core import html as page
from tongwen.core.console import human_bytes, human_count, human_time
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
    scores = [(line["step"], line["bits_per_byte"]) for line in metrics if "bits_per_byte" in line]
    parts = [
        page.cards(facts),
        "".join(f"<p>! {html.escape(text)}</p>" for text in report["notices"]),
        f"<h2>{say('Loss', '损失')}</h2>"
        + page.curve(losses, say("step", "步"), say("nats per learned token", "每个学习 token 的 nats")),
    ]
    if len(scores) > 1:
        parts.append(
            f"<h2>{say('Held-out bits per byte', '留出集 bits per byte')}</h2>"
            + page.curve(scores, say("step", "步"), "bits per byte")
        )
    if held_out.get("groups"):
        parts.append(f"<h2>{say('Held out, by language', '按语言的留出集')}</h2>{_groups(held_out['groups'], metrics)}")
    parts.append(
        f"<h2>{say('Ledger', '账目')}</h2>" + "".join(_ledger(name, table) for name, table in report["ledger"].items())
    )
    parts.append(f"<h2>{say('What is learned', '学习内容')}</h2>{_mask(report['mask'])}")
    if report.get("samples"):
        parts.append(f"<h2>{say('Before and after', '训练前后')}</h2>" + "".join(map(_sample, report["samples"])))
    parts.append(f"<h2>{say('Recipe', '配方')}</h2><pre>{html.escape(recipe)}</pre>")
    (folder / "report.html").write_text(page.document(title, report["summary"], parts), encoding="utf-8")
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


def _groups(groups: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """What each language's bits per byte were and have become: what was learned, and what was forgotten."""
    head = (say("language", "语言"), say("before", "训练前"), say("on the way", "途中"), say("after", "训练后"))
    rows = ""
    for name, group in groups.items():
        scores, key = group["bits_per_byte"], f"bits_per_byte_{name}"
        way = " · ".join(f"{line[key]:.3f}" for line in metrics if key in line)
        change = f"{scores['after'] / scores['before'] - 1:+.1%}" if scores["before"] else ""
        rows += (
            f"<tr><td>{html.escape(name)}</td><td class=n>{scores['before']:.3f}</td><td class=n>{way}</td>"
            f"<td class=n>{scores['after']:.3f} ({change})</td></tr>"
        )
    cells = f"<th>{head[0]}</th>" + "".join(f"<th class=n>{word}</th>" for word in head[1:])
    return f"<div class=scroll><table><tr>{cells}</tr>{rows}</table></div>"


def _ledger(name: str, table: dict[str, Any]) -> str:
    units = list(table["in"])
    head = (
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<th class=n>{html.escape(unit)}</th>" for unit in units)
        + "</tr>"
    )
    rows = [(say("in", "读入"), table["in"])]
    rows += [(f"− {reason}", lost) for reason, lost in table["lost"].items()]
    rows.append((f"= {say('kept', '保留')}", table["kept"]))
    body = "".join(
        f"<tr><td>{html.escape(label)}</td>" + "".join(f"<td class=n>{values[unit]:,}</td>" for unit in units) + "</tr>"
        for label, values in rows
    )
    files = table.get("files", {})
    return f"<div class=scroll><table>{head}{body}</table></div>{_files(files) if len(files) > 1 else ''}"


def _files(files: dict[str, Any]) -> str:
    """The same by file: rows in, kept, and the reasons of the rest."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{table['in']['rows']:,}</td><td class=n>{table['kept']['rows']:,}</td>"
        f"<td>{html.escape(_reasons(table['lost']))}</td></tr>"
        for name, table in files.items()
    )
    head = (say("file", "文件"), say("rows in", "读入行"), say("kept", "保留"), say("lost", "损失"))
    cells = f"<th>{head[0]}</th><th class=n>{head[1]}</th><th class=n>{head[2]}</th><th>{head[3]}</th>"
    title = say(f"by file ({len(files)})", f"按文件（{len(files)}）")
    return f"<details><summary>{title}</summary><div class=scroll><table><tr>{cells}</tr>{rows}</table></div></details>"


def _reasons(lost: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {count['rows']:,}" for reason, count in lost.items())


def _mask(mask: dict[str, Any]) -> str:
    """Tokens per role with the learned share, and how long the samples are."""
    head = f"<tr><th>{say('role', '角色')}</th><th class=n>token</th><th class=n>{say('learned', '学习')}</th></tr>"
    rows = "".join(
        f"<tr><td>{role}</td><td class=n>{count['tokens']:,}</td>"
        f"<td class=n>{count['learned'] / max(1, count['tokens']):.1%}</td></tr>"
        for role, count in mask["roles"].items()
    )
    most = max(count for _, count in mask["lengths"])
    bars = "".join(
        f"<tr><td class=n>≤ {edge:,}</td><td class=n>{count:,}</td>"
        f'<td><div class=bar style="width:{count / most * 16:.2f}rem"></div></td></tr>'
        for edge, count in mask["lengths"]
    )
    title = f"<tr><th class=n>token</th><th class=n>{say('samples', '样本')}</th><th></th></tr>"
    return f"<div class=scroll><table>{head}{rows}</table></div><div class=scroll><table>{title}{bars}</table></div>"


def _sample(sample: dict[str, Any]) -> str:
    way = sample["on_the_way"].items()
    rows = (
        (say("before", "训练前"), sample["before"]),
        *((say(f"step {step}", f"第 {step} 步"), answer) for step, answer in way),
        (say("after", "训练后"), sample["after"]),
        (say("data", "数据"), sample["wanted"]),
    )
    inside = "".join(
        f"<div><span class=soft>{label}</span><span>{html.escape(text)}</span></div>" for label, text in rows
    )
    return f"<section class=qa><h3>{html.escape(sample['question'])}</h3>{inside}</section>"
