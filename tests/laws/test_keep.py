"""`keep`: 0 changes nothing, 1 returns the base, and the divergence on the base's own answers falls as it rises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.conftest import remade, tensors, write_recipe
from tongwen.cli.main import main
from tongwen.core import artifact
from tongwen.model.kernels.divergence import Likeliest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def train(folder: Path, base: Path, keep: float, method: str = "full", extra: str = "") -> Path:
    folder.mkdir(parents=True)
    recipe = write_recipe(folder, base, sft=f", stop_after: 6 steps, keep: {keep}{extra}", merge=False)
    text = recipe.read_text(encoding="utf-8").replace("{rank: 4}", f"{{method: {method}}}")
    recipe.write_text(text, encoding="utf-8")
    assert main(["run", str(recipe)]) == 0
    return folder / "out" / "sft"


def report(stage: Path) -> dict[str, Any]:
    return dict(json.loads((stage / "report.json").read_text(encoding="utf-8")))


def test_keep_moves_every_weight_the_same_share_of_its_way_to_the_base(tmp_path: Path, chat_model: Path) -> None:
    plain, half, whole = (train(tmp_path / str(keep), chat_model, keep) for keep in (0, 0.75, 1))
    base, trained, kept = tensors(chat_model), tensors(plain), tensors(half)
    found = report(half)["keep"]
    assert 0 < found["share"] < 1
    for name, weight in base.items():
        expected = weight + found["share"] * (trained[name] - weight)
        torch.testing.assert_close(kept[name], expected, rtol=0, atol=1e-6)
    assert all(torch.equal(weight, base[name]) for name, weight in tensors(whole).items())
    assert "keep" not in report(plain)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_divergence_falls_by_the_share_that_is_kept(tmp_path: Path, chat_model: Path, method: str) -> None:
    """An independent judge: plain transformers and peft compute the divergence over the whole vocabulary."""
    folders = {keep: train(tmp_path / str(keep), chat_model, keep, method) for keep in (0, 0.5, 0.9)}
    answers = next((artifact.cache_folder() / "own_answers").glob("*.json"))
    assert len(list(answers.parent.iterdir())) == 1  # all three have the same base
    ids = torch.tensor([(json.loads(answers.read_text(encoding="utf-8"))[0] * 64)[:64]])
    base = AutoModelForCausalLM.from_pretrained(chat_model).eval()
    with torch.no_grad():
        target = base(ids).logits.log_softmax(-1)
        nats = {}
        for keep, folder in folders.items():
            if method == "full":
                model = AutoModelForCausalLM.from_pretrained(folder)
            else:
                model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_model), folder)
            nats[keep] = float((target.exp() * (target - model.eval()(ids).logits.log_softmax(-1))).sum(-1).mean())
    assert nats[0] > nats[0.5] > nats[0.9] > 0
    for keep in (0.5, 0.9):
        tried = report(folders[keep])["keep"]
        before, after = tried["divergence"]["1.0000"], report(folders[keep])["held_out"]["own_answers"]["divergence"]
        assert after <= (1 - keep) * before * 1.001
        assert after >= (1 - keep) * before * 0.5


def test_model_without_room_for_answers_is_refused_before_training(
    tmp_path: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = remade(chat_model, tmp_path / "short", {}, max_position_embeddings=70)
    recipe = write_recipe(tmp_path, base, sft=", keep: 0.5", merge=False)
    assert main(["run", str(recipe)]) == 4
    said = "".join(capsys.readouterr())
    assert "no room for a prompt and 64 tokens of an answer" in said and "sft 1/" not in said


def test_likeliest_tokens_give_the_whole_divergence_of_a_small_vocabulary() -> None:
    torch.manual_seed(0)
    base, model = torch.randn(7, 50), torch.randn(7, 50)
    nats, same = Likeliest.of(base).divergence(model)
    p, q = base.log_softmax(-1), model.log_softmax(-1)
    torch.testing.assert_close(nats, (p.exp() * (p - q)).sum(-1))
    assert same.tolist() == (base.argmax(-1) == model.argmax(-1)).tolist()
    none, all_same = Likeliest.of(base).divergence(base)
    assert none.abs().max() < 1e-6 and all_same.all()


def test_likeliest_tokens_of_a_large_vocabulary_never_overstate(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base, model = 6 * torch.randn(7, 3000), 6 * torch.randn(7, 3000)
    p, q = base.log_softmax(-1), model.log_softmax(-1)
    whole = (p.exp() * (p - q)).sum(-1)
    nats, _ = Likeliest.of(base).divergence(model)
    assert (nats <= whole + 1e-4).all()
    assert (nats >= 0.8 * whole).all()
