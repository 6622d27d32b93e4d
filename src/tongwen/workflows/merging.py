"""Merge adapters into their base, in order; write an ordinary Hugging Face model folder.

The fingerprints that training recorded show whether base and adapters belong together. The base's tensors are streamed,
a block of rows at a time. Tokenizer, template and stop tokens come from the last adapter's folder, because the model
was trained with them. The result is read back and compared with base + adapters. Heavy imports are avoided: torch alone
would need more memory than the merge.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tongwen.core import artifact, console
from tongwen.core.errors import ArtifactError, MissingPackage, ModelError, TongwenError, first_line
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import TensorSource, find_tensors
from tongwen.export import pth
from tongwen.export.hf import check_same
from tongwen.model.adapters import lineage
from tongwen.model.adapters.read import EMBEDDINGS, NotOneToOne, read_adapter
from tongwen.model.loading import chat_setup, quantized, sentencepiece
from tongwen.model.loading.fingerprint import combine, tensor_digests
from tongwen.model.loading.locate import ensure_local, locate
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.names import all_names
from tongwen.model.loading.tensors import TorchTensors, load_bin, open_model
from tongwen.model.loading.tokenizer import load_tokenizer
from tongwen.model.merging import parity
from tongwen.model.merging.combine import Combination
from tongwen.model.merging.merge import (
    MergeResult,
    MergeTarget,
    check_rows,
    combine_changes,
    merge_adapters,
    plan_targets,
    size_of,
)

if TYPE_CHECKING:
    from tongwen.model.merging.in_memory import PeftMerge  # imports torch

DTYPES = {"base": None, "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class MergeOptions:
    """Options of a merge.

    to: hf or pth; parity: streamed, or full (both models in memory); onto: the original base, or the base as quantised
    in training (nf4 or int8); mix: how to combine adapters that were all trained on the same base.
    """

    dtype: str = "base"
    to: str = "hf"
    parity: str = "streamed"
    onto: str = "original"
    mix: Combination | None = None
    shard_gb: float = 5.0
    force: bool = False


def merge(
    base: str, adapters: Sequence[str], out: Path, settings: dict[str, Any], options: MergeOptions
) -> artifact.Artifact:
    """Merge adapters into a base, in this order.

    Raises ArtifactError if an adapter was not trained on the model below it (`force` continues, and is recorded), and
    NumbersError if the result differs from base + adapters.
    """
    place, names = resolve(base, adapters)
    if options.mix and len(names) != len(adapters):
        raise ArtifactError(
            _("it is itself an adapter, not the common base"),
            place=base,
            remedy=f"tongwen merge --base {place.name} --adapter {names[0]} --out MERGED",
        )
    console.header("merge", " + ".join([place.name, *names]))
    links = [lineage.read_link(read_adapter(Path(name))) for name in names]
    place = ensure_local(place)
    with console.waiting(_("reading the base")):
        lines = tensor_digests(place)
    fingerprint = combine(lines)
    forced = _check_lineage(place, fingerprint, links, options)
    parents = {"base": {"path": place.name, "fingerprint": fingerprint}}
    for number, link in enumerate(links, 1):
        role = "adapter" if len(links) == 1 else f"adapter_{number}"
        parents[role] = link.stage.as_parent() if link.stage else {"path": link.name, "fingerprint": link.fingerprint}
    with artifact.create(
        out, "model" if options.to == "hf" else "pth", parents, settings, remove_on_error=True
    ) as draft:
        counts = _write(place, {} if place.gguf else lines, links, draft, options)
        _copy_chat_setup(place, links, draft.path)
        if options.to == "pth":
            _as_pth(draft)
        draft.facts["counts"], draft.facts["forced"] = counts, bool(forced)
        draft.record_files(lambda file: options.to == "pth" or file.suffix != ".safetensors")
        if forced:
            draft.facts["forced_over"] = forced
        last = links[-1].stage
        if last:
            draft.facts["template_name"] = last.manifest.get("template_name")
    assert draft.artifact
    console.success(
        _("{changed} of {tensors} tensors changed · {out}").format(
            changed=counts["changed"], tensors=counts["tensors"], out=out
        )
    )
    return draft.artifact


def _as_pth(draft: artifact.Draft) -> None:
    """Replace the merged model's files with LLaMA's original `.pth` format; keep its tokenizer file."""
    place = ModelRef(str(draft.path), str(draft.path))
    tensors, config = open_model(place)
    kept = {*draft.path.glob("tokenizer.model")}
    merged = [file for file in draft.path.iterdir() if file not in kept]
    with console.progress(len(tensors.facts), "pth") as bar:
        pth.write(tensors, config, draft.path, bar.update)
    back = pth.PthTensors([TorchTensors(load_bin(file)) for file in pth.find_files(draft.path)], draft.path)
    check_same(pth.UntiedTensors(tensors), back, str(draft.path))
    for file in merged:
        file.unlink()


def resolve(base: str, adapters: Sequence[str]) -> tuple[ModelRef, list[str]]:
    """Return (base, all adapters). If `base` is itself a stage with an adapter, its own base and adapter come first."""
    place = locate(base)
    return replace(place, adapters=()), [*place.adapters, *adapters]


def _check_lineage(
    place: ModelRef, fingerprint: str, links: list[lineage.AdapterLink], options: MergeOptions
) -> str | None:
    """Raise ArtifactError if base and adapters do not belong together; with --force, return its text."""
    try:
        for chain in [[link] for link in links] if options.mix else [links]:
            lineage.check_chain(place.name, fingerprint, chain)
    except ArtifactError as error:
        if not options.force:
            raise
        console.notice(_("--force: {error}").format(error=error.text()))
        return error.text()
    for doubt in lineage.describe_unverified(place.name, links):
        console.notice(doubt)
    return None


def _write(
    place: ModelRef,
    lines: dict[str, str],
    links: list[lineage.AdapterLink],
    draft: artifact.Draft,
    options: MergeOptions,
) -> dict[str, Any]:
    """Write and check weights and config, and set the draft's fingerprint. Returns counts of tensors."""
    original, config = open_model(place)
    base = original if options.onto == "original" else quantized.QuantizedTensors(original, place, options.onto)
    adapters, dtype = [link.adapter for link in links], DTYPES[options.dtype]
    made: PeftMerge | None = None
    try:
        targets, config, notices = plan_targets(base, config, adapters, dtype, lambda: all_names(place, base.facts))
        if options.mix:
            combine_changes(base, targets, options.mix)
    except NotOneToOne as reason:
        made = _merge_in_memory(place, original, links, options, str(reason))
        targets, config, notices = _plan_from_peft(original, config, made, links, dtype)
    for notice in notices:
        console.notice(notice)
    artifact.check_disk(draft.path, sum(size_of(target) for target in targets))
    with console.progress(len(targets), "merge") as bar:
        merged = merge_adapters(
            base, lines if base is original else {}, targets, draft.path, int(options.shard_gb * 1e9), bar.update
        )
    _write_config(config, draft.path, dtype)
    for notice in _find_warnings(merged):
        console.notice(notice)
    found = {"rows": check_rows(base, merged)}
    found |= _compare(place, base, merged, config, links, draft.path, options, made)
    draft.facts["parity"] = found
    if base is original and made is None and (kind := _trained_on(links)):
        draft.facts["quantised"] = _distance(
            original, quantized.QuantizedTensors(original, place, kind), merged, config
        )
    draft.fingerprint, draft.facts["tensors"] = combine(merged.lines), merged.lines
    return {"tensors": len(targets), "changed": sum(bool(target.changes) for target in targets)}


def _trained_on(links: list[lineage.AdapterLink]) -> str:
    """Return nf4 or int8 if the last adapter was trained on a quantised base, else an empty string."""
    stage = links[-1].stage
    return quantized.kind_of(stage.manifest["settings"]) if stage else ""


def _distance(
    original: TensorSource, seen: quantized.QuantizedTensors, merged: MergeResult, config: dict[str, Any]
) -> dict[str, Any]:
    """Measure and print the distance between the merged model and the trained one, whose base was quantised."""
    with console.waiting(_("comparing the {kind} base with the original").format(kind=seen.kind)):
        found: dict[str, Any] = {"kind": seen.kind, "weights": quantized.distance(original, seen)}
        sides = parity.logits_of_both(seen, merged, config)
        found |= {"logits": parity.measure(*sides)} if sides else {}
    moved = _(", logits by {relative:.1%}").format(relative=found["logits"]["relative"]) if sides else ""
    console.notice(
        _(
            "the adapter was trained on the base in {kind} and is merged into the original base: the weights differ by {weights:.1%}{moved}; onto: {kind} merges into the base used in training"
        ).format(kind=seen.kind, weights=found["weights"], moved=moved)
    )
    return found


def _compare(
    place: ModelRef,
    base: TensorSource,
    merged: MergeResult,
    config: dict[str, Any],
    links: list[lineage.AdapterLink],
    out: Path,
    options: MergeOptions,
    made: PeftMerge | None,
) -> dict[str, Any]:
    """Compare the logits of base + adapters with those of the merged model.

    made: what peft merged, if it did already. peft is asked for `--parity full`, too, unless it has no live layers of
    such a merge: it neither combines adapters as `mix` does, nor has the base as quantised for `onto`.
    """
    of_peft = options.mix is None and options.onto == "original"
    if options.parity == "full" and not of_peft:
        console.notice(_("peft cannot run this combination unmerged; logits are compared layer by layer"))
    if made is None and options.parity == "full" and of_peft:
        made = _with_peft(place, base, links)
    if made is not None:
        found: dict[str, Any] | None = _compare_with_peft(made, merged, out)
    else:
        with console.waiting(_("comparing logits, layer by layer")):
            found = parity.compare_logits(base, merged, config)
    if found is None and of_peft and _fits_in_memory(base):
        found = _compare_with_peft(_with_peft(place, base, links), merged, out)
    if found is None:
        console.notice(
            _(
                "{model_type!r} does not support comparing logits layer by layer; --parity full compares them in memory"
            ).format(model_type=config.get("model_type"))
        )
        return {}
    console.success(
        _(
            "base + adapters against the merged model: logits differ by at most {difference:.2g} ({relative:.2g} of their spread)"
        ).format(difference=found["max_logit_difference"], relative=found["relative"])
    )
    return found


def _compare_with_peft(made: PeftMerge, merged: MergeResult, out: Path) -> dict[str, Any]:
    """Compare peft's live layers with the merged folder, read back by transformers, and each tensor with peft's own."""
    from tongwen.model.merging import in_memory

    in_memory.check_tensors(made, merged)
    with console.waiting(_("comparing the logits of both models in memory")):
        logits = in_memory.logits_of_folder(out, made.ids)
    return {**parity.check_difference(made.logits, logits, parity.limit_of(merged)), "judge": "peft"}


def _with_peft(place: ModelRef, base: TensorSource, links: list[lineage.AdapterLink]) -> PeftMerge:
    from tongwen.model.merging import in_memory

    with console.waiting(_("opening base and adapters with peft")):
        return in_memory.merge_with_peft(place, base, [link.adapter.folder for link in links])


def _fits_in_memory(base: TensorSource) -> bool:
    """Whether both models in fp32 take less than a quarter of the memory that is free."""
    import psutil

    parameters = sum(math.prod(shape) for _kind, shape in base.facts.values())
    return bool(4 * 2 * 4 * parameters < psutil.virtual_memory().available)


def _merge_in_memory(
    place: ModelRef, base: TensorSource, links: list[lineage.AdapterLink], options: MergeOptions, reason: str
) -> PeftMerge:
    """Merge with peft and the whole model in memory, for adapters whose tensors do not map one to one."""
    if options.mix or options.onto != "original":
        raise ArtifactError(
            _("only peft can merge this adapter, in memory, alone and into the original base: {reason}").format(
                reason=reason
            ),
            place=links[0].name,
        )
    console.notice(
        _("the adapter cannot be merged by streaming ({reason}); peft merges the whole model in memory").format(
            reason=reason
        )
    )
    return _with_peft(place, base, links)


def _plan_from_peft(
    base: TensorSource, config: dict[str, Any], made: PeftMerge, links: list[lineage.AdapterLink], dtype: str | None
) -> tuple[list[MergeTarget], dict[str, Any], list[str]]:
    from tongwen.model.merging import in_memory

    targets, config, notices = in_memory.plan_from_peft(base, config, made, links[-1].adapter.folder, dtype)
    if not any(target.changes for target in targets):
        raise ArtifactError(_("the merged model equals the base"), place=str(links[0].adapter.folder))
    return targets, config, notices


def _write_config(config: dict[str, Any], out: Path, dtype: str | None) -> None:
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = TORCH_NAMES[dtype]
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _find_warnings(merged: MergeResult) -> list[str]:
    """Return warnings about the adapters: targets that are all zero, changes that the dtype loses."""
    out = []
    if merged.untrained:
        name, count = merged.untrained[0], len(merged.untrained)
        out.append(_("the adapter is all zero on {count} targets, the first: {name}").format(count=count, name=name))
    if lost := [name for name in merged.same if name not in merged.untrained]:
        out.append(
            _(
                "the change of {count} tensors is below the precision of their dtype and was lost, the first: {lost}; --dtype fp32 keeps it"
            ).format(count=len(lost), lost=lost[0])
        )
    return out


def _copy_sentencepiece(folders: list[Path], out: Path) -> None:
    """Copy the tokenizer.model whose pieces the result's tokenizer.json has: training leaves only the latter, and LLaMA's
    own programs read only the former."""
    made, model = out / "tokenizer.json", out / "tokenizer.model"
    found = [file for folder in reversed(folders) if (file := folder / model.name).is_file()]
    if model.exists() or not made.is_file() or not found:
        return
    try:
        if (own := next((file for file in found if sentencepiece.is_of(file, made)), None)) is not None:
            shutil.copyfile(own, model)
            return
        why = _("none has the pieces of this vocabulary")
    except (MissingPackage, ModelError, ValueError, KeyError) as error:
        why = error.text() if isinstance(error, TongwenError) else first_line(error)
    console.notice(_("the result has no tokenizer.model: {reason}").format(reason=why))


def _copy_chat_setup(place: ModelRef, links: list[lineage.AdapterLink], out: Path) -> None:
    """Copy tokenizer, template and stop tokens from the last adapter that has a tokenizer, else from the base."""
    folders = [Path(place.folder), *(link.adapter.folder for link in links)]
    source = next((folder for folder in reversed(folders) if chat_setup.has_tokenizer(folder)), None)
    if place.gguf and source in (None, folders[0]):
        load_tokenizer(place).save_pretrained(str(out))
    elif source is None:
        console.notice(_("neither the base nor the adapter has a tokenizer: the merged model has none"))
    else:
        if source == folders[0]:
            console.notice(_("the adapter has no tokenizer; using the base's"))
        chat_setup.copy_chat_setup(source, out)
    parents = [link.stage.manifest["parents"].get("base", {}).get("path") for link in links if link.stage]
    _copy_sentencepiece([*folders, *(Path(parent) for parent in parents if parent)], out)
    stops = folders[0] / "generation_config.json"
    if stops.is_file() and not (out / stops.name).is_file():
        shutil.copyfile(stops, out / stops.name)
    stored = find_tensors(out)
    embedding = next((name for name in stored if name.endswith(EMBEDDINGS)), None)
    if embedding:
        lineage.check_vocabulary(out, stored[embedding].shape[0], str(source))
