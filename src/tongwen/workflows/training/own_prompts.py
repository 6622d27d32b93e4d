"""The prompts that the base answers before training, so that it can be seen how far training moves it from its answers."""

from __future__ import annotations

from importlib.resources import files

MAX_NEW_TOKENS = 64  # tokens of an answer


def own_prompts() -> list[str]:
    return files(__package__).joinpath("own_prompts.txt").read_text(encoding="utf-8").splitlines()
