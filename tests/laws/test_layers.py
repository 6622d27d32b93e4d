"""Layers: which folder may import which, without loops, and that starting a command stays light."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import require_packages

SOURCE = Path(__file__).parents[2] / "src" / "tongwen"
DATA = Path(__file__).parents[1] / "data" / "v0.1"  # among others a run that is finished
MIDDLE = ("data", "model", "train", "vocab", "infer", "export", "hub", "serving", "migrate")
# The tongwen folders that a folder may import, besides itself. Every folder of the package is listed; no other module may be
# at the top level.
LAYERS = {
    "core": (),
    "recipe": ("core",),
    **dict.fromkeys(MIDDLE, ("core", "recipe")),
    "workflows": ("core", "recipe", *MIDDLE),
    "stages": ("core", "recipe", *MIDDLE, "workflows"),
    "commands": ("core", "recipe", *MIDDLE, "workflows"),
    "cli": ("core", "recipe", *MIDDLE, "workflows", "stages", "commands"),
}
FLAT = {"__init__.py", "__main__.py", "api.py"}
# The light layers are plain Python: whatever asks for one of these does it inside a function.
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
    """Return every dotted name that a file imports, including inside functions."""
    return names_in(ast.parse(file.read_text(encoding="utf-8")))


def names_in(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in sorted(SOURCE.rglob("*.py"))}


def module_edges() -> dict[str, set[str]]:
    """Return module -> tongwen modules that it imports."""
    edges = dict[str, set[str]]()
    for name, file in MODULES.items():
        found = {
            one if one in MODULES else one.rpartition(".")[0] for one in imports(file) if one != "tongwen.__version__"
        }
        edges[name] = {one for one in found if one in MODULES} - {name}
    return edges


def folder_edges() -> dict[str, set[str]]:
    """Return folder -> tongwen folders that its files import, as dotted names below `tongwen`."""

    def folder(module: str) -> str:
        file = MODULES[module]
        return ".".join(file.relative_to(SOURCE).parent.parts)

    edges: dict[str, set[str]] = {}
    for name, others in module_edges().items():
        edges.setdefault(folder(name), set()).update(folder(other) for other in others)
    return {name: others - {name, ""} for name, others in edges.items() if name}


def find_loop(edges: dict[str, set[str]]) -> list[str]:
    """Return the names on an import loop, in order; empty when there is none."""
    done: set[str] = set()
    for start in edges:
        path, ways = [start], [iter(sorted(edges.get(start, ())))]
        while ways:
            following = next(ways[-1], None)
            if following is None:
                done.add(path.pop())
                ways.pop()
            elif following in path:
                return [*path[path.index(following) :], following]
            elif following not in done:
                path.append(following)
                ways.append(iter(sorted(edges.get(following, ()))))
    return []


def longest_chain(edges: dict[str, set[str]]) -> list[str]:
    """Return the longest import chain between folders. There must be no loop."""
    known: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in known:
            below = max((chain(other) for other in sorted(edges.get(name, ()))), key=len, default=[])
            known[name] = [name, *below]
        return known[name]

    return max((chain(name) for name in sorted(edges)), key=len)


def test_folders_import_only_lower_layers() -> None:
    assert {file.name for file in SOURCE.glob("*.py")} <= FLAT
    assert {folder.name for folder in SOURCE.iterdir() if any(folder.glob("*.py"))} == {*LAYERS}
    for name, file in MODULES.items():
        top = name.split(".")[1] if "." in name else ""
        if top not in LAYERS:
            continue
        found = {one.split(".")[1] for one in imports(file) if one.startswith("tongwen.")} - {top, "__version__"}
        assert found <= {*LAYERS[top]}, f"{file} imports {found - {*LAYERS[top]}}"


def test_no_import_cycles() -> None:
    assert find_loop({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert find_loop({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert not find_loop(module_edges())
    assert not find_loop(folder_edges())


def test_import_chain_has_at_most_eight_folders() -> None:
    chain = longest_chain(folder_edges())
    assert len(chain) <= 8, " -> ".join(chain)


def test_class_names_are_unique() -> None:
    found = dict[str, str]()
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert node.name not in found, f"{node.name} is in {found.get(node.name)} and {name}"
                found[node.name] = name


def test_no_function_is_longer_than_a_hundred_lines() -> None:
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 100, f"{file}: {node.name} has {length} lines"


def test_light_layers_import_no_heavy_package() -> None:
    for folder in ("core", "recipe", "cli", "stages"):
        for file in (SOURCE / folder).rglob("*.py"):
            body = ast.parse(file.read_text(encoding="utf-8")).body
            top = ast.Module([node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
            heavy = {one.split(".")[0] for one in names_in(top)} & HEAVY
            assert not heavy, f"{file} imports {heavy} at its top"


def test_no_code_unpickles_or_runs_remote_code() -> None:
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


def imported_by(code: str, *arguments: object, folder: Path | None = None) -> set[str]:
    """Return the modules that a fresh Python has imported after running this code."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys\n{code}\nsys.stderr.write('\\n' + ' '.join(sys.modules))",
            *map(str, arguments),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


COMMAND = """from tongwen.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
assert code == 0"""


def test_help_and_check_import_no_torch(tmp_path: Path) -> None:
    rows = "".join(
        f'{{"instruction": "问{number}", "input": "", "output": "答{number}"}}\n' for number in range(10_000)
    )
    (tmp_path / "data.jsonl").write_text(rows, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: big\nbase: nowhere\nprepare: {{dialogues: {tmp_path / 'data.jsonl'}}}\nsft: {{}}\n")
    assert not {"torch", "transformers", "numpy"} & imported_by(COMMAND, "--help")
    assert not {"torch", "transformers", "huggingface_hub"} & imported_by(COMMAND, "check", recipe)


def copy_of_a_run(folder: Path) -> None:
    for name in ("sft.yaml", "finished", "base", "dialogues.jsonl"):
        copy = shutil.copytree if (DATA / name).is_dir() else shutil.copyfile
        copy(DATA / name, folder / name)


def test_finished_run_imports_no_heavy_package(tmp_path: Path) -> None:
    copy_of_a_run(tmp_path)
    found = imported_by(COMMAND, "run", "finished/recipe.yaml", folder=tmp_path)
    assert "tongwen.stages.sft" in found
    assert not {*HEAVY, "psutil", "jinja2"} & found


def test_plan_imports_neither_the_trainer_nor_the_compiler(tmp_path: Path) -> None:
    """The Trainer brings datasets and pandas; bitsandbytes, which peft imports, hands functions to torch's compiler."""
    copy_of_a_run(tmp_path)
    found = imported_by(COMMAND, "plan", "sft.yaml", folder=tmp_path)
    assert {"torch", "peft"} <= found, "it does rehearse a step"
    assert not {"transformers.trainer", "datasets", "pandas", "deepspeed", "torch._inductor.compile_fx"} & found


@pytest.mark.parametrize(
    ("command", "needs"), [("show_runs", ""), ("tokenizer", "tokenizers numpy"), ("web", "tokenizers numpy")]
)
def test_commands_without_a_model_import_no_torch(command: str, needs: str) -> None:
    found = imported_by(f"import tongwen.commands.{command}")
    assert not ({*HEAVY} - {*needs.split()}) & found


def test_merge_imports_neither_torch_nor_the_recipe() -> None:
    """For a small model, each of these imports takes longer than the merge itself."""
    assert not {"torch", "transformers", "pydantic"} & imported_by("import tongwen.commands.merge")


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("Skipped: deepspeed is not installed", "failed"),
        ("Skipped: could not import 'tensorboard.backend': No module", "failed"),
        ("Skipped: could not import 'lm_eval': No module", "skipped"),
        ("Skipped: needs a GPU", "skipped"),
    ],
)
def test_missing_ci_package_fails_instead_of_skipping(
    reason: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for may_lack, found in ((None, "skipped"), ("lm_eval strace", outcome)):
        report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("test_x.py", 1, reason))
        if may_lack is not None:
            monkeypatch.setenv("TONGWEN_MAY_LACK", may_lack)
        else:
            monkeypatch.delenv("TONGWEN_MAY_LACK", raising=False)
        assert require_packages(report).outcome == found
