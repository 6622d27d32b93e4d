"""Names of models that nothing can have are refused before anything asks a hub for them; a disk's error is not the model's."""

from __future__ import annotations

import errno

import pytest

from tongwen.core.errors import ModelError
from tongwen.model.loading.loader_errors import explain_errors
from tongwen.model.loading.locate import locate
from tongwen.model.loading.model_ref import ModelRef


@pytest.mark.parametrize(
    "name", ["1 epochs", "\u202eabc", "模型", "a--b", "x" * 97, "a/b/c", "-a", "a.", "a\0b", "a/b.git"]
)
def test_a_name_that_no_hub_has_is_no_folder(name: str) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        locate(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "a_b/c.d-e"])
def test_a_name_that_a_hub_may_have(name: str) -> None:
    assert locate(name).folder == name


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "x"), OSError("Input/output error (os error 5)")],
)
def test_an_error_of_the_disk_is_not_the_model_s(error: OSError) -> None:
    with pytest.raises(OSError) as raised, explain_errors(ModelRef("m", "/tmp")):
        raise error
    assert raised.value is error
