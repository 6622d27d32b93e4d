"""Find and load a model and its tokenizer by name: folder, hub id, `modelscope:id`, `.gguf` file, or stage folder.

Two faults that transformers accepts silently are errors here: missing weights, which would be random, and a tokenizer
with more tokens than the embedding has rows. No remote code runs; pickles are read with `weights_only=True` only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tongwen.core import artifact, console
from tongwen.core.errors import (
    ArtifactError,
    DataError,
    MachineError,
    MissingPackage,
    ModelError,
    first_line,
    is_out_of_memory,
)
from tongwen.core.i18n import _
from tongwen.core.rowless_tokens import split_rowless
from tongwen.model.loading import limits
from tongwen.model.loading.gguf_header import check_header

if TYPE_CHECKING:
    import torch

# bitsandbytes warns about missing kernels on every import, and about fp16 casts at every int8 product.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Endings of architectures with another head than that of a language model.
OTHER_TASKS = (
    "ForMaskedLM",
    "Classification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForPreTraining",
    "Diffusion",
)
# Architectures that transformers opens as language models, but that need a picture beside each text, see the whole text at
# once, or write actions.
NOT_CAUSAL = {
    *("BlipForConditionalGeneration", "Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"),
    *("InstructBlipVideoForConditionalGeneration", "IdeficsForVisionText2Text", "Kosmos2ForConditionalGeneration"),
    *("PaliGemmaForConditionalGeneration", "CpmAntForCausalLM", "PI0ForConditionalGeneration"),
}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


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


def locate(name: str) -> ModelRef:
    """Find a model by name. Raises ModelError when a folder holds none."""
    if name.startswith("modelscope:"):
        return ModelRef(name, _from_modelscope(name.removeprefix("modelscope:")))
    if not name.strip():
        raise ModelError(_("no model is given"), place="MODEL", remedy="Qwen/Qwen3-0.6B")
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(_("there is no such file"), place=name)
        check_header(path)
        return ModelRef(name, str(path.parent), gguf=path.name)
    if not path.exists():
        if name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name:
            raise ModelError(
                _("there is no such folder"),
                place=name,
                remedy=_("give a folder, a hub id such as Qwen/Qwen3-8B, or modelscope:Qwen/Qwen3-8B"),
            )
        return ModelRef(name, name)
    return _locate_local(name, path)


def _locate_local(name: str, path: Path) -> ModelRef:
    if path.is_file():
        raise ModelError(_("a model must be a folder or a .gguf file"), place=name)
    stage = artifact.find(path)
    if stage and stage.kind in ("pretrain", "sft", "prefer") and (path / "adapter_config.json").is_file():
        below = locate(str(stage.manifest["parents"].get("base", {}).get("path")))
        return replace(below, name=name, adapters=(*below.adapters, str(path)))
    if next(path.glob("consolidated.*.pth"), None) and not (path / "config.json").is_file():
        raise ModelError(
            _("these are original LLaMA files"),
            place=name,
            remedy=f"tongwen convert {name} --to hf --out {path.name}-hf",
        )
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            check_header(ggufs[0])
            return ModelRef(name, str(path), gguf=ggufs[0].name)
        if (path / "adapter_config.json").is_file():
            base = artifact.read_json(path / "adapter_config.json").get("base_model_name_or_path")
            raise ModelError(
                _("this folder holds an adapter, not a model"),
                place=name,
                remedy=f"tongwen chat {base} --adapter {name}",
            )
        raise ModelError(
            _("no config.json in this folder: it is not a model"),
            place=name,
            remedy=_("in a run, only the folder of the `merge` stage is a model"),
        )
    if not any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        raise ModelError(
            _("this model folder has no weights"),
            place=name,
            remedy=_("one of these is needed: {weights}").format(weights=_(", ").join(WEIGHTS)),
        )
    return ModelRef(name, str(path))


def load_tokenizer(ref: ModelRef) -> Any:
    """Return a model's tokenizer. Raises ModelError or MachineError."""
    from transformers import AutoTokenizer

    from tongwen.model.loading import sentencepiece, special_tokens, tiktoken

    _register_family(ref)
    overrides = special_tokens.replace_empty_names(Path(ref.folder)) if ref.is_local else {}
    if ref.is_local:
        limits.check_tokenizer(Path(ref.folder) / "tokenizer.json")
    with quiet(), explain_errors(ref):
        tokenizer = AutoTokenizer.from_pretrained(ref.folder, trust_remote_code=False, **overrides, **_gguf(ref))

    if ref.gguf:
        tiktoken.fix_gguf_pretokenizer(tokenizer, Path(ref.folder) / ref.gguf)
    file = _lone_sentencepiece(ref)
    if file is None:
        return tokenizer
    return tokenizer if tiktoken.read_ranks(file) else sentencepiece.with_sentencepiece_ids(tokenizer, file)


def tokenizer_ref(ref: ModelRef) -> ModelRef:
    """Return the place of the tokenizer used in training: the topmost adapter that has one, else the base."""
    folders = [str(adapter_folder(Path(folder))) for folder in reversed(ref.adapters)]
    folder = next((folder for folder in folders if (Path(folder) / "tokenizer_config.json").is_file()), "")
    return ModelRef(folder, folder) if folder else ref


def _register_family(ref: ModelRef) -> None:
    """Register ChatGLM-6B, which transformers lacks, if the folder's config names it. The config of a hub model that is
    not cached is unknown, so register it then too (this takes a second)."""
    folder = Path(ref.folder) if ref.is_local else cached_folder(ref.folder)
    files = [folder / name for name in ("config.json", "tokenizer_config.json")] if folder else []
    if folder is None or any(b"chatglm" in file.read_bytes().lower() for file in files if file.is_file()):
        importlib.import_module("tongwen.model.chatglm")


def _lone_sentencepiece(ref: ModelRef) -> Path | None:
    """Return the model's tokenizer.model if there is no tokenizer.json beside it."""
    if ref.is_local:
        file = Path(ref.folder) / "tokenizer.model"
    elif ref.gguf:
        return None
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(ref.folder, "tokenizer.model")
        file = Path(found if isinstance(found, str) else "")
    return file if file.is_file() and not file.with_name("tokenizer.json").is_file() else None


def read_model_type(ref: ModelRef) -> str:
    """Return `model_type` from a folder's config.json, read without transformers; "" without a config."""
    file = Path(ref.folder) / "config.json"
    return str(artifact.read_json(file).get("model_type", "")) if file.is_file() else ""


def read_text_type(ref: ModelRef) -> str:
    """Return the `model_type` of a wrapped model's text part; of any other model, its own."""
    file = Path(ref.folder) / "config.json"
    config = artifact.read_json(file) if file.is_file() else {}
    return str((config.get("text_config") or {}).get("model_type") or config.get("model_type", ""))


def check_trainable(ref: ModelRef) -> None:
    """Raise ModelError when a folder's config.json says that the model does not predict the next token of a text.

    Read without transformers; a model that this does not know is tried when it is opened.
    """
    file = Path(ref.folder) / "config.json"
    config = artifact.read_json(file) if file.is_file() else {}
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    other = architecture in NOT_CAUSAL or architecture.endswith(OTHER_TASKS)
    # A config that knows cross-attention can be an encoder's or a decoder's, and says which: BERT and its descendants.
    sees_all = "add_cross_attention" in config and config.get("is_decoder") is False
    if not config.get("is_encoder_decoder") and not other and not sees_all:
        return
    raise ModelError(
        _("{architecture} does not predict the next token of a text, so it cannot be trained here").format(
            architecture=architecture or config.get("model_type")
        ),
        place=str(file),
        remedy=_("use a model for text generation, such as Qwen/Qwen3-0.6B"),
    )


def check_unquantised(ref: ModelRef, config: Mapping[str, Any] | None = None) -> None:
    """Raise ModelError for a model whose tensors are not its weights, so that no adapter can be merged into them.

    config: its config.json, if it was read before.
    """
    file = Path(ref.folder) / "config.json"
    if config is None:
        config = artifact.read_json(file) if file.is_file() else {}
    if config.get("quantization_config"):
        raise ModelError(
            _("this model is quantised"),
            place=ref.name,
            remedy=_("use the original, unquantised model: an adapter fits both"),
        )


def load_config(ref: ModelRef) -> Any:
    from transformers import AutoConfig

    _register_family(ref)
    if ref.is_local and not ref.gguf:
        limits.check_config(Path(ref.folder))
        limits.check_options(Path(ref.folder))
    with quiet(), explain_errors(ref):
        config = AutoConfig.from_pretrained(ref.folder, trust_remote_code=False, **_gguf(ref))
    _check_quantization(config, ref)
    return config


def _check_quantization(config: Any, ref: ModelRef) -> None:
    """Raise ModelError for a method that transformers does not know: it would read the weights as they are."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    known = (name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING)
    if method is not None and str(method) not in known:
        raise ModelError(
            _("transformers cannot read weights quantised by {method!r}").format(method=method),
            place=ref.name,
            remedy=_("use the original, unquantised model: an adapter fits both"),
        )


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
            **_gguf(ref),
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
    _find_head(model)
    if quantize:
        _prepare_quantised(model)
    if ref.gguf:  # it has been de-quantised: treat it as an ordinary model
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model


def _find_head(model: Any) -> Any:
    """Let a model that wraps a whole language model name that one's head as its own, which transformers' Nemotron-H Omni
    does not."""
    if model.get_output_embeddings() is None:
        inner = (part for part in model.modules() if part is not model and hasattr(part, "get_output_embeddings"))
        finders = (part.get_output_embeddings for part in inner)
        model.get_output_embeddings = next((find for find in finders if find() is not None), lambda: None)
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


def cached_folder(hub_id: str) -> Path | None:
    """Return a hub model's snapshot folder in the local cache; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def ensure_local(ref: ModelRef) -> ModelRef:
    """Return the model as a local folder. Download a hub model that is not in the cache yet."""
    if ref.is_local or ref.gguf:
        return ref
    folder = cached_folder(ref.folder)
    if folder is None or not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        from huggingface_hub import snapshot_download

        with explain_errors(ref):
            folder = Path(snapshot_download(ref.folder))
    return ModelRef(ref.name, str(folder))


def build_on_meta(config: Any) -> Any:
    """Build the model of a config on the meta device: shapes only, no memory for weights."""
    import torch

    with quiet(), torch.device("meta"):
        return _find_head(auto_class(config).from_config(config, trust_remote_code=False))


def auto_class(config: Any) -> Any:
    """Return transformers' auto class for a config: the causal language model, or the whole model in which a language
    model is wrapped with vision or audio encoders.

    Some wrapped checkpoints could also be opened as their text part alone. But then a full fine-tuning would lose the
    towers, and an adapter would name layers differently from the files.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    saved_from = (config.architectures or [causal])[0]
    for wrapped, names in (
        (AutoModelForImageTextToText, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        (AutoModelForMultimodalLM, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    ):
        name = names.get(config.model_type)
        if name and name != causal and (causal is None or saved_from == name):
            return wrapped
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            _("transformers has no language model of the type {model_type!r}").format(model_type=config.model_type),
            place=str(config.name_or_path),
            remedy=_("use a model for text generation, such as Qwen/Qwen3-0.6B"),
        )
    return AutoModelForCausalLM


def count_body(config: Any) -> tuple[int, int]:
    """Return (number of parameters without embedding and head, hidden size)."""
    model = build_on_meta(config)
    matrices = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
    body = sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in matrices)
    return body, int(model.get_input_embeddings().weight.shape[1])


def check_tokenizer(tokenizer: Any, model: Any, ref: ModelRef) -> list[str]:
    """Return the tokens that may not occur, since the embedding has no row for them, and say so. Raises ModelError when texts
    need such a token."""
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    named = [str(token) for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) if token]
    template = str(getattr(tokenizer, "chat_template", None) or "")
    spare, needed = split_rowless(
        vocabulary, getattr(tokenizer, "get_added_vocab", dict)().keys(), named, template, rows
    )
    if needed:
        raise ModelError(
            _("the tokenizer has ids up to {highest}, but the embedding has only {rows} rows").format(
                highest=max(vocabulary.values()), rows=rows
            ),
            place=ref.name,
            remedy=_("use this model's own tokenizer"),
        )
    if spare:
        console.notice(
            _("{place}: the embedding has no row for {tokens}: a text that contains one is refused").format(
                place=ref.name, tokens=", ".join(spare[:5])
            )
        )
    return spare


def check_ids_have_rows(ids: Any, tokenizer: Any, rows: int, place: str) -> None:
    """Raise DataError when one of these ids has no row in the embedding."""
    highest = int(max(ids, default=0)) if isinstance(ids, list) else int(ids.max(initial=0))
    if highest >= rows:
        raise DataError(
            _("a text contains {token}, for which the embedding has no row").format(
                token=tokenizer.convert_ids_to_tokens(highest)
            ),
            place=place,
            remedy=_("remove this token from the texts"),
        )


def compute_device() -> str:
    """Return cuda, npu, xpu, mps or cpu: the device that torch can use on this machine.

    Under a launcher this also selects the process's own device. Its index is LOCAL_RANK modulo the visible devices,
    because `srun --gpus-per-task=1` shows each process a single GPU.
    """
    import torch

    if "LOCAL_RANK" in os.environ and (count := count_devices()):
        index = int(os.environ["LOCAL_RANK"]) % count
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed uses the variable unchanged
        torch.accelerator.set_device_index(index)
    kind = torch.accelerator.current_accelerator(check_available=True) if torch.accelerator.is_available() else None
    return kind.type if kind is not None else "cpu"


def count_devices() -> int:
    """Return how many accelerators this process sees; 0 on a CPU, which any number of processes can share."""
    import torch

    return int(torch.accelerator.device_count()) if torch.accelerator.is_available() else 0


def compute_dtype(precision: str, device: str) -> tuple[torch.dtype, str]:
    """Return (dtype, reason). A CPU that only emulates bf16 gets fp32: emulated bf16 is about seven times slower."""
    import torch

    if precision == "fp32":
        return torch.float32, _("set by the recipe")
    if precision == "fp16":
        if device == "cpu":
            raise MachineError(_("CPUs do not support fp16 training"), place="precision", remedy="precision: auto")
        return torch.float16, _("set by the recipe; overflows are counted")
    native = (
        cpu_has_bf16()
        if device == "cpu"
        else device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if precision == "bf16":
        if not native:
            raise MachineError(
                _("this {device} does not support bf16").format(device=device),
                place="precision",
                remedy="precision: fp32",
            )
        return torch.bfloat16, _("set by the recipe")
    if native:
        return torch.bfloat16, _("this {device} supports it").format(device=device)
    return torch.float32, _("this {device} has no native bf16").format(device=device)


def cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class quiet:  # noqa: N801 (used like a function)
    """Hide the libraries' progress bars, hints and deprecation warnings; errors are still raised.

    These settings are global to the process, and the web page loads models in threads. So the first block to enter
    changes them, and the last one to leave restores them.
    """

    _lock = threading.Lock()
    _inside = 0
    _before = contextlib.ExitStack()

    def __enter__(self) -> None:
        with quiet._lock:
            if not quiet._inside:
                self._silence()
            quiet._inside += 1

    def __exit__(self, *error: object) -> None:
        with quiet._lock:
            quiet._inside -= 1
            if not quiet._inside:
                quiet._before.close()

    def _silence(self) -> None:
        from transformers.utils import logging as hf

        self._before.callback(hf.set_verbosity, hf.get_verbosity())
        hf.set_verbosity_error()
        hf.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        if not sys.stderr.isatty():
            self._before.enter_context(_without_bars())
        self._before.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep progress bars that libraries draw themselves (GGUF) out of a log. Other output is written at the end."""
    with contextlib.redirect_stderr(io.StringIO()) as captured:
        yield
    sys.stderr.write("\n".join(line for line in captured.getvalue().split("\n") if "\r" not in line))


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
        if is_out_of_memory(error):  # the command itself reports the remedy
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
                remedy="export HF_ENDPOINT=https://hf-mirror.com"
                + _("   or write   base: modelscope:{place}").format(place=self.ref.name),
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


def _gguf(ref: ModelRef) -> dict[str, str]:
    return {"gguf_file": ref.gguf} if ref.gguf else {}


def _from_modelscope(name: str) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise MissingPackage("modelscope", _("models from ModelScope"), "modelscope") from None
    try:
        return str(snapshot_download(name, local_files_only=bool(os.environ.get("HF_HUB_OFFLINE"))))
    except Exception as error:
        raise MachineError(
            _("cannot get this model from ModelScope: {error}").format(error=error), place=name
        ) from None


def adapter_folder(folder: Path) -> Path:
    """Return the folder of an adapter's files: this one, or the subfolder that the training scripts of 2023 used."""
    if (folder / "adapter_config.json").is_file() or not folder.is_dir():
        return folder
    below = (folder / name for name in ("adapter_model", "sft_lora_model", "pt_lora_model"))
    return next((place for place in below if place.is_dir()), folder)


def find_adapter(folder: Path) -> Path:
    """Like `adapter_folder`, but raise ArtifactError when there is no adapter."""
    place = adapter_folder(folder)
    if not (place / "adapter_config.json").is_file():
        raise no_adapter_config(place)
    return place


def no_adapter_config(folder: Path) -> ArtifactError:
    """Return the error for a folder without adapter_config.json. A bare file of tensors can be migrated."""
    bare = next((name for name in ("adapter_model.bin", "pytorch_model.bin") if (folder / name).is_file()), None)
    return ArtifactError(
        _("no adapter_config.json in this folder"),
        place=str(folder),
        remedy=f"tongwen migrate {folder} --alpha N --out {folder}-lora" if bare else "",
    )


def adapter_type(model: Any) -> str:
    """Return peft's name for the type of a model's adapter, such as LORA; "" without an adapter."""
    config = getattr(model, "peft_config", None)
    return str(next(iter(config.values())).peft_type.value) if config else ""
