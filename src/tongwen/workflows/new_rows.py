"""Which rows of a base the vocabulary stage added: they are untrained."""

from __future__ import annotations

import json
from pathlib import Path

from tongwen.core import artifact
from tongwen.core.errors import ModelError
from tongwen.core.i18n import _

NEW_ROWS = "new_rows.json"  # beside a model whose vocabulary was extended


def are_rows_untrained(base: str) -> bool:
    """Return whether a base is the output of the vocabulary stage, so that its new rows are untrained."""
    made = artifact.find(Path(base))
    return made is not None and made.kind == "vocab"


def new_rows_of(base: str) -> list[int]:
    """Return the ids that the vocabulary stage added to this base. Raises ModelError if new_rows.json lists none."""
    file = Path(base) / NEW_ROWS
    try:
        rows = [int(row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        rows = []
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(_("cannot be read: {error}").format(error=error), place=str(file)) from None
    if not rows:
        raise ModelError(
            _("`train: new_rows` needs a base with an extended vocabulary, but new_rows.json lists no new rows"),
            place=str(file),
            remedy=_("add a `vocab` section before it, or train: embeddings"),
        )
    return rows
