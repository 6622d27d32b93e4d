"""Write report.html, which loads nothing from the network, and print the result in the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tongwen.core import console
from tongwen.core.console import human_bytes, human_count, human_time
from tongwen.core.html import Table, curve, render
from tongwen.core.i18n import _
from tongwen.train.loss_plot import is_installed, write_png

OWN_ANSWERS = ("divergence", "agreement")  # scores on the base's own answers


def write_report(folder: Path, title: str, report: dict[str, Any], metrics: list[dict[str, Any]], recipe: str) -> None:
    """Write report.html, and loss.png if matplotlib is installed.

    report: content of report.json; metrics: lines of metrics.jsonl; recipe: the resolved recipe.
    """
    held_out, through = report.get("held_out") or {}, report["throughput"]
    facts = [
        (f"{_change(held_out)}", _("held-out bits per byte")),
        (
            f"{report['trainable']['share']:.2%}",
            _("{parameters} parameters trained").format(parameters=human_count(report["trainable"]["parameters"])),
        ),
        (f"{report['mask']['learned_share']:.0%}", _("of the tokens count toward the loss")),
        (f"{report['mask']['stop_learned_share']:.0%}", _("of the samples learn to stop")),
        (f"{through['tokens_per_second']:.0f}", _("tokens per second")),
        (human_time(through["seconds"]), _("training time")),
        (human_bytes(report["peak_memory_bytes"]), _("peak memory")),
    ]
    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    page = render(
        "train/report.html.jinja",
        title=title,
        summary=report["summary"],
        facts=facts,
        notices=[
            *([_own_answers(own)] if (own := held_out.get("own_answers")) else []),
            *([_preferences(chosen)] if "accuracy" in (chosen := report.get("preferences", {})) else []),
            *report["notices"],
        ],
        headings={
            "groups": _("Held-out data by language"),
            "ledger": _("Ledger"),
            "mask": _("What is learned"),
            "samples": _("Before and after"),
            "recipe": _("Recipe"),
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
    """Return the held-out scores before and after training, in total and by group. samples: count per group."""
    if old is None or new is None:
        return None
    return {
        "bits_per_byte": {"before": old["bits_per_byte"], "after": new["bits_per_byte"]},
        "loss": {"before": old["loss"], "after": new["loss"]},
        **({"own_answers": {name: new[name] for name in OWN_ANSWERS}} if "divergence" in new else {}),
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


def _report_change(label: str, scores: dict[str, float]) -> None:
    """Print a score before and after; lower is better."""
    change = scores["after"] / scores["before"] - 1 if scores["before"] else math.nan
    show = console.notice if scores["after"] > scores["before"] else console.success
    show(f"{label} {scores['before']:.3f} → {scores['after']:.3f} ({change:+.1%})")


def report_result(report: dict[str, Any], out: Path) -> None:
    """Print the result of the stage."""
    through = report["throughput"]
    if held_out := report["held_out"]:
        _report_change(_("held-out bits per byte"), held_out["bits_per_byte"])
        for name, group in held_out["groups"].items():
            _report_change(f"  {name}", group["bits_per_byte"])
        if own := held_out.get("own_answers"):
            console.info(_own_answers(own))
    if (found := report.get("preferences")) and "accuracy" in found:
        show = console.success if found["accuracy"]["after"] > found["accuracy"]["before"] else console.notice
        show(_preferences(found))
    console.success(
        f"{human_time(through['seconds'])} · {through['tokens_per_second']:.0f} token/s · "
        f"{_('peak')} {human_bytes(report['peak_memory_bytes'])} · {out / 'report.html'}"
    )


def _preferences(found: dict[str, Any]) -> str:
    return _(
        "held-out preferences: accuracy {accuracy[before]:.1%} → {accuracy[after]:.1%}, reward margin {margin[before]:.3f} → {margin[after]:.3f}; the chosen answer is the likelier one in {likelier[before]:.1%} → {likelier[after]:.1%}"
    ).format(**found)


def _own_answers(own: dict[str, float]) -> str:
    return _(
        "on the base's own answers: divergence {divergence:.4f} nats per token, the same next token on {agreement:.1%}"
    ).format(**own)


def _change(held_out: dict[str, Any]) -> str:
    scores = held_out.get("bits_per_byte")
    return f"{scores['before']:.3f} → {scores['after']:.3f}" if scores else ""


def _curves(losses: list[tuple[float, float]], metrics: list[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """Return (heading, drawing) of the loss, and of the held-out scores if there are several."""
    step = _("step")
    drawn = [(_("Loss"), curve(losses, step, _("nats per learned token")))]
    scores = [(line["step"], line["bits_per_byte"]) for line in metrics if "bits_per_byte" in line]
    if len(scores) > 1:
        drawn.append((_("Held-out bits per byte"), curve(scores, step, "bits per byte")))
    return drawn


def _groups(groups: dict[str, Any], metrics: list[dict[str, Any]]) -> Table:
    """Return the table of each language's bits per byte before, during and after training."""
    head = (_("language"), _("before"), _("during training"), _("after"))
    rows = []
    for name, group in groups.items():
        scores, key = group["bits_per_byte"], f"bits_per_byte_{name}"
        way = " · ".join(f"{line[key]:.3f}" for line in metrics if key in line)
        change = f"{scores['after'] / scores['before'] - 1:+.1%}" if scores["before"] else ""
        rows.append((name, f"{scores['before']:.3f}", way, f"{scores['after']:.3f} ({change})"))
    return head, rows


def _ledger(name: str, table: dict[str, Any]) -> dict[str, Any]:
    units, files = list(table["in"]), table.get("files", {})
    entries = [(_("in"), table["in"])]
    entries += [(f"− {reason}", lost) for reason, lost in table["lost"].items()]
    entries.append((f"= {_('kept')}", table["kept"]))
    return {
        "head": (name, *units),
        "rows": [(label, *(f"{values[unit]:,}" for unit in units)) for label, values in entries],
        "title": _("by file ({count})").format(count=len(files)),
        "files": _files(files) if len(files) > 1 else None,
    }


def _files(files: dict[str, Any]) -> Table:
    """Return the ledger by file: rows in, rows kept, and why the others were lost."""
    rows = [
        (name, f"{table['in']['rows']:,}", f"{table['kept']['rows']:,}", _reasons(table["lost"]))
        for name, table in files.items()
    ]
    return (_("file"), _("rows in"), _("kept"), _("lost")), rows


def _reasons(lost: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {count['rows']:,}" for reason, count in lost.items())


def _roles(roles: dict[str, Any]) -> Table:
    """Return the table of tokens per role with the learned share."""
    rows = [
        (role, f"{count['tokens']:,}", f"{count['learned'] / max(1, count['tokens']):.1%}")
        for role, count in roles.items()
    ]
    return (_("role"), "token", _("learned")), rows


def _lengths(lengths: list[tuple[int, int]]) -> dict[str, Any]:
    """Return the histogram of sample lengths."""
    most = max(count for _, count in lengths)
    return {
        "head": ("token", _("samples"), ""),
        "rows": [(f"≤ {edge:,}", f"{count:,}", f"{count / most * 16:.2f}") for edge, count in lengths],
    }


def _answers(sample: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (_("before"), sample["before"]),
        *((_("step {step}").format(step=step), answer) for step, answer in sample["on_the_way"].items()),
        (_("after"), sample["after"]),
        (_("data"), sample["wanted"]),
    ]
