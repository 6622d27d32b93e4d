"""The chat templates that ship with tongwen, and template files of a user."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources
from pathlib import Path

from tongwen.core.errors import ModelError
from tongwen.core.i18n import _

SHIPPED = (
    "chatml", "alpaca", "alpaca-zh", "plain", "chatglm", "belle", "belle-v2", "alpaca-cla", "alpaca-llamacpp", "guanaco", "guanaco-v1", "guanaco-chat", "vicuna",
)  # fmt: skip
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def shipped_source(name: str) -> str:
    """Return the marked source of a template that ships with tongwen."""
    return (resources.files("tongwen.core") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache(maxsize=16)
def shipped_forms(special: tuple[str, ...]) -> frozenset[str]:
    """Return the sources of our own templates as they are exported with a tokenizer of these special tokens."""
    sources = [GENERATION_TAG.sub("", shipped_source(name)) for name in SHIPPED]
    return frozenset(with_prefix(source, prefix) for source in sources for prefix in ("", *special[:8]))


def with_prefix(source: str, prefix: str) -> str:
    return source.replace("@prefix@", prefix.replace("\\", "\\\\").replace("'", "\\'"))


def read_template(name: str) -> str:
    path = Path(name)
    if path.suffix in (".jinja", ".j2") and path.is_file():
        return path.read_text(encoding="utf-8")
    raise ModelError(
        _("there is no template {name!r}").format(name=name),
        place="template",
        remedy=_("one of: own, {shipped}, or a .jinja file").format(shipped=_(", ").join(SHIPPED)),
    )
