"""Tune glibc's allocator for this process; do nothing on other systems."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # parameter numbers of mallopt, malloc.h


def set_parameters(parameters: dict[int, int]) -> None:
    """Set these mallopt parameters, unless the user has set a MALLOC_ environment variable."""
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for name, value in parameters.items():
            mallopt(name, value)
