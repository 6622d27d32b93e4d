"""An adapter merges onto what it was trained on, in the order in which it was trained, and onto nothing else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import make_adapter
from tests.conftest import byte_level_tokenizer, tensors, tiny_llama
from tongwen.core import artifact
from tongwen.model.loading.fingerprint import fingerprint_chain, fingerprint_model
from tongwen.model.loading.model_ref import ModelRef

BASES = 3


def trained(base: Path, below: list[artifact.Artifact], folder: Path, seed: int) -> artifact.Artifact:
    """An adapter with the manifest that training leaves: on a base, or on a base with adapters."""
    fingerprint = str(fingerprint_model(ModelRef("", str(base))))
    for stage in below:
        fingerprint = fingerprint_chain(fingerprint, stage.fingerprint)
    parents = {"base": {"path": str(below[-1].path if below else base), "fingerprint": fingerprint}}
    with artifact.create(folder, "sft", parents, {}) as draft:
        make_adapter(base, draft.path, seed=seed, r=2)
        draft.fingerprint = str(fingerprint_model(ModelRef("", str(draft.path))))
    assert draft.artifact
    return draft.artifact


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[list[artifact.Artifact]]]:
    """Three bases of one shape, and on each a chain of two adapters."""
    folder = tmp_path_factory.mktemp("family")
    bases, chains = [], []
    for number in range(BASES):
        base = folder / f"base-{number}"
        tokenizer = byte_level_tokenizer(base)
        tiny_llama(base, len(tokenizer), seed=number, tie_word_embeddings=False)
        first = trained(base, [], folder / f"first-{number}", 10 + number)
        second = trained(base, [first], folder / f"second-{number}", 20 + number)
        bases.append(base)
        chains.append([first, second])
    return bases, chains


def merge(tongwen: Any, base: Path, adapters: list[artifact.Artifact], out: Path, *flags: str) -> tuple[int, str, str]:
    arguments = [word for adapter in adapters for word in ("--adapter", adapter.path)]
    return tongwen("merge", "--base", base, *arguments, "--out", out, *flags)


def test_only_matching_adapter_pairs_merge(family: Any, tmp_path: Path, tongwen: Any) -> None:
    """Three bases with every ordered pair of the four adapters of two chains: 2 of 36 are right."""
    bases, chains = family
    adapters = [*chains[0], *chains[1]]
    accepted, refused = [], 0
    for number, base in enumerate(bases):
        for pair in itertools.permutations(adapters, 2):
            out = tmp_path / "out"
            code, _, err = merge(tongwen, base, list(pair), out)
            right = number < 2 and list(pair) == chains[number]
            assert (code == 0) is right, err
            if right:
                accepted.append(number)
                artifact.put_aside(out)
                continue
            refused += 1
            assert code == 4 and not out.exists() and not artifact.partial_of(out).exists()
            assert err.count("fingerprint") and str(pair[0].path) in err
    assert accepted == [0, 1] and refused == 34


def test_wrong_order_names_fingerprints_and_the_right_order(family: Any, tmp_path: Path, tongwen: Any) -> None:
    (base, *_), ((first, second), *_) = family
    code, _, err = merge(tongwen, base, [second, first], tmp_path / "out")
    below = str(fingerprint_model(ModelRef("", str(base))))
    assert code == 4 and below[:12] in err and fingerprint_chain(below, first.fingerprint)[:12] in err
    assert f"--adapter {first.path} --adapter {second.path}" in err
    code, text, _ = merge(tongwen, base, [second, first], tmp_path / "out", "--force")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert code == 0 and "--force" in text and manifest["forced"] is True and below[:12] in manifest["forced_over"]


def test_stage_as_base_uses_its_own_base(family: Any, tmp_path: Path, tongwen: Any) -> None:
    (base, *_), ((first, second), *_) = family
    assert merge(tongwen, base, [first, second], tmp_path / "long")[0] == 0
    assert merge(tongwen, first.path, [second], tmp_path / "short")[0] == 0
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("long", "short")]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    assert list(manifests[0]["parents"]) == ["base", "adapter_1", "adapter_2"]


def test_adapter_is_not_merged_twice(family: Any, tmp_path: Path, tongwen: Any) -> None:
    (base, *_), ((first, _), *_) = family
    assert merge(tongwen, base, [first], tmp_path / "once")[0] == 0
    code, _, err = merge(tongwen, tmp_path / "once", [first], tmp_path / "twice")
    assert code == 4 and "fingerprint" in err


def test_changed_adapter_is_refused(family: Any, tmp_path: Path, tongwen: Any) -> None:
    import shutil

    (base, *_), ((first, _), *_) = family
    copy = shutil.copytree(first.path, tmp_path / "copy")
    file = copy / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x10
    file.write_bytes(content)
    code, _, err = tongwen("merge", "--base", base, "--adapter", copy, "--out", tmp_path / "out")
    assert code == 4 and "manifest records" in err and first.fingerprint[:12] in err


def test_same_merge_gives_the_same_bytes(family: Any, tmp_path: Path, tongwen: Any) -> None:
    (base, *_), ((first, second), *_) = family
    for name in ("one", "other"):
        assert merge(tongwen, base, [first, second], tmp_path / name)[0] == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1] and tensors(tmp_path / "one")
