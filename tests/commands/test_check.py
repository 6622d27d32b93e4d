"""`tongwen check`: what it advises before a model is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tongwen.cli.main import main


def test_keep_is_advised_where_an_instruct_model_reads_plain_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "a.txt").write_text("今天天气很好。\n" * 20, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"

    def advice(template: str, keep: str = "") -> bool:
        (base / "chat_template.jinja").write_text(template, encoding="utf-8")
        recipe.write_text(
            f"name: a\nbase: {base}\nout: {tmp_path / 'out'}\nprepare: {{documents: {tmp_path / 'a.txt'}}}\npretrain: {{{keep}}}\n",
            encoding="utf-8",
        )
        assert main(["check", str(recipe)]) == 0
        return "keep: 0.5" in "".join(capsys.readouterr())

    assert advice("<|im_start|>{{ messages }}")
    assert not advice("<|im_start|>{{ messages }}", "keep: 0.1")
    assert not advice("{{ messages }}")
