"""Merging: a base and the adapters that were trained on it, in their order; an ordinary Hugging Face model folder out.

First whether they belong together, by the fingerprints that training recorded. Then the base's tensors stream through, a
block of rows at a time; tokenizer, template and stop tokens come from the last adapter's folder, because the model
learned with those. At the end the result is read back and compared with base + adapters. Nothing is imported that this
does not need: torch alone would cost more memory than the merge.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import Tensors, find_tensors
from tongwen.export import pth
from tongwen.export.hf import check_same
from tongwen.model.adapters import lineage
from tongwen.model.adapters.read import EMBEDDINGS, NotOneToOne, read_adapter
from tongwen.model.loading import chat_setup, load, quantized
from tongwen.model.loading.fingerprint import combine, model_lines
from tongwen.model.loading.tensors import TorchTensors, load_bin, open_model
from tongwen.model.merging import parity
from tongwen.model.merging.combine import Combination
from tongwen.model.merging.merge import MergeResult, check_rows, combine_changes, merge_adapters, plan_targets, size_of

DTYPES = {"base": None, "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is done. to: hf or pth; parity: streamed, or full (both models in memory); onto: the original base, or
    what training on nf4 or int8 saw of it; mix: adapters trained beside each other, and not one upon the other."""

    dtype: str = "base"
    to: str = "hf"
    parity: str = "streamed"
    onto: str = "original"
    mix: Combination | None = None
    shard_gb: float = 5.0
    force: bool = False


def merge(
    base: str, adapters: Sequence[str], out: Path, settings: dict[str, Any], choice: MergeOptions
) -> artifact.Artifact:
    """Fold adapters into a base, in this order. Raises ArtifactError when one was not trained on what lies below it
    (`force` goes on, and is recorded), NumbersError when the result is not base + adapters."""
    place, names = resolve(base, adapters)
    if choice.mix and len(names) != len(adapters):
        raise ArtifactError(
            _("it is itself an adapter, not the common base"),
            place=base,
            remedy=f"tongwen merge --base {place.name} --adapter {names[0]} --out MERGED",
        )
    console.header("merge", " + ".join([place.name, *names]))
    links = [lineage.read_link(read_adapter(Path(name))) for name in names]
    place = load.ensure_local(place)
    with console.waiting(_("reading the base")):
        lines = model_lines(place)
    fingerprint = combine(lines)
    forced = _check_lineage(place, fingerprint, links, choice)
    parents = {"base": {"path": place.name, "fingerprint": fingerprint}}
    for number, link in enumerate(links, 1):
        role = "adapter" if len(links) == 1 else f"adapter_{number}"
        parents[role] = link.stage.as_parent() if link.stage else {"path": link.name, "fingerprint": link.fingerprint}
    with artifact.create(out, "model" if choice.to == "hf" else "pth", parents, settings, swept=True) as draft:
        counts = _write(place, {} if place.gguf else lines, links, draft, choice)
        _copy_chat_setup(place, links, draft.path)
        if choice.to == "pth":
            _as_pth(draft)
        draft.facts["counts"], draft.facts["forced"] = counts, bool(forced)
        draft.record_files(lambda file: choice.to == "pth" or file.suffix != ".safetensors")
        if forced:
            draft.facts["forced_over"] = forced
        last = links[-1].stage
        if last:
            draft.facts["template_name"] = last.manifest.get("template_name")
    assert draft.artifact
    console.good(
        _("{changed} of {tensors} tensors changed · {out}").format(
            changed=counts["changed"], tensors=counts["tensors"], out=out
        )
    )
    return draft.artifact


def _as_pth(draft: artifact.Draft) -> None:
    """The merged model's files become LLaMA's own; its tokenizer file stays."""
    place = load.ModelRef(str(draft.path), str(draft.path))
    tensors, config = open_model(place)
    kept = {*draft.path.glob("tokenizer.model")}
    merged = [file for file in draft.path.iterdir() if file not in kept]
    with console.progress(len(tensors.facts), "pth") as bar:
        pth.write(tensors, config, draft.path, bar.update)
    back = pth.PthTensors([TorchTensors(load_bin(file)) for file in pth.find_files(draft.path)], draft.path)
    check_same(pth.with_head(tensors), back, str(draft.path))
    for file in merged:
        file.unlink()


def resolve(base: str, adapters: Sequence[str]) -> tuple[load.ModelRef, list[str]]:
    """(the base, all adapters on it): a base that is itself a stage with an adapter brings that one and its own base."""
    place = load.locate(base)
    return replace(place, adapters=()), [*place.adapters, *adapters]


def _check_lineage(
    place: load.ModelRef, fingerprint: str, links: list[lineage.AdapterLink], choice: MergeOptions
) -> str | None:
    """What --force passed over, or None."""
    try:
        for chain in [[link] for link in links] if choice.mix else [links]:
            lineage.check_chain(place.name, fingerprint, chain)
    except ArtifactError as error:
        if not choice.force:
            raise
        console.notice(_("--force: {error}").format(error=error.text()))
        return error.text()
    for doubt in lineage.describe_unverified(place.name, links):
        console.notice(doubt)
    return None


def _write(
    place: load.ModelRef,
    lines: dict[str, str],
    links: list[lineage.AdapterLink],
    draft: artifact.Draft,
    choice: MergeOptions,
) -> dict[str, Any]:
    """Weights and config, checked; returns counts. Sets the draft's fingerprint."""
    original, config = open_model(place)
    base = original if choice.onto == "original" else quantized.QuantizedTensors(original, place, choice.onto)
    adapters, dtype = [link.adapter for link in links], DTYPES[choice.dtype]
    try:
        targets, config, notices = plan_targets(base, config, adapters, dtype, lambda: _known(place))
        if choice.mix:
            combine_changes(base, targets, choice.mix)
    except NotOneToOne as reason:
        return _in_memory(place, links, draft, choice, str(reason))
    for notice in notices:
        console.notice(notice)
    artifact.check_disk(draft.path, sum(size_of(target) for target in targets))
    with console.progress(len(targets), "merge") as bar:
        folded = merge_adapters(
            base, lines if base is original else {}, targets, draft.path, int(choice.shard_gb * 1e9), bar.update
        )
    _write_config(config, draft.path, dtype)
    for notice in _remarks(folded):
        console.notice(notice)
    found = {"rows": check_rows(base, folded)}
    found |= _compare(place, base, folded, config, links, draft.path, choice)
    draft.facts["parity"] = found
    if base is original and (kind := _trained_on(links)):
        draft.facts["quantised"] = _distance(
            original, quantized.QuantizedTensors(original, place, kind), folded, config
        )
    draft.fingerprint, draft.facts["tensors"] = combine(folded.lines), folded.lines
    return {"tensors": len(targets), "changed": sum(bool(target.changes) for target in targets)}


def _trained_on(links: list[lineage.AdapterLink]) -> str:
    """nf4 or int8, when the last adapter learned beside a quantised base."""
    stage = links[-1].stage
    return quantized.kind_of(stage.manifest["settings"]) if stage else ""


def _distance(
    original: Tensors, seen: quantized.QuantizedTensors, folded: MergeResult, config: dict[str, Any]
) -> dict[str, Any]:
    """How far the merged model is from what was trained, which saw the base quantised. Said, and recorded."""
    with console.waiting(_("measuring the difference that {kind} makes").format(kind=seen.kind)):
        found: dict[str, Any] = {"kind": seen.kind, "weights": quantized.distance(original, seen)}
        sides = parity.logits_of_both(seen, folded, config)
        found |= {"logits": parity.measure(*sides)} if sides else {}
    moved = _(", logits by {relative:.1%}").format(relative=found["logits"]["relative"]) if sides else ""
    console.notice(
        _(
            "the adapter was trained on the base in {kind} and is merged into the original base: the weights differ by {weights:.1%}{moved}; onto: {kind} merges into the base used in training"
        ).format(kind=seen.kind, weights=found["weights"], moved=moved)
    )
    return found


def _compare(
    place: load.ModelRef,
    base: Tensors,
    folded: MergeResult,
    config: dict[str, Any],
    links: list[lineage.AdapterLink],
    out: Path,
    choice: MergeOptions,
) -> dict[str, Any]:
    """The logits of both, and where they were compared."""
    if choice.parity == "full":
        found: dict[str, Any] | None = _compare_whole(place, links, config, out, folded)
    else:
        with console.waiting(_("comparing logits, layer by layer")):
            found = parity.compare_logits(base, folded, config)
    if found is None:
        console.notice(
            _(
                "{model_type!r} does not support comparing logits layer by layer; --parity full compares them in memory"
            ).format(model_type=config.get("model_type"))
        )
        return {}
    console.good(
        _(
            "base + adapters against the merged model: logits differ by at most {difference:.2g} ({relative:.2g} of their spread)"
        ).format(difference=found["max_logit_difference"], relative=found["relative"])
    )
    return found


def _compare_whole(
    place: load.ModelRef, links: list[lineage.AdapterLink], config: dict[str, Any], out: Path, folded: MergeResult
) -> dict[str, Any]:
    """Both models loaded: base with the last adapter live beside it, and the merged one."""
    import torch

    from tongwen.model.merging import in_memory

    folders = [link.adapter.folder for link in links]
    ids = parity.fixed_ids(int(config["vocab_size"]))
    with console.waiting(_("comparing the logits of both models in memory")):
        live = in_memory.logits_of(
            in_memory.open_in_memory(place, folders, live=True),
            ids,
        )
        merged = in_memory.logits_of(load.load_model(load.ModelRef(str(out), str(out)), torch.float32).eval(), ids)
    return parity.check_difference(live, merged, parity.limit_of(folded))


def _in_memory(
    place: load.ModelRef, links: list[lineage.AdapterLink], draft: artifact.Draft, choice: MergeOptions, reason: str
) -> dict[str, Any]:
    """By peft, with the whole model in memory: for adapters whose tensors do not map one to one."""
    import torch

    from tongwen.model.merging import in_memory

    if choice.mix or choice.onto != "original":
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
    model = in_memory.open_in_memory(place, [link.adapter.folder for link in links], live=False)
    dtype = DTYPES[choice.dtype]
    model.to(getattr(torch, TORCH_NAMES[dtype]) if dtype else load.load_config(place).dtype or torch.float32)
    model.save_pretrained(str(draft.path), max_shard_size=f"{choice.shard_gb}GB")
    lines = model_lines(load.ModelRef(str(draft.path), str(draft.path)))
    draft.fingerprint, draft.facts["tensors"] = combine(lines), lines
    if draft.fingerprint == draft.parents["base"]["fingerprint"]:
        raise ArtifactError(_("the merged model equals the base"), place=str(links[0].adapter.folder))
    before = model_lines(place)
    return {"tensors": len(lines), "changed": sum(before.get(name) != line for name, line in lines.items())}


def _known(place: load.ModelRef) -> set[str]:
    from tongwen.model.merging.in_memory import known_names

    return known_names(place)


def _write_config(config: dict[str, Any], out: Path, dtype: str | None) -> None:
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = TORCH_NAMES[dtype]
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remarks(folded: MergeResult) -> list[str]:
    """What is odd in the adapters and yet no error."""
    out = []
    if folded.untrained:
        name, count = folded.untrained[0], len(folded.untrained)
        out.append(_("the adapter is all zero on {count} targets, the first: {name}").format(count=count, name=name))
    if lost := [name for name in folded.same if name not in folded.untrained]:
        out.append(
            _(
                "the change of {count} tensors is below the precision of their number type and was lost, the first: {lost}; --dtype fp32 keeps it"
            ).format(count=len(lost), lost=lost[0])
        )
    return out


def _copy_chat_setup(place: load.ModelRef, links: list[lineage.AdapterLink], out: Path) -> None:
    """Tokenizer, template and stop tokens: from the last adapter that brings a tokenizer, else from the base."""
    folders = [Path(place.folder), *(link.adapter.folder for link in links)]
    source = next((folder for folder in reversed(folders) if chat_setup.has_tokenizer(folder)), None)
    if place.gguf and source in (None, folders[0]):
        load.load_tokenizer(place).save_pretrained(str(out))
    elif source is None:
        console.notice(_("neither the base nor the adapter has a tokenizer: the merged model has none"))
    else:
        if source == folders[0]:
            console.notice(_("the adapter has no tokenizer; using the base's"))
        chat_setup.copy_chat_setup(source, out)
    stops = folders[0] / "generation_config.json"
    if stops.is_file() and not (out / stops.name).is_file():
        shutil.copyfile(stops, out / stops.name)
    stored = find_tensors(out)
    embedding = next((name for name in stored if name.endswith(EMBEDDINGS)), None)
    if embedding:
        lineage.check_vocabulary(out, stored[embedding].shape[0], str(source))
