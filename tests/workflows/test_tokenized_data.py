"""The token cache: its key covers every deciding setting, and nothing else encodes again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import dialogues, write_recipe, write_rows
from tongwen.cli.main import main
from tongwen.core import artifact
from tongwen.recipe.load import load_recipe
from tongwen.workflows import record_encoders, tokenized_data


def prepared(folder: Path, base: Path, **options: Any) -> tuple[Any, artifact.Artifact]:
    recipe = write_recipe(folder, base, **options)
    assert main(["run", str(recipe), "--only", "prepare"]) == 0
    return load_recipe(recipe)[0], artifact.open_artifact(folder / "out" / "prepare", "prepare")


def test_cache_key_depends_on_all_settings_of_the_tokens(chat_model: Path, tmp_path: Path) -> None:
    recipe, made = prepared(tmp_path, chat_model)
    reader = record_encoders.make_dialogue_encoder(recipe.base, recipe.sft)
    key = tokenized_data.cache_key(made, reader)

    def changed(**settings: Any) -> str:
        section = recipe.sft.model_copy(update=settings)
        return tokenized_data.cache_key(made, record_encoders.make_dialogue_encoder(recipe.base, section))

    assert changed(learning_rate=1.0, batch_size=3) == key
    others = {
        changed(max_length=64),
        changed(learn="everything"),
        changed(template="plain"),
        changed(too_long="drop_turns"),
    }
    assert len(others | {key}) == 5
    other_data = artifact.Artifact(made.path, {**made.manifest, "fingerprint": "f" * 64})
    assert tokenized_data.cache_key(other_data, reader) != key


def test_encoding_is_cached_and_resumes_after_a_crash(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = dialogues(2600)
    for number, row in enumerate(rows):
        row["instruction"] += f"（{number}）"
    recipe, made = prepared(tmp_path, chat_model, rows=rows)
    reader = record_encoders.make_dialogue_encoder(recipe.base, recipe.sft)

    def encode(folder: str) -> tokenized_data.TokenizedData:
        return tokenized_data.encode_prepared(made, reader, 42, tmp_path / folder)

    whole = encode("a")
    written = tokenized_data.token_store.Writer.add
    batches = []

    def dying(self: Any, batch: Any, *rest: Any) -> None:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(batch.rows)
        written(self, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tokenized_data.token_store.Writer, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            encode("b")
    again = encode("b")
    assert batches == [1000, 1000]
    assert "continues at row 2,000" in capsys.readouterr().out
    for name in ("ids", "offsets", "spans", "samples"):
        assert np.array_equal(getattr(again.store, name), getattr(whole.store, name)), name
    assert again.ledger.to_dict() == whole.ledger.to_dict()
    assert again.mask == whole.mask
    encode("b")
    assert "already encoded" in capsys.readouterr().out


def test_audit_counts_every_sample(chat_model: Path, tmp_path: Path) -> None:
    recipe, made = prepared(tmp_path, chat_model)
    reader = record_encoders.make_dialogue_encoder(recipe.base, recipe.sft)
    found = tokenized_data.encode_prepared(made, reader, 42, tmp_path / "t")
    mask, store = found.mask, found.store
    learned = sum(int(store.sample(index)[1].sum()) for index in range(len(store)))
    assert mask["learned_tokens"] == learned == mask["roles"]["assistant"]["learned"]
    assert mask["roles"]["prompt"]["learned"] == 0
    assert sum(role["tokens"] for role in mask["roles"].values()) == mask["tokens"] == len(store.ids)
    assert sum(count for _, count in mask["lengths"]) == len(store) == 20
    assert mask["round_trip"] == {"checked": 20, "differ": 0}
    assert mask["stop_learned_share"] == 1


def test_source_weights_reach_the_epoch(chat_model: Path, tmp_path: Path) -> None:
    more = dialogues(30)
    for number, row in enumerate(more):
        row["instruction"] = f"另一个问题（{number}）"
    file = write_rows(tmp_path / "more.jsonl", more)
    recipe = write_recipe(tmp_path, chat_model)
    text = (
        recipe.read_text(encoding="utf-8")
        .replace("held_out: 4", "held_out: 0")
        .replace(
            f"dialogues: {tmp_path / 'data.jsonl'}",
            f"dialogues: [{tmp_path / 'data.jsonl'}, {{path: {file}, weight: 0.5}}]",
        )
    )
    recipe.write_text(text, encoding="utf-8")
    assert main(["run", str(recipe), "--only", "prepare"]) == 0
    parsed = load_recipe(recipe)[0]
    made = artifact.open_artifact(tmp_path / "out" / "prepare", "prepare")
    found = tokenized_data.encode_prepared(
        made, record_encoders.make_dialogue_encoder(parsed.base, parsed.sft), 42, tmp_path / "t"
    )
    for epoch in range(2):
        files = [Path(found.store.origin(index).file).name for index in found.draw(epoch)]
        assert (files.count("data.jsonl"), files.count("more.jsonl")) == (24, 15)
    assert set(found.draw(0)) | set(found.draw(1)) == set(range(54))
    assert not found.notices


def test_missed_share_is_reported(chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"instruction": "说说天气。", "input": "", "output": "今天天气很好，我们去公园散步吧。" * 6}
    for share, reported in ((0.12, True), (0.175, False)):
        folder = tmp_path / str(share)
        file = write_rows(folder / "long.jsonl", [long, {**long, "instruction": "再说说天气。"}])
        recipe = write_recipe(folder, chat_model, merge=False)
        text = recipe.read_text(encoding="utf-8").replace("held_out: 4", "held_out: 0")
        data = folder / "data.jsonl"
        recipe.write_text(text.replace(f"dialogues: {data}", f"dialogues: [{data}, {{path: {file}, share: {share}}}]"))
        ahead = tokenized_data.encode_in_memory(
            load_recipe(recipe)[0], record_encoders.make_dialogue_encoder(str(chat_model), load_recipe(recipe)[0].sft)
        )
        drawn = ahead.draw(0)
        inside = [ahead.store.lengths[index] * (index >= 24) for index in drawn]
        got = sum(inside) / sum(ahead.store.lengths[index] for index in drawn)
        assert bool(abs(got / share - 1) > 0.1) is reported
        notice = f"{file}: the recipe asks for {share} of the tokens, but the first epoch has {got:.3g}"
        assert [notice in text for text in ahead.notices] == [True] * reported
        assert (notice in capsys.readouterr().out) is reported


def test_preview_matches_training_data(chat_model: Path, tmp_path: Path) -> None:
    recipe, made = prepared(tmp_path, chat_model)
    reader = record_encoders.make_dialogue_encoder(recipe.base, recipe.sft)
    ahead = tokenized_data.encode_in_memory(recipe, reader)
    later = tokenized_data.encode_prepared(made, reader, 42, tmp_path / "t")
    assert np.array_equal(ahead.store.ids, later.store.ids)
    assert ahead.draw(0) == later.draw(0)
    assert json.dumps(ahead.mask["lengths"]) == json.dumps(later.mask["lengths"])
