"""Engine files, and the environment of a launcher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_rows
from tongwen.recipe.load import load_recipe
from tongwen.train import parallel


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **settings}}


def fsdp(settings: str, beside: str = "") -> str:
    return f"distributed_type: FSDP\n{beside}fsdp_config: {{{settings}}}\n"


def recipe(folder: Path, settings: Any, sft: str = "") -> Path:
    """A recipe whose engine is a file with these settings, or a word."""
    word = settings
    if isinstance(settings, str) and settings.startswith("engine."):
        name, text = settings.split(": ")
        (folder / name).write_text(text)
        word = str(folder / name)
    elif isinstance(settings, dict) or "\n" in settings:
        file = folder / ("engine.json" if isinstance(settings, dict) else "engine.yaml")
        file.write_text(json.dumps(settings) if isinstance(settings, dict) else settings)
        word = str(file)
    data = write_rows(folder / "data.jsonl", [])
    out = folder / "recipe.yaml"
    out.write_text(f"name: x\nbase: y\nprepare: {{dialogues: {data}}}\nsft: {{engine: {word}{sft}}}\n")
    return out


def set_launcher_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(parallel.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(parallel, "_prepare_deepspeed", lambda zero, place: None)


def read(file: Path) -> tuple[Any, str]:
    made, notices = load_recipe(file)
    return made.sft, "\n".join(notices)
