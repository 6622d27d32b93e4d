"""The bill of materials of an exported model names all that the model was made from; CycloneDX's own schema accepts it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe

pytest.importorskip("cyclonedx")
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator


def test_bill_names_base_adapter_data_and_packages(chat_model: Path, tmp_path: Path, tongwen: Any) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in chat_model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    recipe = write_recipe(tmp_path, base, sft=", stop_after: 1 steps", extra="export: {formats: [hf]}\n")
    code, out, err = tongwen("run", recipe)
    assert code == 0 and ".partial" not in out + err, "each result is named where it lies"
    (folder,) = (file.parent for file in (tmp_path / "out" / "export").rglob("config.json"))
    text = (folder / "bom.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    parts = {part["name"]: part for part in bill["components"]}
    assert str(tmp_path) not in text, "a folder of the author's machine is no part of the model"
    assert parts["base"]["licenses"] == [{"license": {"name": "apache-2.0"}}]
    made = json.loads((tmp_path / "out" / "merge" / "manifest.json").read_text())
    fingerprints = {part["properties"][0]["value"] for part in bill["components"] if "properties" in part}
    assert fingerprints == {made["parents"][role]["fingerprint"] for role in ("base", "adapter")}
    data = hashlib.sha256((tmp_path / "data.jsonl").read_bytes()).hexdigest()
    assert parts["data.jsonl"]["hashes"] == [{"alg": "SHA-256", "content": data}]
    assert parts["torch"]["purl"].startswith("pkg:pypi/torch@") and "+" not in parts["torch"]["purl"]
    assert {*bill["dependencies"][0]["dependsOn"]} == {part["bom-ref"] for part in bill["components"]}
