"""A model from one form to another: a Hugging Face folder, LLaMA's own `.pth` files, GGUF. What `convert` and `export` share.

The source is opened as tensors whatever its form, written a few rows at a time, and the result is read back and compared
with the source before it gets its name.
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
from tongwen.core.i18n import _
from tongwen.core.records import Message
from tongwen.core.safetensors_io import SHARD_BYTES, Tensors
from tongwen.export import gguf, gguf_layout, gguf_metadata, hf, pth
from tongwen.export.card import make_card
from tongwen.export.gguf_vocab import read_vocabulary
from tongwen.export.ollama import make_modelfile
from tongwen.model.loading import chat_setup, load, sentencepiece
from tongwen.model.loading.fingerprint import combine, model_lines
from tongwen.model.loading.tensors import FileTensors, TorchTensors, load_bin, open_model

FORMATS = ("hf", "pth", "gguf")
SENTENCEPIECE = {  # what LLaMA's own tokenizer is to transformers: the file alone does not say
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
    """A model to convert. title: what files are named after it; folder: where its tokenizer is; place: None for LLaMA's
    own files."""

    name: str
    title: str
    tensors: Tensors
    config: dict[str, Any]
    folder: Path
    place: load.ModelRef | None


def open_source(name: str) -> ModelSource:
    """Open a model in any form. Raises ModelError or ArtifactError when it is not whole or is an adapter."""
    folder = Path(name)
    if folder.is_dir() and (files := pth.find_files(folder)):
        original = pth.PthTensors([TorchTensors(load_bin(file)) for file in files], folder)
        console.notice(
            _(".pth files do not record the context length: using {max_position_embeddings}").format(
                max_position_embeddings=original.config["max_position_embeddings"]
            )
        )
        return ModelSource(name, folder.resolve().name, original, original.config, folder, None)
    place = load.locate(name)
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


def check_ahead(base: str, formats: Sequence[str], quantize: str) -> None:
    """Raise before anything is trained what would refuse its result afterwards: a family, its config or its tokenizer, a
    number type."""
    if "gguf" not in formats:
        return
    place = load.locate(base)
    _check_gguf(base, load.load_config(place).to_dict(), quantize)
    tokenizer = load.load_tokenizer(place)
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        read_vocabulary(Path(made), 1 + max(tokenizer.get_vocab().values()))


def _check_gguf(name: str, config: Mapping[str, Any], quantize: str) -> dict[str, Any]:
    """The config in LLaMA's words. Raises ModelError or MissingPackage when its model or type cannot be written."""
    gguf.check_type(quantize or "f16")
    with load.explain_errors(load.ModelRef(name, name)):
        whole = gguf_layout.with_llama_keys(config)
    gguf_metadata.check_config(whole)
    return whole


def convert(source: ModelSource, to: str, out: Path, quantize: str, settings: Mapping[str, Any]) -> artifact.Artifact:
    """One form of a model at `out`, read back and compared before it stands there."""
    writers: dict[str, Callable[[ModelSource, artifact.Draft], None]] = {
        "hf": _to_hf,
        "pth": _to_pth,
        "gguf": lambda source, draft: _to_gguf(source, draft, quantize or "f16"),
    }
    if to == "gguf":
        config = _check_gguf(source.name, source.config, quantize)
        source = replace(source, tensors=gguf_layout.for_llama_cpp(source.tensors, config), config=config)
        gguf.check_tensors(source.tensors, source.config)
    console.header(f"convert → {to}", source.name)
    parents = {"source": {"path": source.name, "fingerprint": _fingerprint(source)}}
    with artifact.create(out, "model" if to == "hf" else to, parents, settings, swept=True) as draft:
        writers[to](source, draft)
        draft.record_files(lambda file: file.suffix != ".safetensors")
    assert draft.artifact
    console.good(_("written and verified: {out}").format(out=out))
    return draft.artifact


def _to_hf(source: ModelSource, draft: artifact.Draft) -> None:
    with console.progress(len(source.tensors.facts), "hf") as bar:
        stored = hf.write(source.tensors, draft.path, SHARD_BYTES, bar.update)
    (draft.path / "config.json").write_text(
        json.dumps(source.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    hf.check_same(source.tensors, FileTensors(stored), str(draft.path))
    if source.place and source.place.gguf:
        load.load_tokenizer(source.place).save_pretrained(str(draft.path))
    elif source.place and load.read_model_type(source.place) == "baichuan":
        _speak_as_llama(source, draft.path)
    elif source.place:
        chat_setup.copy_chat_setup(source.folder, draft.path)
    elif (model := _sentencepiece(source)) is not None:
        shutil.copyfile(model, draft.path / "tokenizer.model")
        artifact.write_json(draft.path / "tokenizer_config.json", SENTENCEPIECE)
    if (made := artifact.find(source.folder)) is not None:
        (draft.path / "README.md").write_text(make_card(source.title, made), encoding="utf-8")
    lines = model_lines(load.ModelRef(str(draft.path), str(draft.path)))
    draft.fingerprint, draft.facts["tensors"] = combine(lines), lines


def _speak_as_llama(source: ModelSource, out: Path) -> None:
    """Baichuan's tokenizer is of LLaMA's kind; the settings beside it name code to run, and say whether `<s>` begins a
    text."""
    from transformers import PreTrainedTokenizerFast

    model, file = sentencepiece.read_model(source.folder / "tokenizer.model"), source.folder / "tokenizer_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    backend = sentencepiece.fast_form(model)
    if not said.get("add_bos_token", True):
        backend.post_processor = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **sentencepiece.special_names(model))
    tokenizer.save_pretrained(str(out))


def _to_pth(source: ModelSource, draft: artifact.Draft) -> None:
    with console.progress(len(source.tensors.facts), "pth") as bar:
        pth.write(source.tensors, source.config, draft.path, bar.update)
    back = pth.PthTensors([TorchTensors(load_bin(file)) for file in pth.find_files(draft.path)], draft.path)
    hf.check_same(pth.with_head(source.tensors), back, str(draft.path))
    if (model := _sentencepiece(source)) is not None:
        shutil.copyfile(model, draft.path / "tokenizer.model")


def _to_gguf(source: ModelSource, draft: artifact.Draft, kind: str) -> None:
    """The file, and a Modelfile that says how to talk to it."""
    rows = gguf.vocabulary_rows(source.tensors, source.config)
    with tempfile.TemporaryDirectory() as made:
        tokenizer = _fast_tokenizer(source, Path(made))
        vocabulary = read_vocabulary(tokenizer, rows) if tokenizer else None
        spoken = _spoken(tokenizer) if tokenizer else None
    file = draft.path / f"{source.title}-{kind}.gguf"
    with console.progress(len(source.tensors.facts), "gguf") as bar:
        template = spoken.source if spoken else None
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
    render = spoken.render_pairs if spoken else None
    stops = sorted({spoken.stop} if spoken else set())
    (draft.path / "Modelfile").write_text(make_modelfile(file.name, render, stops, begin), encoding="utf-8")


def _fast_tokenizer(source: ModelSource, made: Path) -> Path | None:
    """A folder with `tokenizer.json`: the source's own, or one made of what it has; None when it has no tokenizer."""
    if source.place and not source.place.gguf and (source.folder / "tokenizer.json").is_file():
        return source.folder
    if source.place is None:
        if (model := _sentencepiece(source)) is None:
            return None
        shutil.copyfile(model, made / "tokenizer.model")
        artifact.write_json(made / "tokenizer_config.json", SENTENCEPIECE)
        artifact.write_json(made / "config.json", {"model_type": "llama"})
        place = load.ModelRef(str(made), str(made))
    elif not source.place.gguf and not chat_setup.has_tokenizer(source.folder):
        return None
    else:
        place = source.place
    load.load_tokenizer(place).save_pretrained(str(made))
    return made


def _spoken(folder: Path) -> ChatTemplateFiles | None:
    """The model's own template with its stop; None when it has none."""
    tokenizer = load.load_tokenizer(load.ModelRef(str(folder), str(folder)))
    if not tokenizer.chat_template:
        return None
    prefix = list(tokenizer("").input_ids)
    template = chat_setup.bind_template("own", tokenizer, prefix)
    return ChatTemplateFiles(template.source, template)


@dataclass(frozen=True)
class ChatTemplateFiles:
    """A template, its text, and how it writes a conversation."""

    source: str
    template: Template

    @property
    def stop(self) -> str:
        return self.template.stop

    def render_pairs(self, turns: Sequence[tuple[str, str]]) -> str:
        return self.template.prompt([Message(role, text) for role, text in turns])


def _sentencepiece(source: ModelSource) -> Path | None:
    """The `tokenizer.model` of the source; LLaMA's download has it one folder up. Said when there is none."""
    for file in (source.folder / "tokenizer.model", source.folder.parent / "tokenizer.model"):
        if file.is_file():
            return file
    console.notice(_("no tokenizer.model next to the model: none is written"))
    return None


def _fingerprint(source: ModelSource) -> str:
    if source.place is not None:
        return combine(model_lines(source.place))
    return artifact.fingerprint_hashes({f.name: artifact.hash_file(f) for f in pth.find_files(source.folder)})
