"""Draw the loss curve as an image; needs matplotlib: pip install 'tongwen[plot]'."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tongwen.core.html import running_mean
from tongwen.core.i18n import _, language, use_language


def is_installed() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_png(file: Path, title: str, points: list[tuple[float, float]]) -> None:
    """Write the loss curve as an image, with a Chinese font if one is installed, else with English labels."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    font = cjk_font()
    with use_language(language() if font else "en"):
        xlabel, ylabel = _("step"), _("loss (nats per learned token)")
    if not title.isascii() and font is None:
        title = title.encode("latin-1", "ignore").decode("latin-1")
    with mpl.rc_context(
        {"font.family": [font, "DejaVu Sans"] if font else ["DejaVu Sans"], "axes.unicode_minus": False}
    ):
        figure, axes = plt.subplots(figsize=(8, 4), dpi=120, layout="constrained")
        axes.plot(*zip(*points, strict=True), color="#0f766e", alpha=0.3, linewidth=1)
        axes.plot(*zip(*running_mean(points), strict=True), color="#0f766e", linewidth=2)
        axes.set(
            title=title,
            xlabel=xlabel,
            ylabel=ylabel,
        )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file)
        plt.close(figure)


@cache
def cjk_font() -> str | None:
    """Return the name of an installed font that has Chinese glyphs, or None."""
    from matplotlib import font_manager, ft2font

    preferred = ("notosanscjk", "sourcehan", "wqy", "pingfang", "msyh", "simhei", "heiti", "droidsansfallback")

    def rank(file: str) -> int:
        name = Path(file).name.lower().replace("-", "").replace(" ", "")
        return next((place for place, wanted in enumerate(preferred) if wanted in name), len(preferred))

    # The regular weight of a family first: a curve titled in bold alone makes matplotlib complain.
    for file in sorted(font_manager.findSystemFonts(), key=lambda file: (rank(file), "egular" not in file, file)):
        try:
            font = ft2font.FT2Font(file)
            # A last-resort font has a box for every code point, even for one that Unicode has not assigned.
            if font.get_char_index(ord("同")) and not font.get_char_index(0x0378):
                font_manager.fontManager.addfont(file)
                return str(font.family_name)
        except (RuntimeError, OSError):
            continue
    return None
