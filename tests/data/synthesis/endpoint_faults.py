"""An endpoint on this machine that answers with the faults of a real one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[3] / "bench"


def load_bench(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fault_endpoint = load_bench("fault_endpoint")
storm = load_bench("synthesize_storm")


@pytest.fixture()
def faults() -> Iterator[Callable[..., Any]]:
    """Makes endpoints, and ends them."""
    made = []

    def make(plan: Any = lambda prompt, times: "", answer: Any = storm.answer, **options: Any) -> Any:
        made.append(fault_endpoint.Faults(plan if callable(plan) else lambda prompt, times: plan, answer, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
