"""Convert a model between formats: Hugging Face folder, LLaMA's original `.pth` files, GGUF.

A source in any format is opened as tensors and written a few rows at a time. The result is read back and compared with
the source before it gets its final name.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tongwen.core import artifact, console
from tongwen.core.chat_template import Template
from tongwen.core.errors import ArtifactError
from tongwen.core.i18n import _, ngettext
from tongwen.core.records import Message
from tongwen.core.safetensors_io import SHARD_BYTES, TensorSource
from tongwen.export import gguf, gguf_layout, gguf_metadata, hf, pth
from tongwen.export.bill_of_materials import make_bill_of_materials
from tongwen.export.card import make_card
from tongwen.export.gguf_vocab import read_vocabulary
from tongwen.export.ollama import make_modelfile
from tongwen.model.loading import chat_setup, sentencepiece
from tongwen.model.loading.architecture import load_config
from tongwen.model.loading.config_json import read_model_type
from tongwen.model.loading.fingerprint import combine, tensor_digests
from tongwen.model.loading.loader_errors import explain_errors
from tongwen.model.loading.locate import locate
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tensors import FileTensors, TorchTensors, load_bin, open_model
from tongwen.model.loading.tokenizer import load_tokenizer

SENTENCEPIECE = {  # tokenizer_config.json for LLaMA's tokenizer.model, which does not contain these settings
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}


@dataclass(frozen=True)
class ModelSource:
    """A model to convert.

    title: the base of the output's file names; folder: holds the tokenizer; place: None for LLaMA's original files.
    """

    name: str
    title: str
    tensors: TensorSource
    config: dict[str, Any]
    folder: Path
    place: ModelRef | None


def open_source(name: str) -> ModelSource:
    """Open a model in any format. Raises ModelError or ArtifactError if it is incomplete or an adapter."""
    folder = Path(name)
    if folder.is_dir() and (files := pth.find_files(folder)):
        original = pth.PthTensors([TorchTensors(load_bin(file)) for file in files], folder)
        console.notice(
            _(".pth files do not record the context length: using {max_position_embeddings}").format(
                max_position_embeddings=original.config["max_position_embeddings"]
            )
        )
        return ModelSource(name, folder.resolve().name, original, original.config, folder, None)
    place = locate(name)
    if place.adapters:
        raise ArtifactError(
            _("this folder contains an adapter"),
            place=name,
            remedy=f"tongwen merge --base {place.folder} --adapter {name} --out MERGED",
        )
    tensors, config = open_model(place)
    if config.get("model_type") == "baichuan":
        tensors, config = gguf_layout.as_llama(tensors, config, name)
        console.notice(_("this Baichuan is a LLaMA in structure and is treated as one"))
    return ModelSource(
        name, Path(place.gguf or name).resolve().name.removesuffix(".gguf"), tensors, config, Path(place.folder), place
    )


def check_ahead(base: str, formats: Sequence[str], quantize: str, merged: str) -> None:
    """Raise now, before training, if the result could not be exported: because of family, config, tokenizer or number
    type. merged: the folder that will hold the result."""
    if "gguf" not in formats:
        return
    place = locate(base)
    _check_gguf(base, load_config(place).to_dict(), quantize, merged)
    tokenizer = load_tokenizer(place)
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        read_vocabulary(Path(made), 1 + max(tokenizer.get_vocab().values()))


def _check_gguf(name: str, config: Mapping[str, Any], quantize: str, folder: str) -> dict[str, Any]:
    """Return the config with LLaMA's keys. Raises ModelError or MissingPackage if GGUF cannot hold the model."""
    gguf.check_type(quantize or "f16")
    with explain_errors(ModelRef(name, name)):
        llama_config = gguf_layout.with_llama_keys(config, folder)
    gguf_metadata.check_config(llama_config)
    return llama_config


def convert(source: ModelSource, to: str, out: Path, quantize: str, settings: Mapping[str, Any]) -> artifact.Artifact:
    """Write a model in one format to `out`; it is read back and compared before it gets this name."""
    writers: dict[str, Callable[[ModelSource, artifact.Draft], None]] = {
        "hf": _to_hf,
        "pth": _to_pth,
        "gguf": lambda source, draft: _to_gguf(source, draft, quantize or "f16"),
    }
    if to == "gguf":
        config = _check_gguf(source.name, source.config, quantize, source.name)
        _name_what_stays(source)
        if notice := gguf_metadata.describe_rounding(config):
            console.notice(notice)
        source = replace(source, tensors=gguf_layout.for_llama_cpp(source.tensors, config), config=config)
        gguf.check_tensors(source.tensors, source.config)
    console.header(f"convert → {to}", source.name)
    parents = {"source": {"path": source.name, "fingerprint": _fingerprint(source)}}
    with artifact.create(out, "model" if to == "hf" else to, parents, settings, remove_on_error=True) as draft:
        writers[to](source, draft)
        draft.record_files(lambda file: file.suffix != ".safetensors")
    assert draft.artifact
    return draft.artifact


def report_written(out: Path) -> None:
    console.success(_("written and verified: {out}").format(out=out))


def _name_what_stays(source: ModelSource) -> None:
    """Print which tensors a GGUF file does not get, and the command by which llama.cpp's own converter writes them."""
    left = source.tensors.facts.keys() - set(gguf_layout.text_names(source.tensors.facts).values())
    ahead = {name for name in left if gguf_layout.AHEAD.search(name)}
    if left - ahead:
        console.notice(
            ngettext(
                "{count} tensor is not of the text part: llama.cpp reads it from another file, which its own converter"
                " writes: {command}",
                "{count} tensors are not of the text part: llama.cpp reads them from another file, which its own"
                " converter writes: {command}",
                len(left - ahead),
            ).format(count=len(left - ahead), command=gguf_metadata.converter_command(source.name, "--mmproj"))
        )
    if ahead:
        console.notice(
            ngettext(
                "{count} tensor for multi-token prediction is left out: answers are the same without it",
                "{count} tensors for multi-token prediction are left out: answers are the same without them",
                len(ahead),
            ).format(count=len(ahead))
        )


def _to_hf(source: ModelSource, draft: artifact.Draft) -> None:
    with console.progress(len(source.tensors.facts), "hf") as bar:
        stored = hf.write(source.tensors, draft.path, SHARD_BYTES, bar.update)
    (draft.path / "config.json").write_text(
        json.dumps(source.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    hf.check_same(source.tensors, FileTensors(stored), str(draft.path))
    if source.place and source.place.gguf:
        load_tokenizer(source.place).save_pretrained(str(draft.path))
    elif source.place and read_model_type(source.place) == "baichuan":
        _save_llama_tokenizer(source, draft.path)
    elif source.place:
        chat_setup.copy_chat_setup(source.folder, draft.path)
    elif (model := _sentencepiece(source)) is not None:
        shutil.copyfile(model, draft.path / "tokenizer.model")
        artifact.write_json(draft.path / "tokenizer_config.json", SENTENCEPIECE)
    if (made := artifact.find(source.folder)) is not None:
        (draft.path / "README.md").write_text(make_card(source.title, made), encoding="utf-8")
        artifact.write_json(draft.path / "bom.json", make_bill_of_materials(source.title, made))
    lines = tensor_digests(ModelRef(str(draft.path), str(draft.path)))
    draft.fingerprint, draft.facts["tensors"] = combine(lines), lines


def _save_llama_tokenizer(source: ModelSource, out: Path) -> None:
    """Save Baichuan's tokenizer as the LLaMA tokenizer that it is: its own settings name remote code, but also whether
    `<s>` begins a text."""
    from transformers import PreTrainedTokenizerFast

    model, file = sentencepiece.read_model(source.folder / "tokenizer.model"), source.folder / "tokenizer_config.json"
    settings = artifact.read_json(file) if file.is_file() else {}
    backend = sentencepiece.fast_form(model)
    if not settings.get("add_bos_token", True):
        backend.post_processor = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **sentencepiece.special_names(model))
    tokenizer.save_pretrained(str(out))


def _to_pth(source: ModelSource, draft: artifact.Draft) -> None:
    with console.progress(len(source.tensors.facts), "pth") as bar:
        pth.write(source.tensors, source.config, draft.path, bar.update)
    back = pth.PthTensors([TorchTensors(load_bin(file)) for file in pth.find_files(draft.path)], draft.path)
    hf.check_same(pth.UntiedTensors(source.tensors), back, str(draft.path))
    if (model := _sentencepiece(source)) is not None:
        shutil.copyfile(model, draft.path / "tokenizer.model")


def _to_gguf(source: ModelSource, draft: artifact.Draft, kind: str) -> None:
    """Write the GGUF file, and a Modelfile with the chat template for Ollama."""
    rows = gguf.vocabulary_rows(source.tensors, source.config)
    with tempfile.TemporaryDirectory() as made:
        tokenizer = _fast_tokenizer(source, Path(made))
        vocabulary = read_vocabulary(tokenizer, rows) if tokenizer else None
        template_files = _own_template(tokenizer) if tokenizer else None
    file = draft.path / f"{source.title}-{kind}.gguf"
    with console.progress(len(source.tensors.facts), "gguf") as bar:
        template = template_files.source if template_files else None
        gguf.write(source.tensors, source.config, vocabulary, template, file, kind, bar.update)
    gguf.check(source.tensors, source.config, vocabulary, file, kind)
    draft.facts["type"] = kind
    if vocabulary is None:
        console.notice(_("no tokenizer: llama.cpp cannot process text with this file"))
        return
    if vocabulary.unsupported:
        named = ", ".join(vocabulary.unsupported[:3])
        console.notice(
            _("llama.cpp keeps spaces after {named}, but the tokenizer drops them: write none there").format(
                named=named
            )
        )
    begin = vocabulary.tokens[vocabulary.special["bos"]] if vocabulary.add_bos else ""
    render = template_files.render_pairs if template_files else None
    stops = sorted({template_files.stop} if template_files else set())
    (draft.path / "Modelfile").write_text(make_modelfile(file.name, render, stops, begin), encoding="utf-8")


def _fast_tokenizer(source: ModelSource, made: Path) -> Path | None:
    """Return a folder with `tokenizer.json`: the source's own, or `made` after conversion; None without one."""
    if source.place and not source.place.gguf and (source.folder / "tokenizer.json").is_file():
        return source.folder
    if source.place is None:
        if (model := _sentencepiece(source)) is None:
            return None
        shutil.copyfile(model, made / "tokenizer.model")
        artifact.write_json(made / "tokenizer_config.json", SENTENCEPIECE)
        artifact.write_json(made / "config.json", {"model_type": "llama"})
        place = ModelRef(str(made), str(made))
    elif not source.place.gguf and not chat_setup.has_tokenizer(source.folder):
        return None
    else:
        place = source.place
    load_tokenizer(place).save_pretrained(str(made))
    return made


def _own_template(folder: Path) -> ChatTemplateFiles | None:
    """Return the model's own chat template with its stop token; None if it has none."""
    tokenizer = load_tokenizer(ModelRef(str(folder), str(folder)))
    if not tokenizer.chat_template:
        return None
    prefix = list(tokenizer("").input_ids)
    template = chat_setup.bind_template("own", tokenizer, prefix)
    return ChatTemplateFiles(template.source, template)


@dataclass(frozen=True)
class ChatTemplateFiles:
    """A chat template and its source text."""

    source: str
    template: Template

    @property
    def stop(self) -> str:
        return self.template.stop

    def render_pairs(self, turns: Sequence[tuple[str, str]]) -> str:
        return self.template.prompt([Message(role, text) for role, text in turns])


def _sentencepiece(source: ModelSource) -> Path | None:
    """Return the source's `tokenizer.model`, which LLaMA's download has one folder up; None if missing."""
    for file in (source.folder / "tokenizer.model", source.folder.parent / "tokenizer.model"):
        if file.is_file():
            return file
    console.notice(_("no tokenizer.model next to the model: none is written"))
    return None


def _fingerprint(source: ModelSource) -> str:
    if source.place is not None:
        return combine(tensor_digests(source.place))
    return artifact.fingerprint_hashes({f.name: artifact.hash_file(f) for f in pth.find_files(source.folder)})
