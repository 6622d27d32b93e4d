"""Choose the samples of each step and distribute them over micro-batches without padding.

Seed and epoch alone determine the samples of an optimizer step. Within a step they go, longest first, into as few
micro-batches of a token budget as hold them, the same number for every rank. The result of a step therefore does not depend
on packing, devices or accumulation, except for the order of floating-point sums.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.recipe.fields import Duration

# (model, batch) -> (the loss to minimise, nats of each learned token)
Loss = Callable[[Any, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class BatchPlan:
    """All steps of a run, planned before it starts.

    steps: per optimizer step, its samples in the order of the epoch
    micro: per optimizer step, slots x world micro-batches (lists of samples), rank by rank within a slot
    """

    steps: tuple[tuple[int, ...], ...]
    micro: tuple[tuple[tuple[int, ...], ...], ...]
    world: int
    budget: int
    steps_per_epoch: int

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def slots(self) -> list[int]:
        """The micro-batches of each step on one rank."""
        return [len(step) // self.world for step in self.micro]

    @property
    def accumulate(self) -> int:
        """The micro-batches of the step that has the most, on one rank."""
        return max(self.slots)

    def flat(self) -> list[tuple[int, ...]]:
        """Return all micro-batches: step after step, slot after slot, rank after rank."""
        return [micro for step in self.micro for micro in step]

    def by_rank(self) -> list[range]:
        """Return the places in `flat` of each step's micro-batches on each rank: step after step, rank after rank."""
        ends = list(accumulate(len(step) for step in self.micro))
        return [
            range(end - len(step) + rank, end, self.world)
            for end, step in zip(ends, self.micro, strict=True)
            for rank in range(self.world)
        ]

    def fill(self, lengths: np.ndarray) -> float:
        """Return the share of the budget that real tokens fill; empty micro-batches at an epoch's end do not count."""
        return sum(self.tokens_of(lengths)) / (self.budget * sum(bool(part) for step in self.micro for part in step))

    def tokens_of(self, lengths: np.ndarray) -> list[int]:
        """Return the number of tokens of each step."""
        return [int(lengths[list(step)].sum()) for step in self.steps]


def make_plan(
    lengths: np.ndarray,
    draw: Callable[[int], list[int]],
    *,
    batch_size: int,
    batch_tokens: int | None = None,
    stop_after: Duration,
    budget: int,
    world: int = 1,
    uniform: bool = False,
) -> BatchPlan:
    """Plan a run. lengths: (S,) tokens per sample; draw(epoch): the samples of an epoch in order.

    With batch_tokens an epoch is packed best-fit, and a step is a fixed number of packs; else a step is batch_size
    samples. uniform: all steps get as many micro-batches as the one that needs the most, as in earlier versions.
    """
    budget = max(budget, int(lengths.max()))
    if batch_tokens:
        return _packed_plan(lengths, draw, batch_tokens, stop_after, budget, world, uniform)
    steps: list[tuple[int, ...]] = []
    tokens = epoch = per_epoch = 0
    while epoch == 0 or not _done(stop_after, len(steps), tokens, per_epoch):
        samples = draw(epoch)
        per_epoch = per_epoch or -(-len(samples) // batch_size)
        for begin in range(0, len(samples), batch_size):
            steps.append(tuple(samples[begin : begin + batch_size]))
            tokens += int(lengths[list(steps[-1])].sum())
            if _done(stop_after, len(steps), tokens, per_epoch):
                break
        epoch += 1
    groups = [tuple(steps)] if uniform else [(step,) for step in steps]
    micro = tuple(parts for group in groups for parts in _deal_alike(group, lengths, budget, world))
    return BatchPlan(tuple(steps), micro, world, budget, per_epoch)


def _deal_alike(
    steps: tuple[tuple[int, ...], ...], lengths: np.ndarray, budget: int, world: int
) -> list[tuple[tuple[int, ...], ...]]:
    """Distribute the samples of each step over equally many parts, the fewest that stay within the budget."""
    largest = max(int(lengths[list(step)].sum()) for step in steps)
    most = -(-max(map(len, steps)) // world)  # a sample to each part
    slots = min(-(-largest // (budget * world)), most)
    while True:
        dealt = []
        for step in steps:
            dealt.append(deal(step, lengths, slots * world))
            if slots < most and int(lengths[list(dealt[-1][0])].sum()) > budget:
                break
        else:
            return dealt
        slots += 1


def _packed_plan(
    lengths: np.ndarray,
    draw: Callable[[int], list[int]],
    batch_tokens: int,
    stop_after: Duration,
    budget: int,
    world: int,
    uniform: bool,
) -> BatchPlan:
    slots = max(1, -(-batch_tokens // (budget * world)))
    capacity = max(int(lengths.max()), batch_tokens // (slots * world))
    slots = max(1, batch_tokens // (capacity * world))
    _check_step_size(slots * capacity * world, capacity * world, batch_tokens, world)
    micro: list[tuple[tuple[int, ...], ...]] = []
    tokens = epoch = per_epoch = 0
    while epoch == 0 or not _done(stop_after, len(micro), tokens, per_epoch):
        packs = best_fit(lengths, draw(epoch), capacity)
        per_epoch = per_epoch or -(-len(packs) // (slots * world))
        for begin in range(0, len(packs), slots * world):
            step = packs[begin : begin + slots * world]
            missing = slots * world - len(step) if uniform else -len(step) % world
            micro.append(tuple(step + [()] * missing))
            tokens += int(sum(lengths[list(pack)].sum() for pack in step))
            if _done(stop_after, len(micro), tokens, per_epoch):
                break
        epoch += 1
    steps = tuple(tuple(sample for pack in step for sample in pack) for step in micro)
    return BatchPlan(steps, tuple(micro), world, capacity, per_epoch)


def _check_step_size(held: int, unit: int, wanted: int, world: int) -> None:
    """Raise RecipeError when a step would hold more tokens than the recipe says, or less than nine tenths of them."""
    if 0.9 * wanted <= held <= wanted:
        return
    fitting = max(1, round(wanted / unit)) * unit
    raise RecipeError(
        _(
            "a step would have {held} tokens: because of the longest sample, {world} processes take {unit} at once"
        ).format(held=held, world=world, unit=unit),
        place=f"batch_tokens: {wanted}",
        remedy=_("batch_tokens: {fitting}, fewer devices, or a smaller max_length").format(fitting=fitting),
    )


def best_fit(lengths: np.ndarray, samples: list[int], capacity: int) -> list[tuple[int, ...]]:
    """Pack samples best-fit decreasing: the longest first, each into the fullest pack with enough space.

    Packs are sorted by their first sample; within a pack the samples keep their order.
    """
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the tokens that still fit
    occupied = 0  # bit r: some pack has space for exactly r tokens
    packs: list[list[int]] = []
    for place in sorted(range(len(samples)), key=lambda place: (-int(lengths[samples[place]]), place)):
        length = int(lengths[samples[place]])
        fitting = occupied >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            pack = by_space[left].pop()
            if not by_space[left]:
                occupied ^= 1 << left
        else:
            left, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(place)
        by_space[left - length].append(pack)
        occupied |= 1 << (left - length)
    return [tuple(samples[place] for place in sorted(pack)) for pack in sorted(packs, key=min)]


def deal(step: tuple[int, ...], lengths: np.ndarray, parts: int) -> tuple[tuple[int, ...], ...]:
    """Distribute samples over parts of about equal tokens: longest first, each into the emptiest part.

    The fullest parts come first, so that the ranks of one accumulation slot have similar loads.
    """
    heap: list[tuple[int, int]] = [(0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    tokens = lengths[list(step)].tolist()
    for place in sorted(range(len(step)), key=lambda place: -tokens[place]):  # of equal length, the first comes first
        size, part = heapq.heappop(heap)
        dealt[part].append(step[place])
        sizes[part] = size + tokens[place]
        heapq.heappush(heap, (sizes[part], part))
    ranked = sorted(range(parts), key=lambda part: (-sizes[part], part))
    return tuple(tuple(dealt[part]) for part in ranked)


def fill(lengths: np.ndarray, budget: int) -> list[tuple[int, ...]]:
    """Group samples in order, as many as fit into the budget; for scoring, where the grouping changes nothing."""
    micro: list[tuple[int, ...]] = []
    space = 0
    for sample, length in enumerate(lengths.tolist()):
        if length > space:
            micro.append(())
            space = max(budget, length)
        micro[-1] += (sample,)
        space -= length
    return micro


def _done(stop_after: Duration, steps: int, tokens: int, per_epoch: int) -> bool:
    if stop_after.unit == "steps":
        return steps >= stop_after.count
    if stop_after.unit == "tokens":
        return tokens >= stop_after.count
    return steps >= round(stop_after.count * per_epoch) and steps > 0


class MicroBatches(Dataset[dict[str, Any]]):
    """The micro-batches of a plan as tensors.

    packed: documents follow each other in one row (1, T); positions restart at each, `cu_seq_lens_q` has the borders
            and `seq_idx` the document of each token.
    Otherwise they are padded to (B, L), with a mask made from lengths.
    """

    def __init__(self, store: Any, micro: list[tuple[int, ...]], *, packed: bool) -> None:
        self.store, self.micro, self.packed = store, micro, packed

    def __len__(self) -> int:
        return len(self.micro)

    def __getitem__(self, index: int) -> dict[str, Any]:
        samples = self.store.take(self.micro[index])
        return (pack if self.packed else pad)(samples) if samples else empty(self.packed)


class StepBatches(Dataset[list[dict[str, Any]]]):
    """The micro-batches of a plan by step and rank: an item is what one rank computes in one step."""

    def __init__(self, micro: Dataset[dict[str, Any]], plan: BatchPlan) -> None:
        self.micro, self.places = micro, plan.by_rank()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.micro[place] for place in self.places[index]]


def pack(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Concatenate (ids, learn) pairs. `rows`: positions whose next token is learned; `targets`: those tokens."""
    lengths = [len(ids) for ids, _ in samples]
    ids = np.concatenate([ids for ids, _ in samples]).astype(np.int64)
    learn = np.concatenate([learn for _, learn in samples])
    places = np.flatnonzero(learn)
    borders = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    return {
        "input_ids": torch.from_numpy(ids)[None],  # (1, T)
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],  # (1, T)
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), borders.diff())[
            None
        ],  # (1, T)
        "rows": torch.from_numpy(places - 1),  # (R,)
        "targets": torch.from_numpy(ids[places]),  # (R,)
        "learned": len(places),
        "tokens": len(ids),
    }


def pad(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Stack (ids, learn) pairs, padded on the right; the mask comes from lengths, never from ids."""
    longest = max(len(ids) for ids, _ in samples)
    out = np.zeros((len(samples), longest), dtype=np.int64)
    real = np.zeros((len(samples), longest), dtype=np.int64)
    learned = np.zeros((len(samples), longest), dtype=bool)
    for row, (ids, learn) in enumerate(samples):
        out[row, : len(ids)], real[row, : len(ids)], learned[row, : len(ids)] = ids, 1, learn
    places = np.flatnonzero(learned)
    return {
        "input_ids": torch.from_numpy(out),  # (B, L)
        "attention_mask": torch.from_numpy(real),
        "rows": torch.from_numpy(places - 1),
        "targets": torch.from_numpy(out.reshape(-1)[places]),
        "learned": len(places),
        "tokens": int(real.sum()),
    }


def empty(packed: bool) -> dict[str, Any]:
    """Return one masked token: keeps ranks in step when a step has fewer samples than micro-batches."""
    one = [(np.zeros(1, np.uint32), np.zeros(1, bool))]
    batch = pack(one) if packed else pad(one)
    batch["rows"] = torch.zeros(1, dtype=torch.int64)
    batch["tokens"] = 0
    return batch


def to_device(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """Move a batch to the device that computes, which differs from that of weights offloaded to host memory."""
    part = next(model.parameters())
    device = part.device_mesh.device_type if isinstance(part, DTensor) else part.device
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
