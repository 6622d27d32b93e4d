"""The parser of the command line: its help, what it suggests after a mistake, and where it says the documentation is."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

from tongwen.cli import parser
from tongwen.cli.main import main

ROOT = Path(__file__).parents[2]
FILES = {file.stem for file in (ROOT / "src" / "tongwen" / "cli").glob("*.py")}
COMMANDS = sorted(
    name for name in FILES - {"__init__", "localized_parser", "main", "parser"} if not name.endswith("_arguments")
)
LANGUAGES = ("en", "zh")


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TONGWEN_LANG", request.param)
    monkeypatch.setenv("COLUMNS", "80")
    return str(request.param)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error message of a command line that the parser refuses, without the usage before it."""
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    return re.split(" error: |：错误：", err, maxsplit=1)[1]


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def test_no_arguments_print_the_help(language: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr() == alone and not alone.err
    assert sorted(re.findall(r"^  ([a-z]+) +\S", alone.out, re.MULTILINE)) == COMMANDS


def test_help_lists_each_command_on_one_line_of_80_columns(language: str) -> None:
    text = parser.make_parser().format_help()
    for line in text.splitlines():
        assert columns(line) <= 80 or str(ROOT) in line, line
    groups = parser.command_groups()
    assert len(groups) == 4
    for title, commands in groups.items():
        listed = text.partition(f"{title}:\n")[2].partition("\n\n")[0].splitlines()
        assert [line.split()[0] for line in listed] == list(commands)
        assert len(commands) <= 7, "a group that is read at a glance"


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["rnu"], "run"),
        (["tokeniser", "train"], "tokenizer"),
        (["tokenizer", "extned"], "extend"),
        (["run", "recipe.yaml", "--agian"], "--again"),
        (["run", "recipe.yaml", "sft.seed=1", "--form=sft"], "--from"),
        (["tokenizer", "report", "--base", "a", "--text", "b", "--ohter", "c"], "--other"),
    ],
)
def test_mistyped_name_suggests_the_nearest(
    argv: list[str], nearest: str, language: str, capsys: pytest.CaptureFixture[str]
) -> None:
    suggestion = {"en": f"did you mean {nearest}?", "zh": f"是否想写 {nearest}？"}[language]
    assert refused(capsys, *argv).splitlines()[-1] == f"  → {suggestion}"


@pytest.mark.parametrize(
    ("argv", "help_"),
    [(["xyzzy"], "tongwen --help"), (["run", "recipe.yaml", "--xyzzy"], "tongwen run --help")],
)
def test_unknown_name_without_match_points_to_the_help(
    argv: list[str], help_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *argv)
    assert "xyzzy" in message and message.endswith(f"  → `{help_}` lists all\n")


@pytest.mark.parametrize(
    ("argv", "required"),
    [
        ("run", "RECIPE"),
        ("check", "RECIPE"),
        ("plan", "RECIPE"),
        ("look", "RECIPE"),
        ("launch", "RECIPE, --to, --out"),
        ("merge", "--base, --out"),
        ("convert", "SRC, --to, --out"),
        ("verify", "PATH"),
        ("sign", "PATH, --key"),
        ("show", "PATH"),
        ("generate", "--model, --prompts, --out"),
        ("evaluate", "--model, --task"),
        ("chat", "MODEL"),
        ("serve", "MODEL"),
        ("tokenizer", "TASK"),
        ("tokenizer train", "--out, --corpus, --pieces"),
    ],
)
def test_missing_required_arguments_are_listed(argv: str, required: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *argv.split()) == f"the following arguments are required: {required}\n"


def test_overrides_are_accepted_anywhere_after_the_recipe() -> None:
    for argv in (["r.yaml", "a.b=1", "c.d=2", "--again"], ["r.yaml", "a.b=1", "--again", "c.d=2"]):
        arguments = parser.parse(["run", *argv])
        assert arguments.again and arguments.overrides == ["a.b=1", "c.d=2"]
    assert parser.parse(["run", "r.yaml"]).overrides == [], "the overrides of one parse are not those of the next"


# -- the documentation ------------------------------------------------------------------------------------------------


def in_the_wheel() -> dict[str, str]:
    """Path in the repository -> path in the wheel, of what pyproject.toml adds to the modules."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[tool.hatch.build.targets.wheel.force-include]")[2].partition("\n[")[0]
    return dict(re.findall(r'^"(.+)" = "(.+)"$', section, re.MULTILINE))


def test_help_names_an_existing_readme(language: str) -> None:
    last = parser.make_parser().format_help().rstrip().splitlines()[-1]
    page = Path(re.split("[:：]", last, maxsplit=1)[1].strip())
    assert page == ROOT / {"en": "README.md", "zh": "README_zh.md"}[language]
    assert page.is_file()


def test_help_names_a_readme_of_the_wheel(language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, target in in_the_wheel().items():
        assert (ROOT / source).exists()
        (tmp_path / target).parent.mkdir(exist_ok=True)
        (tmp_path / target).symlink_to(ROOT / source)
    monkeypatch.setattr(parser, "__file__", str(tmp_path / "tongwen" / "cli" / "parser.py"))
    page = parser.readme()
    assert page and page.parent == tmp_path / "tongwen" and page.is_file()
    links = re.findall(r"\]\((docs/[^)#]+)", page.read_text(encoding="utf-8"))
    assert len(links) > 10
    for link in links:
        assert (page.parent / link).is_file(), link
