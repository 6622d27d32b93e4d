"""llama.cpp's K types: choose the type of each tensor, and quantise rows by an installed llama.cpp library.

`q4_k_m` and similar names are mixtures of types. The choice follows `llama_tensor_get_type` in llama.cpp's
llama-quant.cpp, for dense models without an importance matrix. `ggml_quantize_chunk` quantises; several wheels have it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tongwen.core.errors import MissingPackage
from tongwen.core.i18n import _

KINDS = {  # mixture -> the type of most tensors
    "q2_k": "Q2_K",
    **{f"q3_k_{size}": "Q3_K" for size in "sml"},
    **{f"q4_k_{size}": "Q4_K" for size in "sm"},
    **{f"q5_k_{size}": "Q5_K" for size in "sm"},
    "q6_k": "Q6_K",
}
NARROWER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""type for rows whose length is a multiple of 32 but not of 256"""
FUNCTION = "ggml_quantize_chunk"


@dataclass(frozen=True)
class QuantizationMix:
    """A mixture for one model. groups: query heads per key head; tied: whether the embedding is also the head."""

    kind: str
    layers: int
    groups: int
    tied: bool

    def type_of(self, name: str, columns: int) -> str:
        """Return the type of a matrix with llama.cpp's name; F16 if no block fits its rows."""
        chosen = self._wanted(name)
        if columns % 256:
            head = name == "output.weight" or (self.tied and name == "token_embd.weight")
            chosen = "Q8_0" if head else NARROWER[chosen]
        return chosen if columns % 32 == 0 else "F16"

    def _wanted(self, name: str) -> str:
        usual = KINDS[self.kind]
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return "Q6_K"
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if not found:
            return usual
        layer, role = int(found[1]), found[2]
        if role == "attn_v":
            return self._values(layer) or usual
        if role == "ffn_down":
            return self._down(layer) or usual
        if role == "attn_output":
            return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(self.kind, usual)
        if role == "attn_qkv":
            fused = {"q3_k_m": "Q4_K", "q3_k_l": "Q4_K", "q4_k_m": "Q5_K", "q5_k_m": "Q6_K"}
            return fused.get(self.kind, usual)
        return usual

    def _values(self, layer: int) -> str | None:
        if self.kind == "q2_k":
            return "Q4_K" if self.groups >= 4 else "Q3_K"
        if self.kind == "q3_k_m":
            return "Q5_K" if layer < 2 else "Q4_K"
        if self.kind == "q3_k_l":
            return "Q5_K"
        if self.kind in ("q4_k_m", "q5_k_m") and self._needs_more(layer):
            return "Q6_K"
        if self.kind == "q4_k_s" and layer < 4:
            return "Q5_K"
        return None

    def _down(self, layer: int) -> str | None:
        if self.kind == "q2_k":
            return "Q3_K"
        if self.kind == "q3_k_m":
            return "Q5_K" if layer < self.layers // 16 else "Q4_K"
        if self.kind == "q3_k_l":
            return "Q5_K"
        if self.kind in ("q4_k_m", "q5_k_m") and self._needs_more(layer):
            return "Q6_K"
        if self.kind == "q4_k_s" and layer < self.layers // 8:
            return "Q5_K"
        return None

    def _needs_more(self, layer: int) -> bool:
        """Whether a layer is in the first or the last eighth, or every third between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


def quantise(rows: Any, stored: str) -> Any:
    """Quantise fp32 rows to a K type: (n, columns) -> bytes (n, bytes per row)."""
    import gguf

    kind = gguf.GGMLQuantizationType[stored]
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty((len(rows), row_bytes(rows.shape[1], stored)), np.uint8)
    written = _function()(
        int(kind), rows.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), 0, *rows.shape, None
    )
    assert written == out.nbytes
    return out


def row_bytes(columns: int, stored: str) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[stored]]
    return int(columns // block * size)


def check_library() -> None:
    """Raise MissingPackage without an installed llama.cpp library that can quantise to the K types."""
    _function()


@cache
def _function() -> Any:
    for file in _libraries():
        try:
            function = getattr(ctypes.CDLL(str(file)), FUNCTION)
        except (OSError, AttributeError):  # built for another system, or without this function
            continue
        function.restype = ctypes.c_size_t
        function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        return function
    raise MissingPackage("xllamacpp", _("the K types of GGUF"), "llamacpp")


def _libraries() -> Iterator[Path | str]:
    """Yield shared libraries that may contain ggml: from the wheels xllamacpp and llama-cpp-python, or the system."""
    for package, pattern in (("xllamacpp", "*.so"), ("xllamacpp", "*.pyd"), ("llama_cpp", "lib/*ggml-base*")):
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(folder).glob(pattern))
    for name in ("ggml-base", "ggml", "llama"):
        if found := ctypes.util.find_library(name):
            yield found
