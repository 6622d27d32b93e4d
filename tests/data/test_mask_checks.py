"""A dataset that would not teach the model to stop is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tongwen.core.errors import DataError
from tongwen.data.mask_checks import check_store
from tongwen.data.token_store import SAMPLE, TokenStore, spans_of
from tongwen.recipe.training import Sft


def test_dataset_without_learned_stops_is_refused() -> None:
    samples = np.zeros(2, SAMPLE)
    samples["stop"] = [True, False]
    learn = np.array([False, True, False, True])
    store = TokenStore(np.zeros(4, np.uint32), np.array([0, 2, 4]), spans_of(learn), samples, ("f",))
    with pytest.raises(DataError, match=r"50\.0%"):
        check_store(store, Sft(), [])
    assert check_store(store, Sft(min_stop_learned=0.5), [])["stop_learned_share"] == 0.5
