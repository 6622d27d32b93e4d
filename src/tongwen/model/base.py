"""The model that a merge or a growth starts from: its files on this machine, its tensors by name, its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tongwen import console
from tongwen.errors import ModelError
from tongwen.language import say
from tongwen.model import load
from tongwen.model.fingerprint import cached_folder
from tongwen.model.tensors import Tensors, TorchTensors, open_tensors


def fetched(place: load.Place) -> load.Place:
    """The files of a hub model in the local cache; fetched when they are not there."""
    if place.local or place.gguf:
        return place
    folder = cached_folder(place.folder)
    if folder is None or not any(next(folder.glob(pattern), None) for pattern in load.WEIGHTS):
        from huggingface_hub import snapshot_download

        with load.explained(place):
            folder = Path(snapshot_download(place.folder))
    return load.Place(place.name, str(folder))


def open_base(place: load.Place) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the config. A base that is neither safetensors nor `.bin` is opened in memory, and it is said."""
    folder = Path(place.folder)
    if place.gguf:
        import torch

        console.notice(
            say("the GGUF base is de-quantised, with the whole model in memory", "GGUF 底座将反量化，整个模型载入内存")
        )
        model = load.load_model(place, torch.float32)
        state = dict(model.state_dict())
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        return TorchTensors(state), dict(model.config.to_dict())
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(say(f"not JSON: {error}", f"不是 JSON：{error}"), place=str(folder / "config.json")) from None
    if config.get("quantization_config"):
        raise ModelError(
            say("this base is quantised", "该底座是量化过的"),
            place=place.name,
            remedy=say(
                "use the original model that it was made from: an adapter fits both",
                "请使用量化前的原始模型：适配器两者都适用",
            ),
        )
    return open_tensors(folder, "pytorch_model*.bin"), config
