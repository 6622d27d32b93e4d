"""Errors of the libraries that load a model, as one error with a place and a remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tongwen.core.errors import (
    MachineError,
    MissingPackage,
    ModelError,
    first_line,
    is_disk_error,
    is_disk_full,
    is_out_of_memory,
)
from tongwen.core.i18n import _
from tongwen.model.loading.config_json import read_model_type
from tongwen.model.loading.model_ref import ModelRef


class explain_errors:  # noqa: N801
    """Turn any exception of a loader into one error with a place and a remedy."""

    def __init__(self, ref: ModelRef) -> None:
        self.ref = ref

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        is_panic = type(error).__name__ == "PanicException"  # of Rust code, which derives it from BaseException
        if error is None or not (isinstance(error, Exception) or is_panic):
            return
        if isinstance(error, (ModelError, MachineError)):
            return
        if is_out_of_memory(error) or is_disk_full(error) or is_disk_error(error):  # the command reports the remedy
            return
        text = str(error)
        reason = first_line(error)
        if reason.rstrip().endswith(":"):  # a list follows
            reason = " ".join(text.split())
        if isinstance(error, ImportError) and "gguf" in text.lower():
            raise MissingPackage("gguf", _("reading GGUF files"), "gguf") from None
        if isinstance(error, ImportError) and (wanted := re.search(r"pip install ([\w-]+)", text)):
            raise MachineError(
                _("transformers needs the package {package!r} for this model").format(package=wanted[1]),
                place=self.ref.name,
                remedy=f"pip install {wanted[1]}",
            ) from None
        if not self.ref.is_local and isinstance(error, (OSError, ConnectionError, TimeoutError)):
            raise MachineError(
                _("cannot get this model from the hub: {reason}").format(reason=reason[:160]),
                place=self.ref.name,
                remedy=_("export HF_ENDPOINT=https://hf-mirror.com   or write   base: modelscope:{place}").format(
                    place=self.ref.name
                ),
            ) from None
        if "trust_remote_code" in text:
            raise ModelError(
                _("this model needs its own code, which tongwen never runs"),
                place=self.ref.name,
                remedy=self._without_its_code(),
            ) from None
        raise ModelError(
            _("the model cannot be loaded: {reason}").format(reason=reason[:300]),
            place=self.ref.name,
            remedy=_("check that the files are complete"),
        ) from error

    def _without_its_code(self) -> str:
        if read_model_type(self.ref) == "baichuan":
            return f"tongwen convert {self.ref.name} --to hf --out {Path(self.ref.folder).name}-llama"
        return _("use a version that transformers supports natively")
