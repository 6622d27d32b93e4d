"""No output replaces or moves what tongwen did not write: what is refused is refused with 2, and every file is as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import dialogues, write_rows
from tongwen.core import artifact, originals
from tongwen.core.errors import ArtifactError, RecipeError


def seen(folder: Path) -> dict[str, Any]:
    """Return every path below a folder with its bytes, or where it links to."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, an adapter, a hub's cache, data, and the folder that a command is called from."""
    home = tmp_path / "home"
    files = {
        "model/config.json": '{"model_type": "llama"}',
        "model/model.safetensors": "weights",
        "adapter/adapter_config.json": "{}",
        "old/pytorch_model.bin": "weights",
        "pth/consolidated.00.pth": "weights",
        "hub/models--a--b/snapshots/1/README.md": "",
        "hub/models--a--b/blobs/2": "",
        "project/config.json": '{"theme": "dark"}',
        "data/a.jsonl": "{}",
        "notes.txt": "my notes",
        "work/.keep": "",
    }
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (home / "link").symlink_to("model")
    (home / "nowhere").symlink_to("gone")
    (home / "model/out").symlink_to("../data")
    monkeypatch.chdir(home / "work")
    return home


@pytest.mark.parametrize(
    "out",
    [
        "model/x",
        "model/a/b/x.json",
        "../home/model/x/",
        "data/../model/x",
        "link/x",
        "model/out",  # a link: what is made under this name is made in the model's folder
        "adapter/x",
        "old/x",
        "pth/x",
        "hub/models--a--b/snapshots/1/x",
        "hub/models--a--b/x",
    ],
)
def test_writing_into_a_model_folder_is_refused(out: str, home: Path) -> None:
    before = seen(home)
    for act in (
        lambda: originals.clear_path(home / out, [], again=False),
        lambda: originals.clear_path(home / out, [], again=True),
        lambda: originals.write_new(home / out, "text"),
        lambda: originals.write_sealed(home / out, "text", originals.HTML),
    ):
        with pytest.raises(RecipeError, match="model's folder"):
            act()
    assert seen(home) == before


def test_unrelated_config_json_marks_no_model(home: Path) -> None:
    originals.clear_path(home / "project" / "x", [], again=False)
    originals.write_new(home / "project" / "x.json", "{}")


@pytest.mark.parametrize(
    ("out", "inputs"),
    [
        ("data", ["data"]),
        ("data/a.jsonl", ["data/*.jsonl"]),
        ("data/a.jsonl", ["data"]),
        ("data", ["data/a.jsonl"]),
        ("data/", ["data/../data/a.jsonl"]),
        ("model", ["model"]),
        ("link", ["model"]),
        ("model", ["link"]),
        (".", ["model"]),
        ("work/..", ["model"]),
        ("./work/../../home", []),
        ("work", []),  # which the command is called from
        ("notes.txt", []),  # what tongwen did not write is not moved
        ("project", []),
        ("nowhere", []),
        ("model/out", []),
    ],
)
def test_again_moves_neither_inputs_nor_foreign_files(out: str, inputs: list[str], home: Path) -> None:
    before = seen(home.parent)
    with pytest.raises(RecipeError):
        originals.clear_path(home / out, [str(home / name) for name in inputs], again=True)
    with pytest.raises(RecipeError):
        originals.clear_path(home / out, [], again=False)
    assert seen(home.parent) == before


def test_relative_names_and_hard_links_are_the_same_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.link(home / "data/a.jsonl", home / "b.jsonl")
    monkeypatch.chdir(home)
    for out, given in (("b.jsonl", "data/a.jsonl"), ("./data//a.jsonl", "data/a.jsonl")):
        with pytest.raises(RecipeError, match="an input of the same command"):
            originals.check_output(Path(out), [given])
    for out in ("", ".", "..", "x/.."):
        with pytest.raises(RecipeError):
            originals.clear_path(Path(out), [], again=True)
    with pytest.raises(RecipeError, match="NUL"):
        originals.clear_path(Path("a\0b"), [], again=False)


def test_again_keeps_the_old_result_under_another_name(home: Path) -> None:
    (home / "made").mkdir()
    (home / "made/manifest.json").write_text('{"kind": "model", "fingerprint": "1"}')
    with pytest.raises(RecipeError, match="--again"):
        originals.clear_path(home / "made", [], again=False)
    originals.clear_path(home / "made", [str(home / "data")], again=True)
    assert (home / "made.old-1/manifest.json").is_file() and not (home / "made").exists()
    (home / "app").mkdir()
    (home / "app/manifest.json").write_text('{"name": "a page", "icons": []}')
    with pytest.raises(RecipeError, match="did not write"):
        originals.clear_path(home / "app", [], again=True)


def test_base_of_an_adapter_counts_as_an_input(home: Path) -> None:
    base, adapter = home / "base", home / "adapter"
    base.mkdir()
    (base / "manifest.json").write_text(
        json.dumps({"kind": "model", "fingerprint": "1", "parents": {}, "settings": {}})
    )
    record = {"kind": "sft", "fingerprint": "2", "parents": {"base": {"path": str(base)}}, "settings": {}}
    (adapter / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(RecipeError, match="an input"):
        originals.clear_path(base, [str(adapter)], again=True)
    assert (base / "manifest.json").is_file()


def test_edited_page_is_not_overwritten(home: Path) -> None:
    page = home / "page.html"
    originals.write_sealed(page, "one\n", originals.HTML)
    originals.write_sealed(page, "two\n", originals.HTML)
    assert page.read_text().endswith("two\n")
    page.write_text(page.read_text() + "mine\n")
    for file in (page, home / "notes.txt", home / "nowhere", home / "data"):
        before = seen(home)
        with pytest.raises(RecipeError, match="exists"):
            originals.write_sealed(file, "three\n", originals.HTML)
        assert seen(home) == before


def test_new_file_takes_no_name_that_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    originals.write_new(home / "new/x.json", "text")
    originals.write_new(home / "new/x.json", "text")
    for file in (home / "new/x.json", home / "notes.txt", home / "data", home / "nowhere"):
        with pytest.raises(RecipeError, match="exists"):
            originals.write_new(file, "other")
    monkeypatch.setattr(originals, "check_new", lambda *words: None)
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # another process writes it a moment later
    before = seen(home)
    with pytest.raises(RecipeError, match="exists"):
        originals.write_new(home / "notes.txt", "other")
    assert seen(home) == before


@pytest.mark.parametrize("resumable", [False, True])
def test_foreign_partial_folder_is_left_alone(resumable: bool, home: Path) -> None:
    out = home / "x"
    artifact.partial_of(out).mkdir()
    (artifact.partial_of(out) / "thesis.txt").write_text("mine")
    before = seen(home)
    with pytest.raises(RecipeError, match="did not make it"):
        originals.clear_path(out, [], again=True)
    with pytest.raises(RecipeError, match="did not make it"), artifact.create(out, "k", {}, {}, resumable=resumable):
        pass
    assert seen(home) == before


@pytest.mark.parametrize("resumable", [False, True])
def test_partial_folder_is_resumed_or_restarted(resumable: bool, home: Path) -> None:
    out = home / "x"
    with pytest.raises(ArtifactError), artifact.create(out, "k", {}, {}, resumable=resumable) as draft:
        (draft.path / "half").write_text("half")
        raise ArtifactError("stopped")
    with artifact.create(out, "k", {}, {}, resumable=resumable) as draft:
        assert (draft.path / "half").is_file() == resumable
        draft.record_files(lambda file: True)
    assert artifact.MARK not in {file.name for file in out.rglob("*")} | set(draft.facts["files"])


def test_working_folder_may_be_made_by_another_process_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes of a training make it; the first one also looks at what stands there."""
    mkdir = Path.mkdir

    def mkdir_second(self: Path, *arguments: Any, **options: Any) -> None:
        os.makedirs(self, exist_ok=True)  # noqa: PTH103 (the other process was faster)
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir_second)
    with artifact.create(tmp_path / "out", "k", {}, {}, resumable=True) as draft:
        draft.fingerprint = "f"
    assert artifact.find(tmp_path / "out")


COMMANDS = {
    "convert": ("convert", "{model}", "--to", "hf", "--out", "{out}", "--again"),
    "merge": ("merge", "--base", "{model}", "--adapter", "{model}", "--out", "{out}", "--again"),
    "train": ("tokenizer", "train", "--corpus", "{data}", "--pieces", "300", "--out", "{out}", "--again"),
    "extend": ("tokenizer", "extend", "--base", "{model}", "--corpus", "{data}", "--pieces", "9", "--out", "{out}"),
    "report": ("tokenizer", "report", "--base", "{model}", "--text", "{data}", "--out", "{out}"),
    "generate": ("generate", "--model", "{model}", "--prompts", "{data}", "--out", "{out}", "--again"),
    "evaluate": ("evaluate", "--model", "{model}", "--task", "bits_per_byte", "--data", "{data}", "--out", "{out}"),
    "fetch": ("fetch", "a/b", "--kind", "model", "--out", "{out}", "--again"),
    "init": ("init", "qwen3-0.6b-lora-8g", "--out", "{out}"),
    "look": ("look", "{recipe}", "--html", "{out}"),
    "run": ("run", "{recipe}", "out={out}", "--again"),
    "check": ("check", "{recipe}", "out={out}"),
    "demo": ("demo", "--model", "{model}", "--out", "{out}"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_checks_its_output_path_before_writing(
    name: str, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a model's folder, onto the folder around it, and onto an input."""
    import shutil

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, data = tmp_path / "all" / "model", tmp_path / "all" / "data.jsonl"
    shutil.copytree(chat_model, model)
    write_rows(data, dialogues(6))
    recipe = tmp_path / "all" / "r.yaml"
    recipe.write_text(
        f"name: x\nbase: {model}\nprepare: {{dialogues: {data}, held_out: 2}}\nsft: {{template: chatml}}\n"
    )
    outs = [model / "x", data if name not in ("fetch", "init", "demo", "report") else model / "y"]
    if name in ("run", "check", "demo", "report"):
        outs += [model, tmp_path / "all" / ".." / "all" / "model"]
    if name not in ("run", "check", "demo", "report"):
        outs += [tmp_path / "all", model]
    before = seen(tmp_path)
    for out in outs:
        words = [word.format(model=model, data=data, out=out, recipe=recipe) for word in COMMANDS[name]]
        code, said, err = tongwen(*words)
        wanted = (2, 4) if name == "fetch" else (2,)  # fetch says of another folder that it is an artifact's place
        assert code in wanted and "Traceback" not in err, (out, code, said, err)
        assert seen(tmp_path) == before, out


FOREIGN = {
    "recipe.yaml": "# mine\nname: x\n",
    "prepare/notes.txt": "mine",
    "sft.partial/notes.txt": "mine",
    "sft/manifest.json": '{"name": "a page"}',
    ".lock": "mine",
}


@pytest.mark.parametrize("again", [[], ["--again"]])
@pytest.mark.parametrize("file", FOREIGN)
def test_run_leaves_foreign_files_alone(
    file: str, again: list[str], chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    data = write_rows(tmp_path / "data.jsonl", dialogues(6))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: x\nbase: {chat_model}\nout: {tmp_path}/o\nprepare: {{dialogues: {data}, held_out: 2}}\nsft: {{template: chatml}}\n"
    )
    (tmp_path / "o" / file).parent.mkdir(parents=True)
    (tmp_path / "o" / file).write_text(FOREIGN[file])
    before = seen(tmp_path)
    for command in ("check", "run"):
        code, _, err = tongwen(command, recipe, *(again if command == "run" else []))
        assert code in ((2, 4) if "manifest" in file else (2,)) and Path(file).parts[0] in err, err
        assert seen(tmp_path) == before


def test_run_below_the_current_folder_is_done_again(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a recipe does not name is no input; a name of a model on a hub, none that exists."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data" / "d.jsonl", dialogues(8))
    text = f"name: x\nbase: {chat_model}\nprepare: {{dialogues: data, held_out: 2}}\n"
    (tmp_path / "r.yaml").write_text(text)
    for words in ((), ("--again",), ("out=data/../runs/y",), ("out=runs/y", "--again")):
        code, _, err = tongwen("run", "r.yaml", *words)
        assert code == 0, err
    assert (tmp_path / "runs/x/prepare.old-1").is_dir() and (tmp_path / "runs/y/prepare.old-1").is_dir()
    originals.clear_path(Path("new"), ["", "a/b", "modelscope:a/b"], again=True)


def test_data_in_the_output_folder_stay_in_place(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    data = write_rows(tmp_path / "o" / "data.jsonl", dialogues(8))
    recipe = tmp_path / "o" / "mine.yaml"
    text = f"name: x\nbase: {chat_model}\nout: {tmp_path}/o\nprepare: {{dialogues: {data}, held_out: 2}}\n"
    recipe.write_text(text)
    before = seen(tmp_path)
    assert tongwen("run", recipe)[0] == 0
    assert tongwen("run", recipe, "--again")[0] == 0
    assert before.items() <= seen(tmp_path).items()
    own = tmp_path / "o" / "recipe.yaml"
    assert tongwen("run", own, "prepare.held_out=1", "--again")[0] == 0, "the resolved recipe is a recipe"
    assert "held_out: 1" in own.read_text()
    own.write_text(own.read_text().replace("held_out: 1", "held_out: 3 # mine"))
    changed = own.read_bytes()
    code, _, err = tongwen("run", own, "--again")
    assert code == 2 and "recipe.yaml" in err and own.read_bytes() == changed


@pytest.mark.parametrize("content", ['{"x": 1}', "[", "[1]", "null"])
def test_manifest_of_another_program_makes_no_artifact(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert artifact.find(tmp_path) is None


@pytest.mark.parametrize(
    "content", ['{"kind": "sft", "parents": {}}', '{"kind": "sft", "finger', '{"settings": 1, "fingerprint": ""}']
)
def test_damaged_manifest_of_ours_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError):
        artifact.find(tmp_path)


def test_disk_that_fails_at_the_end_leaves_a_folder_to_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    def make() -> None:
        with artifact.create(tmp_path / "out", "model", {}, {}) as draft:
            (draft.path / "x").write_text("x")

    monkeypatch.setattr(artifact, "sync_tree", fails)
    with pytest.raises(OSError, match="Input"):
        make()
    monkeypatch.undo()
    make()
    made = artifact.find(tmp_path / "out")
    assert made and made.manifest["sizes"] == {"x": 1} and not (tmp_path / "out" / ".tongwen").exists()
