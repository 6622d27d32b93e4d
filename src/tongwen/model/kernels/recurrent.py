"""Layers that carry a state from token to token, such as linear attention and Mamba.

transformers keeps the documents of a pack apart in them with a package's kernels, which read `seq_idx` or `cu_seqlens`.
Its own slower code ignores both or refuses them.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib.util import find_spec
from typing import Any

# How transformers' modeling code names the package of a kernel.
KERNEL = re.compile(r'use_kernel_func_from_hub_with_fallback\(\s*"\w+",\s*"(\w+)"')
DISTRIBUTIONS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}


def carries_state(model: Any) -> bool:
    """Whether layers of a model, which an engine may have wrapped, carry a state from token to token."""
    model = getattr(model, "module", model)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    of_state = any("linear" in kind or "attention" not in kind for kind in kinds)
    return of_state or bool(getattr(model, "_is_stateful", False))


def missing_packages(model: Any) -> list[str]:
    """Return the packages, by their names on PyPI, whose kernels the model's layers would use and that are missing."""
    modules = {type(module).__module__ for module in model.modules()}
    code = [sys.modules[name] for name in sorted(modules) if ".modeling_" in name]
    packages = {package for one in code for package in KERNEL.findall(inspect.getsource(one))}
    return sorted(DISTRIBUTIONS.get(name, name) for name in packages if find_spec(name) is None)
