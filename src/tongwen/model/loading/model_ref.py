"""Where a model is: its folder or hub id, its `.gguf` file, and the adapters on top of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelRef:
    """Where a model is: the argument for `from_pretrained`, and the adapters on top of it, from bottom to top."""

    name: str  # as the user wrote it
    folder: str  # folder or hub id
    gguf: str | None = None
    adapters: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        return Path(self.folder).is_dir()


def gguf_option(ref: ModelRef) -> dict[str, str]:
    return {"gguf_file": ref.gguf} if ref.gguf else {}
