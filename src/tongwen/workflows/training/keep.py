"""`keep`: give back a part of what was learned, so that less of what the base can is lost.

The trained weights move back towards the base until the divergence on the base's own answers has fallen by the share
that the recipe keeps. Learning grows more slowly than the divergence along this way, so most of it stays.
"""

from __future__ import annotations

import math
from typing import Any

from tongwen.core import console
from tongwen.core.i18n import _
from tongwen.model.adapters.interpolation import Interpolation
from tongwen.train.parallel import broadcast_from_rank0
from tongwen.workflows.new_rows import are_rows_untrained, new_rows_of
from tongwen.workflows.training.own_answers import OwnAnswers
from tongwen.workflows.training.types import PreparedModel, TrainingJob

TRIES = 6  # shares tried at most; three are usual
TOLERANCE = 0.03  # the divergence may be smaller than its aim by this part of it
SMALL = 1e-6  # a divergence in nats that counts as none


def before_training(job: TrainingJob, model: PreparedModel) -> Interpolation:
    """Return the way back to the base. Rows that the base never trained do not take it."""
    new = new_rows_of(job.base) if are_rows_untrained(job.base) else []
    return Interpolation(model.adapted, new)


def give_back(keep: float, model: PreparedModel, own: OwnAnswers, way_back: Interpolation) -> dict[str, Any]:
    """Move the trained weights towards the base until KL(base || model) is at most (1 - keep) of what it was.

    keep: 0 … 1; 1 returns the base. Returns what was done, for the report: the share of the way that is left, and the
    divergence at each share that was tried.
    """
    tried = {1.0: _divergence(own, model)}
    aim, share = (1 - keep) * tried[1.0], 1.0
    if keep == 1 or tried[1.0] <= SMALL:
        share = 0.0 if keep == 1 else 1.0
    else:
        for _unused in range(TRIES):
            share = _next_share(tried, aim)
            way_back.set_share(share)
            tried[share] = _divergence(own, model)
            if (1 - TOLERANCE) * aim <= tried[share] <= aim:
                break
        while min(tried.values()) > aim:  # never give back less than was asked for
            share /= 2
            way_back.set_share(share)
            tried[share] = _divergence(own, model)
        share = max(one for one, nats in tried.items() if nats <= aim)
    way_back.set_share(share)
    if share not in tried:
        tried[share] = _divergence(own, model)
    console.info(
        _(
            "keep: {keep:g}: {share:.0%} of the way from the base is kept; divergence from the base's own answers {before:.4f} → {after:.4f} nats per token"
        ).format(keep=keep, share=share, before=tried[1.0], after=tried[share])
    )
    return {"keep": keep, "share": share, "divergence": {f"{one:.4f}": nats for one, nats in sorted(tried.items())}}


def _divergence(own: OwnAnswers, model: PreparedModel) -> float:
    return float(broadcast_from_rank0(own.divergence(model))["divergence"])


def _next_share(tried: dict[float, float], aim: float) -> float:
    """Return a share whose divergence should be just below the aim, by a power law through the two nearest shares.

    The divergence is zero at share 0 and grows about as its square.
    """
    below = max((one for one, nats in tried.items() if nats <= aim), default=0.0)
    above = min(one for one, nats in tried.items() if nats > aim)
    power = 2.0
    if tried.get(below, 0) > 0:
        power = math.log(tried[above] / tried[below]) / math.log(above / below)
    guess = above * ((1 - TOLERANCE / 2) * aim / tried[above]) ** (1 / max(power, 0.5))
    return guess if below < guess < above else (below + above) / 2
