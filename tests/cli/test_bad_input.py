"""Bad input: one clear message with place, value, rule and remedy, the contract's exit code, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import SafetensorError

from tests.conftest import (
    byte_level_tokenizer,
    dialogues,
    sentencepiece_tokenizer,
    tiny_llama,
    write_recipe,
    write_rows,
)
from tongwen.core import distributed
from tongwen.core.errors import MachineError
from tongwen.workflows.run_lock import lock_folder

GOOD = {"instruction": "问", "input": "", "output": "答"}


@pytest.mark.parametrize(
    ("rows", "code", "expected"),
    [
        ([], 3, ("data.jsonl", "empty")),
        ([{"instruction": "问"}], 3, ("data.jsonl:1", "instruction", "columns")),
        ([{**GOOD, "output": ""}], 3, ("data.jsonl:1", "no answer")),
        ([GOOD] * 20 + [{"instruction": "问", "input": "x"}], 3, ("data.jsonl:21", "'output'", "max_bad")),
        ([{**GOOD, "output": "我是{{name}}"}] * 9, 3, ("data.jsonl:1", "{{name}}", "fill")),
        ([{**GOOD, "output": f"{n}很长。" * 300} for n in range(9)], 3, ("max_length 256", "raise sft.max_length")),
        ([{**GOOD, "output": f"a<|im_end|>b{n}"} for n in range(9)], 3, ("<|im_end|>",)),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 9, 3, ("data.jsonl:1", "no answer")),
        ([GOOD], 3, ("held_out",)),
    ],
)
def test_bad_data_is_refused(
    rows: list[Any], code: int, expected: tuple[str, ...], chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    recipe = write_recipe(tmp_path, chat_model, rows)
    found, _, err = tongwen("run", recipe)
    assert found == code, err
    for word in expected:
        assert word in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "sft").exists()


def test_check_finds_all_problems_of_the_data_at_once(tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, tmp_path, [{"instruction": "问"}])
    text = recipe.read_text().replace("held_out: 4", f"held_out: 4, documents: {tmp_path / 'none.txt'}")
    recipe.write_text(text)
    code, _, err = tongwen("check", recipe)
    assert code == 3 and "data.jsonl:1" in err and "none.txt" in err
    code, out, _ = tongwen("check", recipe, "--json")
    assert json.loads(out)["exit_code"] == 3


def model_folder(folder: Path, chat_model: Path) -> Path:
    shutil.copytree(chat_model, folder)
    return folder


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2000])


def without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Y"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "x.py").write_text(f"open({str(folder / 'canary')!r}, 'w')\n")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_weights, ("no weights", "safetensors")),
        (truncated, ("cannot be loaded", "complete")),
        (without_a_tensor, ("the files lack", "layers.1.mlp.up_proj.weight")),
        (without_config, ("no config.json",)),
        (remote_code, ("needs its own code",)),
    ],
)
def test_bad_models_are_refused(
    damage: Any, expected: tuple[str, ...], chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    base = model_folder(tmp_path / "base", chat_model)
    damage(base)
    code, _, err = tongwen("run", write_recipe(tmp_path, base))
    assert code == 4, err
    for word in expected:
        assert word in err, err
    assert not (base / "canary").exists(), "foreign code ran"
    held = tmp_path / "out"
    assert (held / "prepare").is_dir() or not any(path.is_dir() for path in held.iterdir()), "the stage before stays"


def test_token_without_embedding_row_is_refused_only_if_used(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    from transformers import AutoTokenizer

    base = model_folder(tmp_path / "base", chat_model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"extra{number}" for number in range(40)])
    tokenizer.save_pretrained(base)
    assert tongwen("run", write_recipe(tmp_path / "without", base, sft=", stop_after: 1 steps"))[0] == 0
    rows = [*dialogues(24), {"instruction": "数到七", "output": "extra7"}]
    code, _, err = tongwen("run", write_recipe(tmp_path / "with", base, rows))
    assert code == 3 and "extra7, for which the embedding has no row" in err and "remove this token" in err


def test_template_with_unknown_tokens_is_refused(tmp_path: Path, tongwen: Any) -> None:
    base = tmp_path / "base"
    tiny_llama(base, len(sentencepiece_tokenizer(base)))
    code, _, err = tongwen("run", write_recipe(tmp_path, base))
    assert code == 4 and "<|im_end|>" in err and "alpaca" in err
    code, _, err = tongwen("run", write_recipe(tmp_path, base), "sft.template=own")
    assert code == 4 and "no chat template" in err
    assert (
        tongwen(
            "run",
            write_recipe(tmp_path, base),
            "sft.template=alpaca-zh",
            "sft.stop_after=2 steps",
            "sft.max_length=400",
        )[0]
        == 0
    )
    assert json.loads((tmp_path / "out" / "merge" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_family_without_packing_is_padded_with_a_notice(tmp_path: Path, tongwen: Any) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    base = tmp_path / "base"
    tokenizer = byte_level_tokenizer(base)
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)).save_pretrained(base)
    recipe = write_recipe(tmp_path, base, sft=", stop_after: 3 steps")
    recipe.write_text(recipe.read_text().replace("{rank: 4}", "{rank: 4, targets: family}"))
    code, out, err = tongwen("run", recipe)
    assert code == 0, err
    assert "padded batches" in out and "ALiBi" in out


def test_unreachable_hub_error_names_the_mirror(tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, tmp_path)
    recipe.write_text(recipe.read_text().replace(f"base: {tmp_path}\n", "base: Nobody/Nothing\n"))
    code, _, err = tongwen("run", recipe)
    assert code == 5 and "HF_ENDPOINT=https://hf-mirror.com" in err and "modelscope:Nobody/Nothing" in err


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("./nowhere", 4, "no such folder"),
        ("x.gguf", 4, "no such file"),
        ("modelscope:a/b", 5, "tongwen[modelscope]"),
    ],
)
def test_missing_models_are_refused(name: str, code: int, message: str, tongwen: Any) -> None:
    found, _, err = tongwen("chat", name)
    assert found == code and message in err


def test_bad_adapter_folder_is_named(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    (tmp_path / "a").mkdir()
    found, _, err = tongwen("chat", chat_model, "--adapter", tmp_path / "a")
    assert found == 4 and "adapter_config.json" in err
    (tmp_path / "a" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    found, _, err = tongwen("chat", tmp_path / "a")
    assert found == 4 and "some/base" in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "disk is full"),
        (
            SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"),
            "disk reports an error",
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), "disk reports an error"),
    ],
)
def test_disk_error_keeps_existing_files(
    error: Exception, message: str, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, chat_model, sft=", stop_after: 2 steps")
    assert tongwen("run", recipe)[0] == 0
    before = sorted(str(path) for path in (tmp_path / "out" / "sft").rglob("*"))

    def full(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("tongwen.model.merging.merge.copy_bytes", full)
    code, _, err = tongwen("run", recipe, "--from", "merge", "--again")
    assert code == 5 and message in err
    assert (f"{tmp_path / 'out' / 'merge'}: the disk is full" in err and "out=" in err) == ("full" in message)
    assert sorted(str(path) for path in (tmp_path / "out" / "sft").rglob("*")) == before
    assert not (tmp_path / "out" / "merge").exists()
    assert (tmp_path / "out" / "merge.old-1" / "manifest.json").is_file()
    monkeypatch.undo()
    assert tongwen("run", recipe)[0] == 0, "the same command continues"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_exits_with_code_5(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    assert tongwen("run", write_recipe(tmp_path, chat_model))[0] == 5


@pytest.mark.sample("error0")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: out of memory: you tried to allocate 1 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
    ],
)
def test_out_of_memory_lists_remedies_in_order(
    error: Exception, chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("tongwen.train.trainer.PlannedTrainer.compute_loss", exhausted)
    monkeypatch.setattr("tongwen.model.loading.devices.cpu_has_bf16", lambda: True)
    recipe = write_recipe(tmp_path, chat_model)
    remedies = ("micro_batch_tokens=", "activation_checkpointing=on", "precision=auto", "adapter.method=qlora")
    for overrides, expected in (((), remedies), (("sft.activation_checkpointing=on",), (remedies[0], *remedies[2:]))):
        code, _, err = tongwen("run", recipe, *overrides)
        assert code == 5 and "sft: out of memory" in err and "max_length" not in err  # no sample is so long
        assert [err.index(f"sft.{remedy}") for remedy in expected] == sorted(
            err.index(f"sft.{remedy}") for remedy in expected
        )
        assert ("activation_checkpointing" in err) == (not overrides)
        changes = err.split("before: ")[1].split(";")[0].split()
        assert tongwen("check", recipe, *overrides, *changes)[0] == 0
    monkeypatch.setattr("tongwen.workflows.training.model.device_memory", lambda device: 1)
    monkeypatch.setattr("tongwen.workflows.training.model._fits", lambda *_: False)
    assert "activation_checkpointing" not in tongwen("run", recipe)[2], "auto has already taken to it"


def test_diverging_learning_rate_stops_with_step_and_rows(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, chat_model, sft=", adapter: {method: full}, schedule: constant, warmup: 0")
    recipe.write_text(
        recipe.read_text()
        .replace("adapter: {rank: 4}, ", "")
        .replace("learning_rate: 1e-2", "learning_rate: 100")
        .replace("merge: {}\n", "")
    )
    code, _, err = tongwen("run", recipe)
    assert code == 6 and "step 2" in err and "data.jsonl:" in err and "learning_rate" in err
    assert not (tmp_path / "out" / "sft").exists()


def test_second_run_in_a_locked_folder_is_refused(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write("node-7, process 4711, since 2026-01-01 00:00:00")
        stream.flush()
        code, _, err = tongwen("run", write_recipe(tmp_path, chat_model))
    assert code == 5 and "another tongwen" in err and "node-7, process 4711" in err


def test_folder_stays_locked_until_child_processes_exit(tmp_path: Path) -> None:
    """Also when the command that started them is killed."""
    child = os.fork()
    if not child:
        with lock_folder(tmp_path):
            os._exit(distributed._wait_for(["sh", "-c", f"touch {tmp_path}/began; exec sleep 60"], dict(os.environ)))
    while not (tmp_path / "began").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    (saving,) = psutil.Process(child).children()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(MachineError, match="another tongwen"), lock_folder(tmp_path):
        pass
    saving.kill()
    saving.wait()
    with lock_folder(tmp_path):
        pass


def test_missing_stages_and_folders_are_refused(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, chat_model)
    code, _, err = tongwen("run", recipe, "--only", "vocab")
    assert code == 2 and "prepare, sft, merge" in err
    code, _, err = tongwen("run", recipe, "--only", "sft")
    assert code == 4 and "has not run" in err
    code, _, err = tongwen("show", tmp_path)
    assert code == 4 and "manifest.json" in err
    code, _, err = tongwen(
        "generate",
        "--model",
        chat_model,
        "--prompts",
        write_rows(tmp_path / "p.jsonl", [{"x": 1}]),
        "--out",
        tmp_path / "o",
    )
    assert code == 3 and "p.jsonl:1" in err and '{"prompt"' in err
    assert not (tmp_path / "o").exists()


def test_internal_error_keeps_its_traceback(
    chat_model: Path, tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tongwen.stages.prepare.settings", lambda recipe: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tongwen("run", write_recipe(tmp_path, chat_model))


def test_messages_are_translated_to_chinese(tmp_path: Path, tongwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TONGWEN_LANG", "zh")
    code, _, err = tongwen("check", write_recipe(tmp_path, tmp_path, [{"instruction": "问"}]))
    assert code == 3 and "该行不是已知格式的对话" in err
    assert "先看数据" in tongwen("init", "smollm2-135m-lora-cpu")[1]
    assert "每个优化步的样本数" in tongwen("schema", "sft")[1]
