"""Values that a field reads from text: durations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.reading import SFT, check_problem


@pytest.mark.parametrize(
    ("text", "line", "value", "remedy"),
    [
        (SFT % "stop_after: 2 weeks", 4, "2 weeks", "epochs"),
        (SFT % "stop_after: 0 epochs", 4, "0 epochs", "epochs"),
        ("name: a\nbase: b\nstop_before: soon\n", 3, "'soon'", "90 minutes"),
    ],
)
def test_each_problem_names_line_value_and_remedy(
    text: str, line: int, value: str, remedy: str, tmp_path: Path
) -> None:
    check_problem(tmp_path, text, line, value, remedy)
