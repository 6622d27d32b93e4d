"""Quantised bases."""

from __future__ import annotations

import os

import pytest

from tongwen.model.loading.quantized import without_compiler


@pytest.mark.parametrize("before", [None, "", "0"])
def test_compiler_setting_is_restored(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    else:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", before)
    with pytest.raises(ZeroDivisionError), without_compiler():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
        raise ZeroDivisionError
    assert os.environ.get("TORCHDYNAMO_DISABLE") == before
