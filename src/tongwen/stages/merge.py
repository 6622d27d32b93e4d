"""merge: a base and an adapter that was trained on it in; an ordinary Hugging Face model folder out.

The base's tensors must have the fingerprint that the adapter recorded when it was trained. They stream through shard by
shard; tokenizer, template and stop tokens come from the adapter's folder, because the model learned with those.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from tongwen import artifact, console
from tongwen.errors import ArtifactError, RecipeError
from tongwen.language import say
from tongwen.model import load
from tongwen.model.fingerprint import cached_folder, fingerprint_model
from tongwen.model.fold import fold, read_changes
from tongwen.recipe.schema import Recipe
from tongwen.river import standing_on

DTYPES = {"base": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FROM_ADAPTER = (
    "tokenizer*",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab*",
    "merges.txt",
)


def settings(recipe: Recipe) -> dict[str, Any]:
    assert recipe.merge
    return {"merge": recipe.merge.model_dump(mode="json"), "base": recipe.base}


def run(recipe: Recipe, out: Path) -> artifact.Artifact:
    """Fold the adapter of the run's last training stage into what it stands on."""
    assert recipe.merge
    last = Path(standing_on(recipe, "merge"))
    trained = artifact.open_artifact(last, last.name)
    base = trained.manifest["parents"]["base"]["path"]
    return merge(base, trained.path, out, recipe.merge.dtype, settings(recipe))


def merge(
    base: str, adapter: Path, out: Path, dtype: str, settings: dict[str, Any], *, force: bool = False
) -> artifact.Artifact:
    """Fold one adapter. Raises ArtifactError when it was trained on another base (`force` goes on, and is recorded)."""
    place = _local(load.locate(base))
    console.header("merge", f"{base} + {adapter}")
    fingerprint = fingerprint_model(place)
    trained = artifact.find(adapter)
    made_on = trained.manifest["parents"].get("base", {}) if trained else {}
    recorded = made_on.get("fingerprint")
    if recorded and recorded != fingerprint and not force:
        raise ArtifactError(
            say(
                f"the adapter was trained on a base with fingerprint {recorded[:12]}, this base has {str(fingerprint)[:12]}",
                f"适配器训练时的底座指纹为 {recorded[:12]}，当前底座为 {str(fingerprint)[:12]}",
            ),
            place=str(adapter),
            remedy=say(
                f"merge onto {made_on['path']}",
                f"请合并到 {made_on['path']}",
            ),
        )
    if not recorded:
        console.notice(
            say(
                "this adapter does not say which base it was trained on; shapes and names are all that is checked",
                "该适配器没有记录底座；只能检查形状与名称",
            )
        )
    total = len(read_changes(adapter))
    parents = {
        "base": {"path": base, "fingerprint": fingerprint},
        "adapter": trained.as_parent()
        if trained
        else {"path": str(adapter), "fingerprint": artifact.fingerprint_files(adapter)},
    }
    with artifact.create(out, "model", parents, settings) as draft:
        with console.progress(total, "merge") as bar:
            counts = fold(place, adapter, draft.path, DTYPES[dtype], lambda done: bar.update(min(done, total)))
        for pattern in FROM_ADAPTER:
            for file in adapter.glob(pattern):
                shutil.copyfile(file, draft.path / file.name)
        if not (draft.path / "tokenizer_config.json").is_file():
            _tokenizer_of_base(place, draft.path)
        draft.fingerprint = fingerprint_model(load.Place(str(draft.path), str(draft.path))) or ""
        if draft.fingerprint == fingerprint:
            raise ArtifactError(say("the merged model equals the base", "合并结果与底座相同"), place=str(adapter))
        draft.facts = {"counts": counts, "forced": force and recorded != fingerprint}
        if trained:
            draft.facts["template_name"] = trained.manifest.get("template_name")
    assert draft.artifact
    console.good(
        say(
            f"{counts['changed']} of {counts['tensors']} tensors changed · {out}",
            f"改变了 {counts['tensors']} 个张量中的 {counts['changed']} 个 · {out}",
        )
    )
    return draft.artifact


def _local(place: load.Place) -> load.Place:
    """The files of a hub model in the local cache; fetched when they are not there."""
    if place.local or place.gguf:
        return place
    folder = cached_folder(place.folder)
    if folder is None or not next(folder.glob("*.safetensors"), None):
        from huggingface_hub import snapshot_download

        with load.explained(place):
            folder = Path(snapshot_download(place.folder))
    return load.Place(place.name, str(folder))


def _tokenizer_of_base(place: load.Place, out: Path) -> None:
    console.notice(say("the adapter brings no tokenizer; the base's is used", "适配器没有分词器，使用底座的"))
    load.load_tokenizer(place).save_pretrained(str(out))


def command(base: str, adapters: list[str], out: str, dtype: str, *, again: bool, force: bool) -> int:
    """`tongwen merge`: refuses to write where something stands, unless told to keep that under another name."""
    if len(adapters) > 1:
        raise RecipeError(
            say("one adapter at a time can be merged", "一次只能合并一个适配器"),
            place="--adapter",
            remedy=say("merge them one after the other", "请依次合并"),
        )
    target = Path(out)
    if target.exists():
        if not again:
            raise RecipeError(
                say("this folder exists", "该文件夹已存在"),
                place=out,
                remedy=say(
                    "choose another, or --again to keep it under another name", "换一个，或用 --again 把它改名保留"
                ),
            )
        artifact.put_aside(target)
    chosen = {"base": base, "adapter": adapters[0], "dtype": dtype}
    made = merge(base, Path(adapters[0]), target, dtype, chosen, force=force)
    console.emit({"out": out, **made.manifest})
    return 0
