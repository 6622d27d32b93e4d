"""Which samples make a step, and how they are dealt into micro-batches without padding.

The samples of an optimizer step follow from seed and epoch alone. Within a step they are dealt, longest first, into
micro-batches of a token budget, the same number for every step and rank; the result of a step therefore does not depend
on packing, devices or accumulation, except for the order of floating-point sums.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from tongwen.core.errors import RecipeError
from tongwen.core.i18n import _
from tongwen.recipe.fields import Duration

# (model, batch) -> (the loss that is learned, nats of each learned token)
Loss = Callable[[Any, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class BatchPlan:
    """The whole run, laid out before it starts.

    steps: per optimizer step, its samples in the order of the epoch
    micro: per optimizer step, accumulate x world micro-batches (lists of samples), rank by rank within a slot
    """

    steps: tuple[tuple[int, ...], ...]
    micro: tuple[tuple[tuple[int, ...], ...], ...]
    accumulate: int
    world: int
    budget: int
    steps_per_epoch: int

    def __len__(self) -> int:
        return len(self.steps)

    def flat(self) -> list[tuple[int, ...]]:
        """Micro-batches in the order in which accelerate deals them: slot after slot, rank after rank."""
        return [micro for step in self.micro for micro in step]

    def fill(self, lengths: np.ndarray) -> float:
        """Real tokens among those that the micro-batches have room for; the empty ones that end an epoch hold none."""
        return sum(self.tokens_of(lengths)) / (self.budget * sum(bool(part) for step in self.micro for part in step))

    def tokens_of(self, lengths: np.ndarray) -> list[int]:
        """Tokens of each step."""
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
) -> BatchPlan:
    """Lay out a run. lengths: (S,) tokens per sample; draw(epoch): the samples of an epoch in their order.

    With batch_tokens the epoch is packed best-fit, and a step is a fixed number of packs; else a step is batch_size
    samples.
    """
    budget = max(budget, int(lengths.max()))
    if batch_tokens:
        return _packed_plan(lengths, draw, batch_tokens, stop_after, budget, world)
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
    accumulate = 1
    while True:
        micro = tuple(deal(step, lengths, accumulate * world) for step in steps)
        fullest = max(sum(int(lengths[sample]) for sample in part) for step in micro for part in step)
        if fullest <= budget or accumulate * world >= batch_size:
            return BatchPlan(tuple(steps), micro, accumulate, world, budget, per_epoch)
        accumulate += 1


def _packed_plan(
    lengths: np.ndarray,
    draw: Callable[[int], list[int]],
    batch_tokens: int,
    stop_after: Duration,
    budget: int,
    world: int,
) -> BatchPlan:
    accumulate = max(1, -(-batch_tokens // (budget * world)))
    capacity = max(int(lengths.max()), batch_tokens // (accumulate * world))
    accumulate = max(1, batch_tokens // (capacity * world))
    _check_step_size(accumulate * capacity * world, capacity * world, batch_tokens, world)
    micro: list[tuple[tuple[int, ...], ...]] = []
    tokens = epoch = per_epoch = 0
    while epoch == 0 or not _done(stop_after, len(micro), tokens, per_epoch):
        packs = best_fit(lengths, draw(epoch), capacity)
        per_epoch = per_epoch or -(-len(packs) // (accumulate * world))
        for begin in range(0, len(packs), accumulate * world):
            step = packs[begin : begin + accumulate * world]
            micro.append(tuple(step + [()] * (accumulate * world - len(step))))
            tokens += int(sum(lengths[list(pack)].sum() for pack in step))
            if _done(stop_after, len(micro), tokens, per_epoch):
                break
        epoch += 1
    steps = tuple(tuple(sample for pack in step for sample in pack) for step in micro)
    return BatchPlan(steps, tuple(micro), accumulate, world, capacity, per_epoch)


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
    """Samples into packs of a capacity, best-fit decreasing: the longest first, each into the fullest pack that has room.

    The packs stand in the order of their first sample, and a pack's samples in the order that they had.
    """
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the tokens that still fit
    taken = 0  # bit r: some pack has exactly r tokens of room
    packs: list[list[int]] = []
    for place in sorted(range(len(samples)), key=lambda place: (-int(lengths[samples[place]]), place)):
        length = int(lengths[samples[place]])
        fitting = taken >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            pack = room[left].pop()
            if not room[left]:
                taken ^= 1 << left
        else:
            left, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(place)
        room[left - length].append(pack)
        taken |= 1 << (left - length)
    return [tuple(samples[place] for place in sorted(pack)) for pack in sorted(packs, key=min)]


def deal(step: tuple[int, ...], lengths: np.ndarray, parts: int) -> tuple[tuple[int, ...], ...]:
    """Samples into parts of about equal tokens: longest first, each into the emptiest part. Fullest parts come first,
    so that the ranks of one accumulation slot are alike."""
    heap: list[tuple[int, int]] = [(0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for sample in sorted(step, key=lambda sample: (-int(lengths[sample]), step.index(sample))):
        size, part = heapq.heappop(heap)
        dealt[part].append(sample)
        sizes[part] = size + int(lengths[sample])
        heapq.heappush(heap, (sizes[part], part))
    ranked = sorted(range(parts), key=lambda part: (-sizes[part], part))
    return tuple(tuple(dealt[part]) for part in ranked)


def fill(lengths: np.ndarray, budget: int) -> list[tuple[int, ...]]:
    """Samples in their order, as many together as fit into the budget: for scoring, where order changes nothing."""
    micro: list[tuple[int, ...]] = []
    room = 0
    for sample, length in enumerate(lengths.tolist()):
        if length > room:
            micro.append(())
            room = max(budget, length)
        micro[-1] += (sample,)
        room -= length
    return micro


def _done(stop_after: Duration, steps: int, tokens: int, per_epoch: int) -> bool:
    if stop_after.unit == "steps":
        return steps >= stop_after.count
    if stop_after.unit == "tokens":
        return tokens >= stop_after.count
    return steps >= round(stop_after.count * per_epoch) and steps > 0


class MicroBatches(Dataset[dict[str, Any]]):
    """The micro-batches of a plan as tensors.

    packed: documents lie end to end in one row (1, T) with positions that start anew and their borders in
    `cu_seq_lens_q`; otherwise they are padded to (B, L), with a mask made from lengths.
    """

    def __init__(self, store: Any, micro: list[tuple[int, ...]], *, packed: bool) -> None:
        self.store, self.micro, self.packed = store, micro, packed

    def __len__(self) -> int:
        return len(self.micro)

    def __getitem__(self, index: int) -> dict[str, Any]:
        samples = [self.store.sample(sample) for sample in self.micro[index]]
        return (pack if self.packed else pad)(samples) if samples else empty(self.packed)


def pack(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """(ids, learn) pairs end to end. `rows` are the positions whose next token is learned, `targets` those tokens."""
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
        "rows": torch.from_numpy(places - 1),  # (R,)
        "targets": torch.from_numpy(ids[places]),  # (R,)
        "learned": len(places),
        "tokens": len(ids),
    }


def pad(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """(ids, learn) pairs side by side, padded on the right; what is real is known from lengths, never from ids."""
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
    """One masked token: keeps ranks in step where a step has fewer samples than micro-batches."""
    one = [(np.zeros(1, np.uint32), np.zeros(1, bool))]
    batch = pack(one) if packed else pad(one)
    batch["rows"] = torch.zeros(1, dtype=torch.int64)
    batch["tokens"] = 0
    return batch


def to_device(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """A batch where the model computes. Weights that wait in the host's memory are not computed on there."""
    part = next(model.parameters())
    device = part.device_mesh.device_type if isinstance(part, DTensor) else part.device
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
