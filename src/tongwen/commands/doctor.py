"""doctor: show what this machine can do and reach, with a remedy for each problem."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from urllib.parse import urlparse

from tongwen import __version__
from tongwen.core import console
from tongwen.core.i18n import _
from tongwen.migrate.failures import find

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
EXTRAS = ("gguf", "sentencepiece", "modelscope", "bitsandbytes", "deepspeed", "tensorboard", "matplotlib")


def run() -> int:
    """Print packages, device, memory, disk and the hubs."""
    import torch

    from tongwen.model.loading.devices import compute_device, compute_dtype
    from tongwen.train.loss_plot import cjk_font, is_installed

    console.header(
        "doctor",
        f"tongwen {__version__} · Python {platform.python_version()} · {platform.system()} {platform.machine()}",
    )
    packages = {name: _version(name) for name in PACKAGES}
    extras = {name: _version(name) for name in EXTRAS}
    console.table(
        (_("package"), _("version")),
        [*packages.items(), *((name, version or f"– (pip install {name})") for name, version in extras.items())],
    )
    device = compute_device()
    dtype, reason = compute_dtype("auto", device)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    memory = _memory_bytes()
    facts = [
        (_("device"), f"{device}; {str(dtype)[6:]}: {reason}"),
        *((f"GPU {index}", f"{gpu.name}, {console.human_bytes(gpu.total_memory)}") for index, gpu in enumerate(gpus)),
        (_("processors"), f"{os.cpu_count()}, torch: {torch.get_num_threads()}"),
        (_("memory"), console.human_bytes(memory) if memory else "?"),
        (_("free disk here"), console.human_bytes(shutil.disk_usage(".").free)),
    ]
    if is_installed():
        font = cjk_font() or _("none: plots are labelled in English")
        facts.append((_("font for Chinese in plots"), font))
    console.table(("", ""), facts)
    urls = hubs()
    with ThreadPoolExecutor() as pool:
        reached = dict(zip(urls, pool.map(reach, urls.values()), strict=True))
    console.table(
        (_("reachable"), "", "ms"),
        [
            (name, urls[name], f"{milliseconds:.0f}" if milliseconds is not None else _("no"))
            for name, milliseconds in reached.items()
        ],
    )
    if reached["hub"] is None:
        console.notice(
            _(
                "the hub cannot be reached: export HF_ENDPOINT=https://hf-mirror.com   or write   base: modelscope:Qwen/Qwen3-8B"
            )
        )
    console.emit(
        {
            "tongwen": __version__,
            "packages": packages,
            "extras": extras,
            "device": device,
            "dtype": str(dtype)[6:],
            "gpus": [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in gpus],
            "memory_bytes": memory,
            "reachable_ms": reached,
        }
    )
    return 0


def explain(name: str) -> int:
    """Print one failure of the older projects: symptom, cause, and what tongwen does instead."""
    failure = find(name)
    console.header(failure.id, _(failure.symptom))
    console.info(_("cause: ") + _(failure.cause))
    console.info(_("here:  ") + _(failure.handling))
    for test in failure.tests:
        console.info(f"  {test}")
    console.emit(
        {
            "id": failure.id,
            "symptom": _(failure.symptom),
            "cause": _(failure.cause),
            "here": _(failure.handling),
            "tests": failure.tests,
        }
    )
    return 0


def hubs() -> dict[str, str]:
    """Return the hubs and their addresses."""
    return {
        "hub": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
        "mirror": "https://hf-mirror.com",
        "modelscope": "https://www.modelscope.cn",
    }


def reach(url: str, timeout_seconds: float = 3.0) -> float | None:
    """Return the milliseconds to open a connection (through the proxy if one is set); None if that fails."""
    proxy = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    target = urlparse(proxy or url)
    start = time.monotonic()
    try:
        with socket.create_connection(
            (target.hostname or "", target.port or (80 if target.scheme == "http" else 443)), timeout_seconds
        ):
            pass
    except OSError:
        return None
    if proxy:
        return _through_proxy(url, timeout_seconds, start)
    return 1000 * (time.monotonic() - start)


def _through_proxy(url: str, timeout_seconds: float, start: float) -> float | None:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_seconds):  # noqa: S310
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        return None
    return 1000 * (time.monotonic() - start)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
