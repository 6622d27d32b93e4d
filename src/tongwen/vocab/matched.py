"""Rows of new pieces with which a grown model says what the base says: the head's side.

In closed form a piece is as likely as its first old token was, times the piece's share of all that begins with this token.
Its row is therefore the first token's row plus the logarithm of the share, times a direction u that acts as a bias: u·h is 1
for every state h before the head. The first token keeps the rest in the same way, so that no probability is counted twice.
Of what follows the first token this knows how often, but not after what. `fit` learns that from text: a map of the old rows,
the same for all pieces. The head must be a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

SMOOTHING = 0.5  # occurrences that every piece, and the bare first token, has on top of those that were counted
RIDGE = 1e-3  # of the mean square of a state
PASSES, STATES_AT_ONCE = 4, 1024
HELD_OUT = 0.1  # share of the states that choose the pass
SHIFT_RATE, MAP_RATE = 0.03, 2e-4  # of Adam; they fall to 0 in a line
DECAY = 5.0  # of the map's squares, divided by the number of states


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


@dataclass(frozen=True)
class HeadRows:
    """Rows of the head that change: old tokens with which pieces begin, then the new ones.

    ids: (M,); start: (M, H) the rows in closed form; sides: (3, M, H) what the map reads: the first, mean and last old row
    of a piece, and the row itself of an old token; bias: (H,)
    """

    ids: torch.Tensor
    start: torch.Tensor
    sides: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def closed_form(
        cls,
        head: torch.Tensor,
        parts: Sequence[Sequence[int]],
        new: range,
        shares: torch.Tensor,
        stays: Mapping[int, float],
        bias: torch.Tensor,
    ) -> HeadRows:
        """head: (V, H) in fp32; new: ids of the pieces; stays: as of `log_shares`, of the old rows that change."""
        old = list(stays)
        first = head[[*old, *(part[0] for part in parts)]]
        sides = torch.zeros(3, *first.shape)
        sides[0] = first
        sides[1, len(old) :] = torch.stack([head[list(part)].mean(0) for part in parts])
        sides[2, len(old) :] = head[[part[-1] for part in parts]]
        shift = torch.cat([torch.tensor([*stays.values()]), shares])
        return cls(torch.tensor([*old, *new]), first + shift[:, None] * bias, sides, bias)


def fit(rows: HeadRows, head: torch.Tensor, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the rows (M, H) after PASSES over states (n, H) and the ids (n,) that follow them, or as they were after an
    earlier pass, or in closed form, if that says better what follows the last tenth of the states.

    The other rows of the head never change: their share of each sum is computed once.
    """
    place = torch.full((max(len(head), int(rows.ids.max()) + 1),), -1)
    place[rows.ids] = torch.arange(len(rows.ids))
    rest, said = _of_other_rows(head, place, states, targets)
    at = place[targets]
    shift = torch.zeros(len(rows.ids), 1, requires_grad=True)
    shared = torch.zeros(3, head.shape[1], head.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [shift]}, {"params": [shared]}], betas=(0.9, 0.99))
    learned = len(states) - max(1, int(HELD_OUT * len(states)))
    if learned < 1:
        return rows.start
    steps, step = PASSES * -(-learned // STATES_AT_ONCE), 0

    def current() -> torch.Tensor:
        return rows.start + shift * rows.bias + torch.einsum("kmh,kho->mo", rows.sides, shared)

    def nats(which: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        logits = states[which] @ matrix.T
        own = logits.gather(1, at[which].clamp(min=0)[:, None])[:, 0]
        total = torch.logaddexp(rest[which], logits.logsumexp(1))
        return (total - torch.where(at[which] >= 0, own, said[which])).mean()

    last = torch.arange(learned, len(states))
    best, least = rows.start, float(nats(last, rows.start))
    for number in range(PASSES):
        order = torch.randperm(learned, generator=torch.Generator().manual_seed(number))
        for which in order.split(STATES_AT_ONCE):
            loss = nats(which, current()) + DECAY / learned * shared.square().sum()
            optimizer.zero_grad()
            loss.backward()
            for group, rate in zip(optimizer.param_groups, (SHIFT_RATE, MAP_RATE), strict=True):
                group["lr"] = rate * (1 - step / steps)
            optimizer.step()
            step += 1
        with torch.no_grad():
            found = current()
            if (now := float(nats(last, found))) < least:
                best, least = found, now
    return best


def _of_other_rows(
    head: torch.Tensor, place: torch.Tensor, states: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the log of the sum over the rows that do not change (n,), the logit of each target (n,), if it is one)."""
    changes = place[: len(head)] >= 0
    sums, said = [], []
    for some, ids in zip(states.split(STATES_AT_ONCE), targets.split(STATES_AT_ONCE), strict=True):
        logits = (some.to(head.dtype) @ head.T).float()
        said.append(logits.gather(1, ids.clamp(max=len(head) - 1)[:, None])[:, 0])
        sums.append(logits.masked_fill(changes, -torch.inf).logsumexp(1))
    return torch.cat(sums), torch.cat(said)
