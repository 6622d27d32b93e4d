"""Open a tokenizer.json that may be damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tongwen.core.errors import ModelError, first_line
from tongwen.core.i18n import _


def open_definition(definition: Mapping[str, Any], place: str) -> Any:
    """Return the tokenizer of a tokenizer.json's content. Raises ModelError if it is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises plain Exceptions
        raise ModelError(
            _("it is not a tokenizer: {reason}").format(reason=first_line(error)[:200]), place=place
        ) from None
