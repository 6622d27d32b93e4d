"""tongwen (同文): teach a language model Chinese. One command, one recipe file, and nothing fails in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tongwen.api import CheckResult, LoadedData, RunResult, check, load_data, merge, run
    from tongwen.workflows.chat_model import ChatModel

__all__ = ["CheckResult", "LoadedData", "RunResult", "check", "load_data", "merge", "open", "run"]


def __getattr__(name: str) -> object:
    """Import `tongwen.api` when one of its names is asked for: the command line needs none of them."""
    if name in __all__:
        from tongwen import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open(model: str, adapters: tuple[str, ...] | list[str] = (), **options: object) -> ChatModel:
    """Open a model for chat and generation: a folder, a hub id, `modelscope:id`, a `.gguf` file, or a stage folder.

    The returned object has `.chat(messages)` -> str, `.stream(messages)` -> iterator of str, and
    `.generate(prompts)` -> list of str. Options are those of `tongwen.workflows.chat_model.open_chat_model`.

    Raises ModelError when the folder holds no model, ArtifactError when an adapter was trained on another base.
    """
    from tongwen.workflows.chat_model import open_chat_model

    return open_chat_model(model, adapters=list(adapters), **options)  # type: ignore[arg-type]
