"""Write a model's bill of materials, `bom.json`: what it was made from, in CycloneDX 1.6 (https://cyclonedx.org).

Every entry comes from a manifest, as the model card's do. Files are named without their folders.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tongwen.core.artifact import Artifact
from tongwen.export.card import ancestry, licence_of

FINGERPRINT = "tongwen:fingerprint"  # of the tensors, whatever files hold them


def make_bill_of_materials(title: str, model: Artifact) -> dict[str, Any]:
    """Return the bill of a finished model: its base, the stages between, their data, and the packages that made it."""
    stages = ancestry(model)
    subject = _model(title, model.fingerprint, model.kind)
    parts = [_model(one.path.name, one.fingerprint, one.kind) for one in stages[1:] if one.kind != "prepare"]
    parts += _bases(stages)
    parts += [part for one in stages for part in _data(one.manifest)]
    parts += [_package(name, version) for name, version in model.manifest.get("versions", {}).items()]
    components = list({part["bom-ref"]: part for part in parts if part["bom-ref"] != subject["bom-ref"]}.values())
    tool = {"type": "application", "name": "tongwen", "version": str(model.manifest.get("tongwen", ""))}
    metadata: dict[str, Any] = {"tools": {"components": [tool]}, "component": subject}
    if created := model.manifest.get("created"):
        metadata["timestamp"] = datetime.strptime(created, "%Y-%m-%dT%H:%M:%S%z").isoformat()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, model.fingerprint)}",
        "version": 1,
        "metadata": metadata,
        "components": components,
        "dependencies": [{"ref": subject["bom-ref"], "dependsOn": [part["bom-ref"] for part in components]}],
    }


def _model(name: str, fingerprint: str, kind: str) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": f"{kind}-{fingerprint[:16]}",
        "name": name,
        "description": kind,
        "properties": [{"name": FINGERPRINT, "value": fingerprint}],
    }


def _bases(stages: Iterable[Artifact]) -> list[dict[str, Any]]:
    """Return the models that none of the stages made, with their licences as far as their own cards name them."""
    out, made = [], {stage.fingerprint for stage in stages}
    for stage in stages:
        for role, parent in stage.manifest.get("parents", {}).items():
            if role == "base" and parent.get("fingerprint") and parent["fingerprint"] not in made:
                one = _model(Path(str(parent["path"])).name, str(parent["fingerprint"]), "base")
                licence = licence_of(Path(str(parent["path"])))
                out.append(one | ({"licenses": [{"license": {"name": licence}}]} if licence else {}))
    return out


def _package(name: str, version: str) -> dict[str, Any]:
    address = f"pkg:pypi/{name}@{quote(version)}"
    return {"type": "library", "bom-ref": address, "name": name, "version": version, "purl": address}


def _data(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the files that `prepare` read."""
    if manifest["kind"] != "prepare":
        return []
    return [
        {
            "type": "data",
            "bom-ref": f"data-{facts['sha256'][:16]}",
            "name": Path(name).name,
            "hashes": [{"alg": "SHA-256", "content": facts["sha256"]}],
        }
        for name, facts in manifest.get("files", {}).items()
        if facts.get("sha256")
    ]
