"""Weights that are damaged or hostile: each is refused by name, nothing is written, and no code of theirs runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import make_adapter
from tests.conftest import tensors, tiny_llama
from tests.model.loading.pickle_bomb import Bomb

WEIGHTS = "model.safetensors"


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def sharded(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return dict(json.loads((folder / f"{WEIGHTS}.index.json").read_text())["weight_map"])


def without_a_shard(base: Path, adapter: Path) -> None:
    (base / next(iter(sharded(base).values()))).unlink()


def with_a_lying_index(base: Path, adapter: Path) -> None:
    name, file = next(iter(sharded(base).items()))
    edit_json(
        base / f"{WEIGHTS}.index.json",
        lambda found: found["weight_map"].update({name: next(f for f in found["weight_map"].values() if f != file)}),
    )


def with_a_tensor_in_two_shards(base: Path, adapter: Path) -> None:
    files = sorted(set(sharded(base).values()))
    name, tensor = next(iter(load_file(base / files[0]).items()))
    edit(base / files[1], lambda state: state.update({name: tensor}))


def bins(base: Path) -> Path:
    """The base as two `.bin` files with an index."""
    state = load_file(base / WEIGHTS)
    names, files = list(state), ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for number, file in enumerate(files):
        torch.save({name: state[name] for name in names[number::2]}, base / file)
    index = {"metadata": {}, "weight_map": {name: files[at % 2] for at, name in enumerate(names)}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (base / WEIGHTS).unlink()
    return base / files[1]


def without_a_bin(base: Path, adapter: Path) -> None:
    bins(base).unlink()


def with_a_bin_outside(base: Path, adapter: Path) -> None:
    file = bins(base)
    file.rename(base.parent / file.name)
    edit_json(
        base / "pytorch_model.bin.index.json",
        lambda found: found["weight_map"].update(dict.fromkeys(found["weight_map"], f"../{file.name}")),
    )


def with_a_cut_bin(base: Path, adapter: Path) -> None:
    file = bins(base)
    os.truncate(file, file.stat().st_size // 2)


def with_an_index_outside(base: Path, adapter: Path) -> None:
    shutil.copy(base / WEIGHTS, base.parent / "outside.safetensors")
    name = next(iter(sharded(base)))
    edit_json(
        base / f"{WEIGHTS}.index.json", lambda found: found["weight_map"].update({name: "../outside.safetensors"})
    )


def cut(base: Path, adapter: Path) -> None:
    os.truncate(base / WEIGHTS, (base / WEIGHTS).stat().st_size // 2)


def with_a_spare_tail(base: Path, adapter: Path) -> None:
    with (base / WEIGHTS).open("ab") as stream:
        stream.write(bytes(8))


def with_a_broken_header(base: Path, adapter: Path) -> None:
    content = bytearray((base / WEIGHTS).read_bytes())
    content[30] ^= 0xFF
    (base / WEIGHTS).write_bytes(content)


def with_a_shape_that_lies(base: Path, adapter: Path) -> None:
    content = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(content.replace(b'"shape":[32]', b'"shape":[33]', 1))


def with_nan_in_the_base(base: Path, adapter: Path) -> None:
    edit(base / WEIGHTS, lambda state: state["model.norm.weight"].fill_(float("nan")))


def with_inf_in_an_adapted_weight(base: Path, adapter: Path) -> None:
    edit(base / WEIGHTS, lambda state: state["model.layers.0.mlp.up_proj.weight"].fill_(float("inf")))


def as_content(content: bytes) -> Callable[[Path, Path], None]:
    def change(base: Path, adapter: Path) -> None:
        (base / WEIGHTS).write_bytes(content)

    return change


def without_a_layer(base: Path, adapter: Path) -> None:
    edit(
        adapter / "adapter_model.safetensors",
        lambda state: [state.pop(name) for name in list(state) if ".layers.1." in name],
    )


def with_another_rank(base: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", lambda config: config.update(r=8))


def without_its_saved_module(base: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", lambda config: config.update(modules_to_save=["lm_head"]))


def of_another_size(base: Path, adapter: Path) -> None:
    tiny_llama(base, 503, hidden_size=48)


def write_empty_adapter(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")


def without_weights(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def bomb_in_the_adapter(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(base.parent / "canary")}, adapter / "adapter_model.bin")


def bare_bomb_in_the_base(base: Path, adapter: Path) -> None:
    (base / WEIGHTS).unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(base.parent / "canary")))


def bomb_in_the_base(base: Path, adapter: Path) -> None:
    (base / WEIGHTS).unlink()
    torch.save({"x": Bomb(base.parent / "canary")}, base / "pytorch_model.bin")


def stretched_bin(base: Path, adapter: Path) -> None:
    (base / WEIGHTS).unlink()
    torch.save({"model.norm.weight": torch.zeros(1).expand(1 << 36)}, base / "pytorch_model.bin")


def something_else_in_bin(base: Path, adapter: Path) -> None:
    (base / WEIGHTS).unlink()
    torch.save([1, 2, 3], base / "pytorch_model.bin")


def quantised(base: Path, adapter: Path) -> None:
    edit_json(base / "config.json", lambda config: config.update(quantization_config={"load_in_4bit": True}))


def with_a_larger_tokenizer(base: Path, adapter: Path) -> None:
    edit_json(
        base / "tokenizer.json", lambda found: found["added_tokens"].append({**found["added_tokens"][0], "id": 999})
    )


CASES: list[tuple[Any, int, str]] = [
    (without_a_shard, 4, "missing"),
    (with_a_lying_index, 4, "is not in"),
    (with_a_tensor_in_two_shards, 4, "is also in"),
    (with_an_index_outside, 4, "outside this folder"),
    (cut, 4, "bytes"),
    (with_a_spare_tail, 4, "should have"),
    (with_a_broken_header, 4, "header"),
    (with_a_shape_that_lies, 4, "header does not match"),
    (with_nan_in_the_base, 6, "model.norm.weight"),
    (with_inf_in_an_adapted_weight, 6, "layers.0.mlp.up_proj"),
    (as_content(b""), 4, "empty"),
    (as_content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), 4, "LFS pointer"),
    (as_content(b"<!DOCTYPE html><html>404</html>"), 4, "web page"),
    (without_a_layer, 4, "layers.1"),
    (with_another_rank, 4, "rank 8"),
    (without_its_saved_module, 4, "lm_head"),
    (of_another_size, 4, "(48, 64)"),
    (write_empty_adapter, 4, "empty"),
    (without_weights, 4, "pytorch_model.bin"),
    (bomb_in_the_adapter, 4, "never opens"),
    (bomb_in_the_base, 4, "never opens"),
    (bare_bomb_in_the_base, 4, "pytorch_model.bin"),
    (stretched_bin, 4, "more bytes than the file"),
    (something_else_in_bin, 4, "more than tensors"),
    (without_a_bin, 4, "pytorch_model-00002-of-00002.bin is missing"),
    (with_a_bin_outside, 4, "outside this folder"),
    (with_a_cut_bin, 4, "00002.bin"),
    (quantised, 4, "quantised"),
    (with_a_larger_tokenizer, 4, "ids up to 999"),
]


@pytest.fixture()
def pair(chat_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter of it to spoil."""
    base = Path(shutil.copytree(chat_model, tmp_path / "base"))
    make_adapter(base, tmp_path / "adapter")
    return base, tmp_path / "adapter"


@pytest.mark.parametrize(("spoil", "code", "message"), CASES, ids=[case[0].__name__ + case[2] for case in CASES])
def test_damaged_weights_are_refused(
    spoil: Any, code: int, message: str, pair: tuple[Path, Path], tmp_path: Path, tongwen: Any
) -> None:
    spoil(*pair)
    found, _, err = tongwen("merge", "--base", pair[0], "--adapter", pair[1], "--out", tmp_path / "out")
    assert found == code and message in err, err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "canary").exists(), "code ran"


def test_fp16_overflow_is_refused(pair: tuple[Path, Path], tmp_path: Path, tongwen: Any) -> None:
    edit(pair[0] / WEIGHTS, lambda state: state["model.layers.0.mlp.up_proj.weight"].mul_(1e7))
    argv = ("merge", "--base", pair[0], "--adapter", pair[1], "--out", tmp_path / "out", "--dtype", "fp16")
    code, _, err = tongwen(*argv)
    assert code == 6 and "exceeds the range of fp16" in err and "bf16" in err


def test_base_without_tokenizer_is_reported(pair: tuple[Path, Path], tmp_path: Path, tongwen: Any) -> None:
    for file in pair[0].glob("tokenizer*"):
        file.unlink()
    code, text, _ = tongwen("merge", "--base", pair[0], "--adapter", pair[1], "--out", tmp_path / "out")
    assert code == 0 and "has a tokenizer" in text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_exits_with_code_5(pair: tuple[Path, Path], tmp_path: Path, tongwen: Any) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, _ = tongwen("merge", "--base", pair[0], "--adapter", pair[1], "--out", tmp_path / "locked" / "out")
    assert code == 5


def test_full_disk_is_reported_before_writing(
    pair: tuple[Path, Path], tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("tongwen.workflows.merging.shutil.disk_usage", lambda folder: usage)
    code, _, err = tongwen("merge", "--base", pair[0], "--adapter", pair[1], "--out", tmp_path / "out")
    assert code == 5 and "1 kB free" in err and not (tmp_path / "out.partial").exists()


def test_killed_merge_leaves_no_model_and_can_be_repeated(
    pair: tuple[Path, Path], tmp_path: Path, tongwen: Any
) -> None:
    """A process is killed at moments spread over a merge; what it leaves is never a finished folder."""
    argv = ["merge", "--base", str(pair[0]), "--adapter", str(pair[1])]
    assert tongwen(*argv, "--out", tmp_path / "whole")[0] == 0
    expected = tensors(tmp_path / "whole")
    command = [sys.executable, "-m", "tongwen", *argv, "--out", str(tmp_path / "out")]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    took = time.perf_counter() - started
    killed = 0
    for moment in range(1, 7):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(took * moment / 6.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += not (tmp_path / "out").exists()
        if (tmp_path / "out").exists():
            assert (tmp_path / "out" / "manifest.json").is_file()
            continue
        assert tongwen("show", tmp_path / "out")[0] == 4
        assert tongwen(*argv, "--out", tmp_path / "out")[0] == 0
        found = tensors(tmp_path / "out")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not (tmp_path / "out.partial").exists()
    assert killed >= 3
