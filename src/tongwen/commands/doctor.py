"""doctor: what this machine can do, and what it can reach; each line with what to do when it is wrong."""

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
from tongwen.core.i18n import say
from tongwen.migrate.failures import find

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
EXTRAS = ("gguf", "sentencepiece", "modelscope", "bitsandbytes", "deepspeed", "tensorboard", "matplotlib")


def run() -> int:
    """Print packages, device, memory, disk and the hubs."""
    import torch

    from tongwen.model.loading.load import compute_device, compute_dtype
    from tongwen.train.loss_plot import cjk_font, is_installed

    console.header(
        "doctor",
        f"tongwen {__version__} · Python {platform.python_version()} · {platform.system()} {platform.machine()}",
    )
    packages = {name: _version(name) for name in PACKAGES}
    extras = {name: _version(name) for name in EXTRAS}
    console.table(
        (say("package", "软件包"), say("version", "版本")),
        [*packages.items(), *((name, version or f"– (pip install {name})") for name, version in extras.items())],
    )
    device = compute_device()
    dtype, why = compute_dtype("auto", device)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    memory = _memory_bytes()
    facts = [
        (say("device", "设备"), f"{device}; {str(dtype)[6:]}: {why}"),
        *((f"GPU {index}", f"{gpu.name}, {console.human_bytes(gpu.total_memory)}") for index, gpu in enumerate(gpus)),
        (say("processors", "处理器"), f"{os.cpu_count()}, torch: {torch.get_num_threads()}"),
        (say("memory", "内存"), console.human_bytes(memory) if memory else "?"),
        (say("free disk here", "当前磁盘剩余"), console.human_bytes(shutil.disk_usage(".").free)),
    ]
    if is_installed():
        font = cjk_font() or say("none: plots are labelled in English", "无：图中用英文标注")
        facts.append((say("font for Chinese in plots", "图中可用的中文字体"), font))
    console.table(("", ""), facts)
    places = hubs()
    with ThreadPoolExecutor() as pool:
        reached = dict(zip(places, pool.map(reach, places.values()), strict=True))
    console.table(
        (say("reachable", "可达"), "", "ms"),
        [
            (name, places[name], f"{took:.0f}" if took is not None else say("no", "否"))
            for name, took in reached.items()
        ],
    )
    if reached["hub"] is None:
        console.notice(
            say("the hub is out of reach: ", "连不上 hub：")
            + "export HF_ENDPOINT=https://hf-mirror.com"
            + say("   or write   base: modelscope:Qwen/Qwen3-8B", "   或写   base: modelscope:Qwen/Qwen3-8B")
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
    """Print one failure of the older projects: what was seen, why, and what happens here instead."""
    one = find(name)
    console.header(one.id, say(*one.says))
    console.tell(say("cause: ", "原因：") + say(*one.why))
    console.tell(say("here:  ", "此处：") + say(*one.here))
    for test in one.shown:
        console.tell(f"  {test}")
    console.emit(
        {"id": one.id, "symptom": say(*one.says), "cause": say(*one.why), "here": say(*one.here), "tests": one.shown}
    )
    return 0


def hubs() -> dict[str, str]:
    """The places that models come from."""
    return {
        "hub": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
        "mirror": "https://hf-mirror.com",
        "modelscope": "https://www.modelscope.cn",
    }


def reach(url: str, timeout_seconds: float = 3.0) -> float | None:
    """Milliseconds to open a connection (through the proxy if one is set); None when there is no way."""
    proxy = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    target = urlparse(proxy or url)
    began = time.monotonic()
    try:
        with socket.create_connection(
            (target.hostname or "", target.port or (80 if target.scheme == "http" else 443)), timeout_seconds
        ):
            pass
    except OSError:
        return None
    if proxy:
        return _through_proxy(url, timeout_seconds, began)
    return 1000 * (time.monotonic() - began)


def _through_proxy(url: str, timeout_seconds: float, began: float) -> float | None:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_seconds):  # noqa: S310
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        return None
    return 1000 * (time.monotonic() - began)


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
