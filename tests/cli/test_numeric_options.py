"""Every numeric option of every command refuses what is no number of its range, with exit code 2 and before anything is opened."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe
from tongwen.cli.parser import make_parser

NO_NUMBERS = ("nan", "inf", "-inf", "1e400", str(10**26), f"-{10**26}", "x", "")


def numeric_options() -> Iterator[tuple[list[str], argparse.ArgumentParser, argparse.Action]]:
    """Yield (words, parser, option) for each option with a type."""
    waiting: list[tuple[list[str], argparse.ArgumentParser]] = [([], make_parser())]
    while waiting:
        words, parser = waiting.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += [([*words, name], one) for name, one in action.choices.items()]
            elif action.type is not None:
                yield words, parser, action


OPTIONS = [(words, parser, action) for words, parser, action in numeric_options() if words]


@pytest.mark.parametrize(
    ("words", "parser", "option"),
    OPTIONS,
    ids=[" ".join([*words, option.option_strings[-1]]) for words, _parser, option in OPTIONS],
)
def test_numbers_out_of_range_are_refused(
    words: list[str],
    parser: argparse.ArgumentParser,
    option: argparse.Action,
    tmp_path: Path,
    tongwen: Any,
    capsys: Any,
) -> None:
    recipe = write_recipe(tmp_path, tmp_path)
    needed: list[str] = []
    for action in parser._actions:
        if action.required and action is not option:
            value = str(recipe) if action.dest == "recipe" else next(iter(action.choices or ["x"]))
            needed += [*action.option_strings[-1:], value]
    name = option.option_strings[-1]
    for value in NO_NUMBERS:
        given = [f"{name}={value}"] if name.startswith("--") else [f"{name}{value}" or name]
        if not name.startswith("--") and not value:
            continue  # `-n` alone takes the next word
        try:
            code, _out, err = tongwen(*words, *needed, *given)
        except SystemExit as stop:
            code, err = stop.code, capsys.readouterr().err
        assert code == 2, f"{given}: {code} {err}"
        assert err.strip() and "Traceback" not in err


def test_there_are_numeric_options() -> None:
    assert len(OPTIONS) > 25
