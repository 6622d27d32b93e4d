"""Load a model's weights, quantised on request.

A fault that transformers accepts silently is an error here: missing weights, which would be random. No remote code runs;
pickles are read with `weights_only=True` only.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tongwen.core.errors import MachineError, MissingPackage, ModelError
from tongwen.core.i18n import _
from tongwen.model.loading import limits
from tongwen.model.loading.architecture import auto_class, build_on_meta, find_head, load_config
from tongwen.model.loading.loader_errors import explain_errors
from tongwen.model.loading.locate import WEIGHTS
from tongwen.model.loading.model_ref import ModelRef, gguf_option
from tongwen.model.loading.quiet import quiet

if TYPE_CHECKING:
    import torch


def load_model(ref: ModelRef, dtype: torch.dtype, quantize: str = "", device_map: str | None = None) -> Any:
    """Load the model in the given dtype, as the class that its files were saved from (see `auto_class`), with its
    matrices quantised to nf4 or int8 on request.

    Adapters are not loaded (see `open_adapter_chain`). Raises ModelError when a weight is missing and would be random.
    """
    from tongwen.model.loading import special_tokens

    kwargs: dict[str, Any] = {"quantization_config": _quantization(quantize, dtype)} if quantize else {}
    config = load_config(ref)
    if ref.is_local and not ref.gguf:
        with explain_errors(ref):
            _check_size(config, ref)
    with explain_errors(ref):  # not every config has a vocabulary: a robot's actions need none
        rows = config.get_text_config().vocab_size
    if special_tokens.drop_invalid_ids(config, rows, f"{ref.name}/config.json"):
        kwargs["config"] = config
    with quiet(), explain_errors(ref):
        model, info = auto_class(config).from_pretrained(
            ref.folder,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            device_map=device_map,
            **kwargs,
            **gguf_option(ref),
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelError(
            _("the files lack {count} weights, which would be random; the first: {missing}").format(
                count=len(missing), missing=missing[0]
            ),
            place=ref.name,
            remedy=_("download the whole model again"),
        )
    find_head(model)
    if quantize:
        _prepare_quantised(model)
    if ref.gguf:  # it has been de-quantised: treat it as an ordinary model
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model


def _check_size(config: Any, ref: ModelRef) -> None:
    """Raise ModelError when the config describes a much larger model than the files hold."""
    folder = Path(ref.folder)
    files = (file for pattern in WEIGHTS for file in folder.glob(pattern))
    limits.check_size(build_on_meta(config), files, str(folder / "config.json"))


def load_generation_config(folder: str) -> Any:
    """Return a model folder's generation config; None without the file."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder) if (Path(folder) / "generation_config.json").is_file() else None


def _prepare_quantised(model: Any) -> None:
    """Make a quantised model trainable, and release the file that it was loaded from."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes repacks such weights at the first forward in eval mode and never unpacks them. Gradients do
            # not pass through repacked weights.
            module.support_avx512bf16_for_cpu = False
    for part in model.parameters():
        if part.is_floating_point():  # a single tensor in the mapped file would keep the whole file in memory
            part.data = part.data.clone()


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage("bitsandbytes", _("a quantised base"), "qlora")
    if kind == "int8":
        _check_int8()
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # FSDP2 does not shard integer tensors
    )


def _check_int8() -> None:
    """Raise MachineError on GPUs before Turing, which have no 8-bit products. Users of older projects saw losses of 0.0
    and mixed dtypes there (F-07, F-13)."""
    import torch

    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < (7, 5):
        raise MachineError(
            _("8-bit multiplication needs compute capability 7.5, but this GPU has {major}.{minor}").format(
                major=capability[0], minor=capability[1]
            ),
            place="int8",
            remedy="adapter: {method: qlora, quantize: nf4}",
        )
