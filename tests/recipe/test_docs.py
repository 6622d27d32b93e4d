"""The tables of settings come from the schema, complete and in both languages."""

from __future__ import annotations

import re

from tongwen.core.i18n import _, use_language
from tongwen.recipe.docs import about, sections, settings, to_markdown


def test_every_setting_has_help_in_both_languages() -> None:
    for name, model in sections():
        with use_language("zh"):
            assert re.search("[\u4e00-\u9fff]", _(about(model))), name
        for key, field in model.model_fields.items():
            assert field.description, f"{name}.{key}"
            with use_language("zh"):
                assert re.search("[\u4e00-\u9fff]", _(field.description)), f"{name}.{key}"
        assert list(settings(model))
    assert "| `learning_rate` |" in to_markdown()


def test_types_and_defaults_use_plain_names() -> None:
    page = to_markdown()
    assert "| `documents` | `list of source` |" in page and "| `at_most` | `spending limits` |" in page
    assert "| `tasks` | `list of task` | `[{'task': 'bits_per_byte'}]` |" in page
