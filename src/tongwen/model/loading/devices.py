"""The device that torch uses on this machine, and the number format that suits it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tongwen.core.errors import MachineError
from tongwen.core.i18n import _

if TYPE_CHECKING:
    import torch


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
