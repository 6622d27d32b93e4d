"""chat vector: add the difference of an instruct model and its base to a model that learned a language on that base.

The tensors are streamed. Template and stop tokens come from the instruct model, the tokenizer from the target model, whose
vocabulary may have grown; each control token must have the same id in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tongwen.core import artifact, console, originals
from tongwen.core.errors import ArtifactError, RecipeError
from tongwen.core.i18n import _
from tongwen.model.loading import chat_setup
from tongwen.model.loading.fingerprint import combine, tensor_digests
from tongwen.model.loading.locate import ensure_local, locate
from tongwen.model.loading.tensors import open_model
from tongwen.model.loading.tokenizer import load_tokenizer
from tongwen.model.merging import chat_vector


def run(target: str, instruct: str, base: str, scale: float, out: str, *, again: bool) -> int:
    """target + scale x (instruct - base)"""
    folder = Path(out)
    names = {"target": target, "instruct": instruct, "base": base}
    originals.clear_path(folder, names.values(), again=again)
    opened = {role: ensure_local(locate(name)) for role, name in names.items()}
    for role, model in opened.items():
        if model.adapters:
            raise RecipeError(
                _("this is an adapter: merge it first"),
                place=names[role],
                remedy=f"tongwen merge --base {model.folder} --adapter {names[role]} --out MERGED",
            )
    console.header("chat vector", f"{target} + {scale:g} x ({instruct} − {base})")
    (target_tensors, config), (instruct_tensors, _unused), (base_tensors, _unused2) = (
        open_model(model) for model in opened.values()
    )
    chat_vector.check_alike(target_tensors, instruct_tensors, base_tensors)
    tokenizer, instruct_tokenizer = (load_tokenizer(opened[role]) for role in ("target", "instruct"))
    _check_control_tokens(tokenizer, instruct_tokenizer, instruct)
    parents = {
        role: {"path": names[role], "fingerprint": combine(tensor_digests(model))} for role, model in opened.items()
    }
    settings = {**names, "scale": scale}
    with artifact.create(folder, "model", parents, settings, remove_on_error=True) as draft:
        with console.progress(len(target_tensors.facts), "merge") as bar:
            added = chat_vector.add_chat_vector(
                target_tensors, instruct_tensors, base_tensors, scale, draft.path, bar.update
            )
        artifact.write_json(draft.path / "config.json", config)
        _copy_chat_setup(tokenizer, instruct_tokenizer, Path(opened["instruct"].folder), draft.path)
        draft.fingerprint = combine(added.lines)
        draft.facts = {"tensors": added.lines, "counts": {"tensors": len(added.lines), "changed": added.changed}}
        draft.record_files(lambda file: file.suffix != ".safetensors")
    assert draft.artifact
    if added.kept:
        console.notice(
            _("{kept:,} rows of the larger vocabulary have no counterpart and stay unchanged").format(kept=added.kept)
        )
    console.success(
        _("{changed} of {count} tensors changed · {out}").format(changed=added.changed, count=len(added.lines), out=out)
    )
    console.emit({"out": out, **{key: value for key, value in draft.artifact.manifest.items() if key != "tensors"}})
    return 0


def _check_control_tokens(tokenizer: Any, instruct_tokenizer: Any, instruct: str) -> None:
    """Raise ArtifactError when a control token of the instruct model has another id, or none, in the target's tokenizer."""
    for text in chat_setup.special_texts(instruct_tokenizer):
        index = instruct_tokenizer.convert_tokens_to_ids(text)
        if tokenizer.convert_tokens_to_ids(text) != index:
            raise ArtifactError(
                _("{text!r} is token {index} of the instruct model, but another token or none here").format(
                    text=text, index=index
                ),
                place=instruct,
                remedy=_("start from this instruct model's own base"),
            )


def _copy_chat_setup(tokenizer: Any, instruct_tokenizer: Any, instruct: Path, out: Path) -> None:
    tokenizer.chat_template = instruct_tokenizer.chat_template
    if instruct_tokenizer.eos_token:
        tokenizer.eos_token = instruct_tokenizer.eos_token
    tokenizer.save_pretrained(str(out))
    file = instruct / "generation_config.json"
    if file.is_file():
        artifact.write_json(out / file.name, artifact.read_json(file))
