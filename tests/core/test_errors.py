"""Errors carry the exit code of the command line."""

from __future__ import annotations

from tongwen.core.errors import DataError, ModelError, RecipeError, SeveralErrors


def test_several_errors_use_the_lowest_exit_code() -> None:
    assert SeveralErrors([ModelError("m"), DataError("d")]).exit_code == 3
    assert SeveralErrors([DataError("d"), RecipeError("r")]).exit_code == 2
