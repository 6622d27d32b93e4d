"""`tongwen verify`: files are compared with known checksums; differences are named, unknown files are not verified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import make_adapter
from tests.conftest import SHARED, write_recipe
from tests.export.originals import make_original
from tongwen.export import checksums


@pytest.fixture()
def merged(chat_model: Path, tmp_path: Path, tongwen: Any) -> Path:
    make_adapter(chat_model, tmp_path / "adapter")
    argv = ("merge", "--base", chat_model, "--adapter", tmp_path / "adapter")
    assert tongwen(*argv, "--out", tmp_path / "merged")[0] == 0
    return tmp_path / "merged"


def flip(file: Path, at: int = -5) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_all_published_checksums_are_included() -> None:
    rows = checksums.known_files()
    assert len(rows) == len({row.sha256 for row in rows}) == 61
    assert all(len(row.sha256) == 64 for row in rows)
    assert sum(row.file == "adapter_model.bin" for row in rows) == 15
    assert sum("original" in row.what for row in rows) == 7


def test_every_flipped_bit_of_an_artifact_is_found(merged: Path, tongwen: Any) -> None:
    assert tongwen("verify", merged)[0] == 0
    weights = merged / "model.safetensors"
    for at in range(3000, weights.stat().st_size, weights.stat().st_size // 12):
        flip(weights, at)
        code, _, err = tongwen("verify", merged)
        assert code == 4 and str(merged) in err, at
        flip(weights, at)
    for name in ("config.json", "tokenizer.json"):
        flip(merged / name)
        code, _, err = tongwen("verify", merged)
        assert code == 4 and name in err
        flip(merged / name)
    (merged / "tokenizer_config.json").unlink()
    code, _, err = tongwen("verify", merged)
    assert code == 4 and "tokenizer_config.json" in err and "missing" in err


def test_only_outputs_of_prepare_are_compared(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    assert tongwen("run", write_recipe(tmp_path, chat_model, merge=False), "--until", "prepare")[0] == 0
    folder = tmp_path / "out" / "prepare"
    (tmp_path / "data.jsonl").unlink()
    assert tongwen("verify", folder)[0] == 0
    flip(folder / "dialogues.jsonl")
    code, _, err = tongwen("verify", folder)
    assert code == 4 and str(folder / "dialogues.jsonl") in err


def test_changed_tensor_is_named(merged: Path, tongwen: Any) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(merged / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 3] += 1
    save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
    code, _, err = tongwen("verify", merged)
    assert code == 4 and "model.layers.1.mlp.up_proj.weight" in err


def test_user_checksum_list_is_checked(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    digests = {
        kind: {
            file.name: hashlib.new(kind, file.read_bytes()).hexdigest() for file in sorted(chat_model.glob("*.json"))
        }
        for kind in ("sha256", "md5")
    }
    for kind, found in digests.items():
        file = tmp_path / f"{kind}.txt"
        file.write_text("# ours\n" + "".join(f"{digest}  {name}\n" for name, digest in found.items()))
        assert tongwen("verify", chat_model, "--against", file)[0] == 0
        file.write_text(file.read_text().replace("0", "1"))
        assert tongwen("verify", chat_model, "--against", file)[0] == 4
    (tmp_path / "list.json").write_text(json.dumps(digests["sha256"]))
    assert tongwen("verify", chat_model, "--against", tmp_path / "list.json")[0] == 0
    (tmp_path / "prose.txt").write_text("what hash?\n")
    code, _, err = tongwen("verify", chat_model, "--against", tmp_path / "prose.txt")
    assert code == 4 and "prose.txt:1" in err
    assert tongwen("verify", chat_model, "--against", tmp_path / "nowhere")[0] == 2


def test_files_without_checksums_are_not_verified(chat_model: Path, tongwen: Any) -> None:
    code, _, err = tongwen("verify", chat_model)
    assert code == 4 and "nothing was verified" in err and "--against" in err


def test_checklist_of_a_download_is_used(tmp_path: Path, tongwen: Any) -> None:
    make_original(tmp_path / "pth", "13B, 49953 rows")
    parts = sorted((tmp_path / "pth").glob("*.pth"))
    lines = [f"{hashlib.md5(part.read_bytes()).hexdigest()}  {part.name}\n" for part in parts]
    (tmp_path / "pth" / "checklist.chk").write_text("".join(lines))
    assert tongwen("verify", tmp_path / "pth")[0] == 0
    flip(parts[1], 4000)
    code, _, err = tongwen("verify", tmp_path / "pth")
    assert code == 4 and parts[1].name in err and parts[0].name not in err


def test_published_model_is_recognised_and_mixed_parts_are_refused(
    tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_original(tmp_path / "pth", "13B, 49953 rows")
    parts = sorted((tmp_path / "pth").glob("*.pth"))
    rows = [
        checksums.KnownFile("LLaMA 13B: original files", f.name, hashlib.sha256(f.read_bytes()).hexdigest())
        for f in parts
    ]
    monkeypatch.setattr("tongwen.export.checksums.known_files", lambda: rows)
    code, text, _ = tongwen("verify", tmp_path / "pth")
    assert code == 0 and text.count("LLaMA 13B") == 2
    flip(parts[1], 4000)
    code, _, err = tongwen("verify", tmp_path / "pth")
    assert code == 4 and parts[1].name in err
    assert tongwen("verify", parts[0])[0] == 0
    code, _, err = tongwen("verify", parts[1], "--against", "known")
    assert code == 4 and "no published list" in err


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs LLaMA's tokenizer")
def test_llama_tokenizer_is_recognised(tongwen: Any) -> None:
    code, text, _ = tongwen("verify", SHARED / "tokenizers" / "llama.model")
    assert code == 0 and "LLaMA: tokenizer" in text


def test_interrupted_verify_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text(file.name)
    done, read = tmp_path / "notes" / "done.json", []
    hashed = checksums._hash

    def counted(file: Path, wanted: Any) -> dict[str, str]:
        if file.name == "c" and len(read) < 3:
            read.append("broken")
            raise KeyboardInterrupt
        read.append(file.name)
        return hashed(file, wanted)

    monkeypatch.setattr("tongwen.export.checksums._hash", counted)
    monkeypatch.setattr("tongwen.export.checksums.WORKERS", 1)
    wanted = dict.fromkeys(files, ("sha256",))
    with pytest.raises(KeyboardInterrupt):
        checksums.hash_files(wanted, done, lambda count: None)
    assert done.is_file()
    found = checksums.hash_files(wanted, done, lambda count: None)
    assert read == ["a", "b", "broken", "c"] and not done.exists()
    assert found[files[0]]["sha256"] == hashlib.sha256(b"a").hexdigest()
