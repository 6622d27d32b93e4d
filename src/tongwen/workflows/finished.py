"""Whether a finished stage still holds what it was finished with: sizes at a glance, digests on request."""

from __future__ import annotations

from tongwen.core import artifact, resume
from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _

OF_TENSORS = ("model", "vocab", "pretrain", "sft", "prefer")  # kinds whose fingerprint is that of their tensors


def check_finished(stage: artifact.Artifact, *, digests: bool = False) -> None:
    """Raise ArtifactError when a file of a finished stage is gone or has another size; with `digests`, other content."""
    for name, size in stage.manifest.get("sizes", {}).items():
        file = stage.path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise _changed(
                str(file),
                _("this file of the finished stage is missing")
                if found is None
                else _("this file of the finished stage has {found} bytes, but its manifest records {size}").format(
                    found=found, size=size
                ),
            )
    if not digests:
        return
    for name, digest in recorded_files(stage).items():
        if artifact.hash_file(stage.path / name) != digest:
            raise _changed(str(stage.path / name), _("this file is no longer the one that its manifest records"))
    fingerprint, place = fingerprint_now(stage)
    if fingerprint not in ("", stage.fingerprint):
        raise _changed(place, _("this is no longer what its manifest records"))


def recorded_files(stage: artifact.Artifact) -> dict[str, str]:
    """Return name -> sha256 of the files in a folder that its manifest lists; of `prepare`, `files` are its sources."""
    if stage.kind == "prepare":
        return dict(stage.manifest.get("made", {}))
    return {name: facts["sha256"] for name, facts in stage.manifest.get("files", {}).items()}


def fingerprint_now(stage: artifact.Artifact) -> tuple[str, str]:
    """Return (fingerprint of a folder as it is now, the place of the first change). The fingerprint is empty for a folder
    whose manifest lists the hashes of its files."""
    if stage.kind in OF_TENSORS:
        from tongwen.model.loading.fingerprint import combine, tensor_digests
        from tongwen.model.loading.model_ref import ModelRef

        lines, recorded = tensor_digests(ModelRef(str(stage.path), str(stage.path))), stage.manifest.get("tensors", {})
        changed = sorted(name for name in recorded.keys() | lines.keys() if recorded.get(name) != lines.get(name))
        return combine(lines), f"{stage.path} {changed[0]}" if recorded and changed else str(stage.path)
    if recorded_files(stage):
        return "", str(stage.path)
    return artifact.fingerprint_files(stage.path), str(stage.path)


def _changed(place: str, rule: str) -> ArtifactError:
    return ArtifactError(rule, place=place, remedy=_("put it back; or: {hint}").format(hint=resume.rerun_hint()))
