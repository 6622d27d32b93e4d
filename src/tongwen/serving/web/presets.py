"""Settings of the sampling that have a name on the page."""

from __future__ import annotations

PRESETS: dict[str, dict[str, float]] = {
    "exact": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
    "balanced": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    "lively": {"temperature": 1.0, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.0},
}
