"""Whether a base looks like an instruct model, from its name and its stored chat template alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

NAME_OF_INSTRUCT = re.compile(r"instruct|chat|-it\b", re.IGNORECASE)
CONTROL_TOKEN = re.compile(r"<[|｜]|\[INST\]|<start_of_turn>")  # what chat templates mark their turns with


def is_instruct(base: str, template: str) -> bool:
    """Return whether a base looks like an instruct model, by its name or by control tokens in its chat template."""
    return bool(NAME_OF_INSTRUCT.search(Path(base).name) or CONTROL_TOKEN.search(template))


def stored_template(folder: Path) -> str:
    """Return the chat template in a model folder; "" if there is none, or several."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    try:
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return template if isinstance(template, str) else ""
