"""Laws of a run, through the real command: done once, resumable to the bit, independent of the partition, with lineage."""

from __future__ import annotations

import json
import os
import re
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import dialogues, manifest, tensors, write_recipe, write_rows
from tests.launching import kill_at_step, run_forked
from tongwen.cli.main import main
from tongwen.core.errors import ModelError
from tongwen.model.loading.fingerprint import fingerprint_model
from tongwen.model.loading.model_ref import ModelRef
from tongwen.train.trainer import PlannedTrainer


@pytest.fixture(scope="module")
def finished(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with LoRA and merge: its folder."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["run", str(write_recipe(folder, chat_model, samples=1))]) == 0
    return folder


def test_files_of_a_finished_run(finished: Path, chat_model: Path) -> None:
    out = finished / "out"
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "prepare", "tokens", "sft", "merge", ".lock"}
    for name in ("dialogues.jsonl", "dialogues.held_out.jsonl", "rejected.jsonl", "manifest.json"):
        assert (out / "prepare" / name).is_file()
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "report.json",
        "report.html",
        "loss.png",
        "manifest.json",
        "chat_template.jinja",
    ):
        assert (out / "sft" / name).is_file(), name
    report = json.loads((out / "sft" / "report.json").read_text())
    assert report["ledger"]["prepare"]["kept"]["rows"] == report["ledger"]["encode"]["in"]["rows"] == 24
    assert report["ledger"]["encode"]["lost"]["held_out"]["rows"] == 4
    assert report["mask"]["stop_learned_share"] == 1.0
    assert 0 < report["trainable"]["share"] < 1
    assert report["held_out"]["bits_per_byte"]["after"] < report["held_out"]["bits_per_byte"]["before"]
    assert report["peak_memory_bytes"] > 0
    assert report["samples"][0]["wanted"]
    lines = [json.loads(line) for line in (out / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert set(lines[0]) >= {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "seconds",
    }
    assert lines[-1]["tokens"] == 2 * report["mask"]["tokens"]
    made = manifest(out / "sft")
    assert made["parents"]["base"]["fingerprint"] == fingerprint_model(ModelRef("", str(chat_model)))
    assert made["parents"]["prepare"]["fingerprint"] == manifest(out / "prepare")["fingerprint"]
    assert {"kind", "parents", "settings", "versions", "seconds", "device"} <= set(made)
    assert json.loads((out / "merge" / "generation_config.json").read_text())["eos_token_id"] == 2
    page = (out / "sft" / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "<script" not in page and "<link" not in page


def test_adapter_tensors_change_and_the_base_does_not(finished: Path, chat_model: Path) -> None:
    before = fingerprint_model(ModelRef("", str(chat_model)))
    adapter = tensors(finished / "out" / "sft")
    assert len(adapter) == 2 * 7 * 2
    assert all(bool(tensor.any()) for tensor in adapter.values()), "a B that is still zero never learned"
    base, merged = tensors(chat_model), tensors(finished / "out" / "merge")
    assert set(base) == set(merged)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if "_proj" in name}
    assert fingerprint_model(ModelRef("", str(chat_model))) == before


def test_rerun_is_a_noop_changed_settings_are_refused_again_keeps_old(
    chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    recipe = write_recipe(tmp_path, chat_model, sft=", stop_after: 2 steps")
    assert tongwen("run", recipe)[0] == 0
    stamp = manifest(tmp_path / "out" / "sft")
    code, out, _ = tongwen("run", recipe)
    assert (code, out.count("already done")) == (0, 3)
    assert manifest(tmp_path / "out" / "sft") == stamp
    code, _, err = tongwen("run", recipe, "sft.learning_rate=0.5")
    assert code == 2
    assert "0.01 → 0.5" in err and "--again" in err
    assert manifest(tmp_path / "out" / "sft") == stamp
    assert tongwen("run", recipe, "sft.learning_rate=0.5", "--again")[0] == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"sft", "sft.old-1", "merge", "merge.old-1", "prepare"} <= names
    assert "prepare.old-1" not in names, "what did not change is not redone"
    assert manifest(tmp_path / "out" / "sft.old-1") == stamp
    assert (
        manifest(tmp_path / "out" / "merge")["parents"]["adapter"]["fingerprint"]
        == manifest(tmp_path / "out" / "sft")["fingerprint"]
    )
    (tmp_path / "data.jsonl").write_text(json.dumps(dialogues(9)[8]) + "\n" + json.dumps(dialogues(8)[7]) + "\n")
    assert tongwen("run", recipe, "sft.learning_rate=0.5", "prepare.held_out=1", "--only", "prepare", "--again")[0] == 0
    code, _, err = tongwen("run", recipe, "sft.learning_rate=0.5", "prepare.held_out=1")
    assert code == 2 and "prepare (fingerprint)" in err, "a stage whose parent was run again is stale"


@pytest.mark.sample("lora")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_run_resumes_bit_identically(
    method: str, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = (
        ", adapter: {method: full}, learning_rate: 1e-3" if method == "full" else ", adapter: {rank: 4, dropout: 0.1}"
    )
    sft = f", save_every: 3{adapter}"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        text = (
            write_recipe(folder, chat_model, merge=False)
            .read_text()
            .replace("adapter: {rank: 4}, ", "")
            .replace("learning_rate: 1e-2, ", "" if method == "full" else "learning_rate: 1e-2, ")
        )
        (folder / "recipe.yaml").write_text(text.replace(", samples: 0", f", samples: 1{sft}"))
    assert run_forked("run", whole / "recipe.yaml") == 0

    for step in (2, 5, 8):
        assert os.WTERMSIG(run_forked("run", broken / "recipe.yaml", before=kill_at_step(step))) == signal.SIGKILL
        assert not (broken / "out" / "sft").exists()
    assert run_forked("run", broken / "recipe.yaml") == 0
    wanted, found = tensors(whole / "out" / "sft"), tensors(broken / "out" / "sft")
    assert set(wanted) == set(found)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    steps = [json.loads(line)["step"] for line in (broken / "out" / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))
    losses = [
        [json.loads(line)["loss"] for line in (folder / "out" / "sft" / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, broken)
    ]
    assert losses[0] == losses[1]


def test_interrupted_run_with_other_settings_is_refused_or_forked(
    chat_model: Path, tmp_path: Path, tongwen: Any
) -> None:
    recipe = write_recipe(tmp_path, chat_model, sft=", save_every: 1", merge=False)

    def interrupt() -> None:
        original = PlannedTrainer.training_step

        def stop(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            return original(self, *arguments, **options)

        PlannedTrainer.training_step = stop  # type: ignore[method-assign]

    assert os.WEXITSTATUS(run_forked("run", recipe, before=interrupt)) == 130
    code, _, err = tongwen("run", recipe, "sft.schedule=linear")
    assert code == 2 and "'cosine' → 'linear'" in err and "--fork" in err
    code, out, _ = tongwen("run", recipe, "sft.schedule=linear", "--fork")
    assert code == 0 and "--fork" in out and "continuing after step 4" in out


def test_result_is_independent_of_the_batch_partition(chat_model: Path, tmp_path: Path) -> None:
    """1 x 8 = 8 x 1 = packed: the micro-batches of a step affect memory, not the result."""
    found = []
    for budget in (16, 100, 4096):
        folder = tmp_path / str(budget)
        recipe = write_recipe(
            folder, chat_model, sft=f", stop_after: 4 steps, micro_batch_tokens: {budget}", merge=False
        )
        recipe.write_text(recipe.read_text().replace("learning_rate: 1e-2", "learning_rate: 1e-3"))
        assert main(["run", str(recipe)]) == 0
        lines = [json.loads(line) for line in (folder / "out" / "sft" / "metrics.jsonl").read_text().splitlines()]
        found.append(
            (
                manifest(folder / "out" / "sft")["micro_batches"]["accumulate"],
                [(line["loss"], line["grad_norm"]) for line in lines],
            )
        )
    assert [accumulate for accumulate, _ in found][::2] == [4, 1]
    for _, lines in found[1:]:
        for (loss, norm), (wanted_loss, wanted_norm) in zip(lines, found[0][1], strict=True):
            assert loss == pytest.approx(wanted_loss, abs=1e-6)
            assert norm == pytest.approx(wanted_norm, rel=1e-5)


def test_each_step_matches_plain_transformers_however_many_micro_batches_it_has(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient norm of each step: the sum over its samples one by one, divided by their learned tokens."""
    original, steps = PlannedTrainer.training_step, list[list[dict[str, Any]]]()

    def record(self: Any, model: Any, inputs: Any, *arguments: Any) -> Any:
        steps.append(inputs)
        return original(self, model, inputs, *arguments)

    monkeypatch.setattr(PlannedTrainer, "training_step", record)
    recipe = write_recipe(tmp_path, chat_model, sft=", micro_batch_tokens: 84", merge=False)
    text = recipe.read_text().replace("{rank: 4}", "{method: full}")
    recipe.write_text(text.replace("1e-2", "1e-12"))  # so that every step starts with the weights of the base
    assert main(["run", str(recipe)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(steps) and len({len(step) for step in steps}) > 1
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    for line, step in zip(lines, steps, strict=True):
        model.zero_grad()
        nats = sum(nats_of_documents(model, micro) for micro in step)
        learned = sum(len(micro["targets"]) for micro in step)
        (nats / learned).backward()
        norm = torch.stack([part.grad.norm() for part in model.parameters()]).norm()
        assert line["loss"] == pytest.approx(float(nats.detach()) / learned, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def nats_of_documents(model: Any, micro: dict[str, Any]) -> torch.Tensor:
    """Return the loss of a packed micro-batch, computed document by document."""
    total = torch.zeros(())
    for begin, end in pairwise(micro["cu_seq_lens_q"].tolist()):
        ids = micro["input_ids"][:, begin:end]
        places = [place + 1 - begin for place in micro["rows"].tolist() if begin <= place < end]
        log_probabilities = model(input_ids=ids).logits[0].log_softmax(-1)
        total = total - sum(log_probabilities[place - 1, ids[0, place]] for place in places)
    return total


def test_activation_checkpointing_changes_no_number(chat_model: Path, tmp_path: Path) -> None:
    found = []
    for choice in ("off", "on"):
        recipe = write_recipe(
            tmp_path / choice, chat_model, sft=f", stop_after: 3 steps, activation_checkpointing: {choice}", merge=False
        )
        assert main(["run", str(recipe)]) == 0
        found.append(tensors(tmp_path / choice / "out" / "sft"))
    assert all(torch.allclose(found[0][name], tensor, atol=1e-7) for name, tensor in found[1].items())


def test_evaluation_during_training_is_logged_without_side_effects(chat_model: Path, tmp_path: Path) -> None:
    found = []
    for choice in ("", ", evaluate_every: 2"):
        recipe = write_recipe(tmp_path / f"{len(found)}", chat_model, sft=f", stop_after: 5 steps{choice}", merge=False)
        recipe.write_text(recipe.read_text().replace("{rank: 4}", "{rank: 4, dropout: 0.2}"))
        assert main(["run", str(recipe)]) == 0
        found.append(tmp_path / f"{len(found)}" / "out" / "sft")
    lines = [json.loads(line) for line in (found[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "bits_per_byte" in line] == [2, 4]
    wanted = tensors(found[0])
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(found[1]).items())


def test_trainer_passes_other_arguments_through(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    """Including settings for which tongwen has its own default."""
    recipe = write_recipe(
        tmp_path, chat_model, sft=", stop_after: 2 steps, trainer: {log_level: warning, adam_beta2: 0.5}", merge=False
    )
    code, _, err = tongwen("run", recipe)
    assert code == 0, err


def test_show_plan_look_schema_print_output(finished: Path, tongwen: Any, tmp_path: Path) -> None:
    code, out, _ = tongwen("show", finished / "out" / "merge")
    assert code == 0 and "adapter" in out and manifest(finished / "out" / "sft")["fingerprint"][:12] in out
    code, out, err = tongwen("plan", finished / "recipe.yaml", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["steps"] == 10 and plan["memory_bytes"]["peak"] > 0 and "peak memory" in err
    code, out, _ = tongwen("plan", finished / "recipe.yaml", "--gpu", "24GB", "--json")
    assert json.loads(out)["fits"] is True
    assert tongwen("plan", finished / "recipe.yaml", "--gpu", "lots")[0] == 2
    code, out, _ = tongwen("look", finished / "recipe.yaml", "-n", "1")
    assert code == 0 and "<|im_end|>" in out and "tokens count toward the loss" in out
    assert re.search(r"assistant\n⟦.+<\|im_end\|>⟧", out), "without colours, brackets mark what is learned"
    assert tongwen("look", finished / "recipe.yaml", "--html", tmp_path / "look.html")[0] == 0
    page = (tmp_path / "look.html").read_text(encoding="utf-8")
    assert '<span class="s"' in page and "http" not in page
    code, out, _ = tongwen("schema", "sft.adapter")
    assert code == 0 and "rank" in out and "learn:" not in out
    assert tongwen("schema", "nonsense")[0] == 2


def test_init_writes_valid_recipes(tongwen: Any, tmp_path: Path) -> None:
    from tongwen.commands.init import STARTS
    from tongwen.recipe.load import load_recipe

    assert "qwen3-8b" in tongwen("init")[1]
    for name in STARTS:
        file = tmp_path / f"{name}.yaml"
        assert tongwen("init", name, "--out", file)[0] == 0
        recipe, notices = load_recipe(file)
        assert not notices and recipe.training and "¦" not in file.read_text(encoding="utf-8")
    assert tongwen("init", name, "--out", file)[0] == 2, "nothing is overwritten"
    code, _, err = tongwen("init", "qwen3-8b")
    assert code == 2 and "qwen3-8b-lora-40g" in err


def test_untrained_control_tokens_are_trained(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    """Qwen and Llama-3 base models never stop under LoRA, because the rows of their chat tokens were never trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[1:3] = 0
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(base)
    recipe = write_recipe(tmp_path, base, sft=", stop_after: 3 steps")
    code, _, err = tongwen("run", recipe, "sft.train_new_control_tokens=false")
    assert code == 4 and "<|im_start|>" in err and "never" in err
    code, out, _ = tongwen("run", recipe, "--again")
    assert code == 0 and "never trained <|im_start|>, <|im_end|>" in out
    before, after = (
        tensors(base)["model.embed_tokens.weight"],
        tensors(tmp_path / "out" / "merge")["model.embed_tokens.weight"],
    )
    moved = [index for index in range(len(before)) if not torch.equal(before[index], after[index])]
    assert moved == [1, 2], "the control rows learn, every other row stays to the bit"


def test_python_api_matches_generate(finished: Path, tongwen: Any, tmp_path: Path) -> None:
    import tongwen as package

    opened = package.open(str(finished / "out" / "merge"))
    question = [{"role": "user", "content": "问题3：你好吗？"}]
    answer = opened.chat(question, max_new_tokens=24)
    assert answer and "".join(opened.stream(question, max_new_tokens=24)) == answer
    assert (
        opened.generate(["问题3：你好吗？", "问", "一个更长的问题，为了填充"], batch_size=3, max_new_tokens=24)[0]
        == answer
    )
    sampled = [opened.chat(question, max_new_tokens=24, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(ModelError, match=r"temprature[\s\S]*temperature"):
        opened.chat(question, temprature=1.0)
    with pytest.raises(ModelError, match="the model sees at most 512"):
        opened.chat([{"role": "user", "content": "长" * 3000}])
    adapted = package.open(str(finished / "out" / "sft"))
    assert adapted.chat(question, max_new_tokens=24) == answer, "live adapter and merged model say the same"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("问题3：你好吗？\n\n问\n", encoding="utf-8")
    code, _, _ = tongwen(
        "generate",
        "--model",
        finished / "out" / "merge",
        "--prompts",
        prompts,
        "--out",
        tmp_path / "a.jsonl",
        "--max-new-tokens",
        24,
    )
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert code == 0 and rows[0]["answer"] == answer and rows[1]["prompt"] == "问"


def test_end_to_end_run_with_an_extended_vocabulary(tongwen: Any, chat_model: Path, tmp_path: Path) -> None:
    """Every stage uses the previous one. Old rows stay bit-identical until a phase trains all rows, new rows change, and the
    GGUF file has the grown vocabulary."""
    text = ["机器学习使用数据训练模型，模型从数据中学习规律。", "我们用中文语料继续训练模型，让模型更懂中文。"] * 30
    english = ["The quick brown fox jumps over the lazy dog. Hello world, how are you today?"] * 20
    (tmp_path / "zh.txt").write_text("\n".join(f"{one}{place}" for place, one in enumerate(text)), encoding="utf-8")
    (tmp_path / "en.txt").write_text("\n".join(f"{one} {place}" for place, one in enumerate(english)), encoding="utf-8")
    rows = write_rows(tmp_path / "data.jsonl", dialogues(24))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""name: whole
base: {chat_model}
out: {tmp_path / "out"}
prepare:
  documents: [{tmp_path / "zh.txt"}, {tmp_path / "en.txt"}]
  dialogues: {rows}
  held_out: 8
  dedup: {{documents: exact}}
vocab: {{pieces: 40}}
pretrain:
  phases: [{{train: new_rows, stop_after: 3 steps}}, {{train: lora, stop_after: 2 steps}}]
  adapter: {{rank: 4}}
  max_length: 64
  learning_rate: 1e-2
  precision: fp32
sft: {{template: chatml, adapter: {{rank: 4}}, max_length: 256, learning_rate: 1e-2, stop_after: 2 steps, samples: 1, precision: fp32}}
merge: {{}}
export: {{formats: [gguf], quantize: f32}}
""",
        encoding="utf-8",
    )
    code, _, err = tongwen("run", recipe)
    assert code == 0, err
    out = tmp_path / "out"
    new = json.loads((out / "vocab" / "new_rows.json").read_text())
    grown, merged, old = tensors(out / "vocab"), tensors(out / "merge"), tensors(chat_model)
    name = "model.embed_tokens.weight"
    assert (merged[name][: new[0]] == old[name]).all() and (grown[name][: new[0]] == old[name]).all()
    assert (merged[name][new] != grown[name][new]).any(dim=1).sum() > 10
    report = json.loads((out / "pretrain" / "report.json").read_text())
    assert set(report["held_out"]["groups"]) == {"zh", "other"}
    from gguf import GGUFReader

    (file,) = (out / "export" / "gguf").glob("*.gguf")
    assert len(GGUFReader(str(file)).fields["tokenizer.ggml.tokens"].data) == merged[name].shape[0]
    code, out_text, err = tongwen("run", recipe)
    assert code == 0 and out_text.count("already done") == 6, (out_text, err)
    assert tongwen("verify", out / "vocab")[0] == tongwen("verify", out / "merge")[0] == 0


def test_show_names_the_layers_of_any_model(chat_model: Path, tongwen: Any) -> None:
    code, out, _ = tongwen("show", chat_model, "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["family"] == "llama" and {"q_proj", "down_proj", "lm_head"} <= set(shown["linear"])


def test_changed_data_is_not_already_done(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    recipe = write_recipe(tmp_path, chat_model, sft=", stop_after: 1 steps", merge=False)
    data = tmp_path / "data.jsonl"
    assert tongwen("run", recipe)[0] == 0
    lines = data.read_text().splitlines(keepends=True)
    os.utime(data)
    assert tongwen("run", recipe)[0] == 0, "a new time alone is no new file"
    for text, expected in (
        ("".join(lines[1:]), "bytes → "),
        ("".join([*lines[1:], lines[0]]), "sha256 "),
    ):
        data.write_text(text)
        code, _, err = tongwen("run", recipe)
        assert code == 2 and "data.jsonl" in err and expected.split(" →")[0] in err and "--again" in err
    assert tongwen("run", recipe, "--again")[0] == 0
    assert {folder.name for folder in (tmp_path / "out").iterdir()} >= {"prepare.old-1", "sft.old-1", "sft"}
    data.unlink()
    code, out, _ = tongwen("run", recipe)
    assert code == 0 and out.count("already done") == 2, "what came of a file that is gone is still there"


def test_qlora_refuses_an_adapter_base(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    """Reported before the pre-training starts."""
    recipe = write_recipe(tmp_path, chat_model, extra="pretrain: {train: lora}\n", merge=False)
    recipe.write_text(recipe.read_text().replace("prepare: {", f"prepare: {{documents: {tmp_path / 'data.jsonl'}, "))
    code, _, err = tongwen("check", recipe, "sft.adapter.method=qlora")
    assert code == 2 and "an adapter cannot be merged into quantised weights" in err
