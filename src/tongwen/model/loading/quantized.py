"""A base as quantised training saw it: each matrix is quantised to nf4 or int8 and back, one in memory at a time.

QLoRA trains an adapter beside the quantised weights, not beside the original ones. Merging into the original base is
usual and gives the more precise model; merging into the quantised weights matches the training. `distance` measures
how much the two differ.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tongwen.core.errors import MissingPackage
from tongwen.core.i18n import _
from tongwen.core.safetensors_io import TensorSource, blocks, row_bytes, row_count
from tongwen.model.loading.architecture import build_on_meta, load_config
from tongwen.model.loading.model_ref import ModelRef
from tongwen.model.loading.tensors import Array, from_fp32, read_fp32

KINDS = ("nf4", "int8")


class QuantizedTensors:
    """Tensors (see `core.safetensors_io.TensorSource`) of a base, whose layer matrices are quantised and de-quantised."""

    def __init__(self, base: TensorSource, ref: ModelRef, kind: str) -> None:
        try:
            import bitsandbytes
        except ImportError:
            raise MissingPackage("bitsandbytes", _("a quantised base"), "qlora") from None
        self.base, self.kind, self.bitsandbytes = base, kind, bitsandbytes
        self.facts = base.facts
        self.matrices = matrices_of(ref) & base.facts.keys()
        self._last = threading.local()

    def raw(self, name: str, begin: int, end: int) -> Array:
        if name not in self.matrices:
            return self.base.raw(name, begin, end)
        if getattr(self._last, "name", "") != name:
            self._last.name, self._last.bytes = name, from_fp32(self._round_trip(name), self.facts[name][0])
        width = row_bytes(*self.facts[name])
        return self._last.bytes.reshape(-1).view(np.uint8)[begin * width : end * width]

    def _round_trip(self, name: str) -> Array:
        """Return a weight after quantisation and de-quantisation: (out, in) fp32."""
        import torch

        shape = self.facts[name][1]
        weight = torch.from_numpy(read_fp32(self.base, name, 0, row_count(shape)).reshape(shape))
        parts, functional = self.bitsandbytes.nn, self.bitsandbytes.functional
        if self.kind == "int8":
            held = parts.Int8Params(weight.half(), requires_grad=False).to("cpu")
            return functional.int8_vectorwise_dequant(held.CB, held.SCB).float().numpy()
        held = parts.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
        return functional.dequantize_4bit(held.data, held.quant_state).float().numpy().reshape(shape)


def matrices_of(ref: ModelRef) -> set[str]:
    """Return the names of the weights that transformers quantises: all linear layers but the head."""
    import torch

    model = build_on_meta(load_config(ref))
    head = model.get_output_embeddings()
    linear = (torch.nn.Linear,)
    return {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, linear) and part is not head}


def distance(base: TensorSource, quantised: QuantizedTensors) -> float:
    """Return the relative error of the quantised matrices: RMS of the difference over RMS of the originals."""
    apart, whole = 0.0, 0.0
    for name in sorted(quantised.matrices):
        for begin, end in blocks(base.facts[name][1]):
            exact = read_fp32(base, name, begin, end)
            apart += float(np.square(read_fp32(quantised, name, begin, end) - exact).sum(dtype=np.float64))
            whole += float(np.square(exact).sum(dtype=np.float64))
    return float(np.sqrt(apart / whole)) if whole else 0.0


def kind_of(settings: dict[str, Any]) -> str:
    """Return nf4 or int8 if a training stage's recorded settings say that its base was quantised, else ""."""
    for section in settings.values():
        adapter = section.get("adapter") if isinstance(section, dict) else None
        if isinstance(adapter, dict) and adapter.get("method") == "qlora":
            return str(adapter["quantize"])
    return ""


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import bitsandbytes in this block without compiling its CPU functions.

    peft imports bitsandbytes wherever it is installed, which passes its CPU functions to `torch.compile` at once: a
    sixth of the import time of a command with an adapter. They stay uncompiled for the rest of the process, so use this
    only where they are not called.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before
