"""Rows of new pieces with which a grown model says what the base says: the output side, in closed form.

After the text before it, a piece must be as likely as its first old token was, times the share of the piece among all that
begins with that token. The row of the head is therefore the first token's row plus the logarithm of this share, times a
direction u that acts as a bias: u·h is 1 for every state h before the head. The first token keeps the rest in the same way,
so that no probability is counted twice. The head must be a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SMOOTHING = 0.5  # occurrences that every piece, and the bare first token, has on top of those that were counted
RIDGE = 1e-3  # of the mean square of a state


def bias_direction(states: torch.Tensor) -> torch.Tensor:
    """Return u (H,) with u·h close to 1 for the states (n, H): the ridge solution of least squares."""
    states = states.double()
    square = states.T @ states
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    return torch.linalg.solve(square, states.sum(0)).float()


def log_shares(
    counts: torch.Tensor, parts: Sequence[Sequence[int]], first_new: int
) -> tuple[torch.Tensor, dict[int, float]]:
    """Return (the logarithm of each piece's share of its first old token, the same of what stays with that token).

    counts: (V,) occurrences of each id in text that the grown tokenizer has encoded
    """
    first = torch.tensor([part[0] for part in parts])
    held = counts.double() + SMOOTHING
    whole = held[:first_new].index_add(0, first, held[first_new : first_new + len(parts)])
    pieces = torch.log(held[first_new : first_new + len(parts)] / whole[first])
    stays = {int(index): float(torch.log(held[index] / whole[index])) for index in torch.unique(first)}
    return pieces.float(), stays
