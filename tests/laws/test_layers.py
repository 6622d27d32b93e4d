"""The walls of the house: who may import whom, and that the front door stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import insist

SOURCE = Path(__file__).parents[2] / "src" / "tongwen"
ROOMS = ("hub", "data", "vocab", "model", "train", "infer", "export", "serving", "migrate")
HALL = ("core",)
UPPER = ("cli", "commands", "workflows", "__main__", "__init__")
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "matplotlib",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "tokenizers",
    "sacrebleu",
    "rouge_score",
    "seqeval",
    "jieba",
}


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(file: Path) -> set[str]:
    """First part of every import of our own: `tongwen.data.prepare_steps.x` -> data."""
    return {name.split(".")[1] for name in imports(file) if name.startswith("tongwen.")}


def test_every_file_has_a_place() -> None:
    for file in SOURCE.rglob("*.py"):
        top = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        assert top in (*ROOMS, *HALL, *UPPER, "stages", "commands", "recipe"), f"{file} belongs nowhere"


def test_rooms_do_not_know_each_other() -> None:
    for room in ROOMS:
        for file in (SOURCE / room).rglob("*.py"):
            strange = ours(file) - {room, "recipe", "__version__", *HALL}
            assert not strange, f"{file} imports {strange}"


def test_stages_do_not_know_each_other() -> None:
    for file in (SOURCE / "stages").glob("*.py"):
        assert "stages" not in ours(file), f"{file} imports another stage"


def test_the_hall_is_plain_python() -> None:
    files = [*(SOURCE / "core").glob("*.py"), *(SOURCE / "recipe").glob("*.py")]
    for file in files:
        heavy = {name.split(".")[0] for name in imports(file)} & HEAVY
        assert not heavy, f"{file} imports {heavy}"
        allowed = {"recipe", "__version__", *HALL} if file.parent.name == "recipe" else {*HALL, "__version__"}
        assert not ours(file) - allowed, f"{file} imports {ours(file) - allowed}"
    assert not ours(SOURCE / "core" / "errors.py") - {"core"}


def test_no_mutual_imports_inside_a_room() -> None:
    for room in (*ROOMS, "recipe"):
        edges = {
            file.stem: {name.split(".")[2] for name in imports(file) if name.startswith(f"tongwen.{room}.")}
            for file in (SOURCE / room).glob("*.py")
        }
        for one, others in edges.items():
            for other in others:
                assert one not in edges.get(other, ()), f"{room}: {one} and {other} import each other"


def test_nothing_unpickles_or_runs_foreign_code() -> None:
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"), (
                f"{file}: {name}"
            )
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name == "torch.load":
                assert ast.unparse(keywords["weights_only"]) == "True", file
            if "trust_remote_code" in keywords:
                assert ast.unparse(keywords["trust_remote_code"]) == "False", file


def test_help_and_check_import_no_torch(tmp_path: Path) -> None:
    rows = "".join(
        f'{{"instruction": "问{number}", "input": "", "output": "答{number}"}}\n' for number in range(10_000)
    )
    (tmp_path / "data.jsonl").write_text(rows, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: big\nbase: nowhere\nprepare: {{dialogues: {tmp_path / 'data.jsonl'}}}\nsft: {{}}\n")
    code = (
        "import sys; from tongwen.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', HEAVY} & set(sys.modules), 'heavy'"
    )
    for heavy, arguments in (("'numpy'", ["--help"]), ("'huggingface_hub'", ["check", str(recipe)])):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("HEAVY", heavy), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_a_merge_imports_neither_torch_nor_the_recipe() -> None:
    """Both cost a small model's merge more than its arithmetic."""
    code = (
        "import sys, tongwen.stages.merge; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("Skipped: deepspeed is not installed", "failed"),
        ("Skipped: could not import 'tensorboard.backend': No module", "failed"),
        ("Skipped: could not import 'lm_eval': No module", "skipped"),
        ("Skipped: needs a GPU", "skipped"),
    ],
)
def test_a_package_that_ci_installs_is_no_reason_to_skip(
    reason: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for may_lack, found in ((None, "skipped"), ("lm_eval strace", outcome)):
        report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("test_x.py", 1, reason))
        if may_lack is not None:
            monkeypatch.setenv("TONGWEN_MAY_LACK", may_lack)
        else:
            monkeypatch.delenv("TONGWEN_MAY_LACK", raising=False)
        assert insist(report).outcome == found
