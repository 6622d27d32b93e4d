"""New rows made so that the grown model says what the base says, before any training (`vocab.new_rows: matched`).

Both ends are fitted on text that the pieces were learned from, while all other weights stay as they are.

Input: after a piece, the state in the lower layers, which put bytes and characters together to words, must be the one after
the piece's old tokens. Only these layers run, on both spellings of the text, and one pass of gradient descent fits the rows.

Head: the rows start in closed form (`vocab.matched`), and are then fitted to the text itself, on the states that the new
input rows lead to, which are computed once. Both fits move rows by a map that all pieces share, so that 20,000 tokens are
enough for thousands of rows.

A row serves one end only, so a head that is the embedding becomes a matrix of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tongwen.core import console
from tongwen.core.i18n import _
from tongwen.model.adapters.targets import text_part
from tongwen.model.kernels.loss import use_blockwise_head
from tongwen.vocab import matched
from tongwen.vocab.grow import Rows
from tongwen.workflows.vocab_pieces import ExtendedTokenizer

CHARACTERS = 24_000  # of text that the rows are fitted on
CHUNK = 300  # characters that are read together
DEPTH = 0.25  # share of the layers in which the states must agree
OWN_RATE = 0.037  # of Adam, for a piece's own part of its row, as a share of the old rows' mean square root
SHARED_RATE = 1e-3  # the same for the map that all pieces share
BIAS_TOKENS = 5_000  # old tokens whose last states give the direction of the bias


@dataclass(frozen=True)
class MatchedRows:
    """The new rows in fp32, in the order of the new ids.

    inside, head: (N, H) of the input embedding and of the head
    stays:        old id -> its new row of the head, without what went to the pieces that begin with it
    untied:       the name of the head's matrix, if the base has none of its own; "" otherwise
    report:       what it took
    """

    inside: Rows
    head: Rows
    stays: dict[int, Rows]
    untied: str
    report: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """A piece of text in both spellings, (1, n) each. ends: (n,) places in the old one after each new token."""

    new: torch.Tensor
    old: torch.Tensor
    ends: torch.Tensor


def match_rows(model: Any, extended: ExtendedTokenizer, texts: Sequence[str], start: int | None) -> MatchedRows | None:
    """Fit the new rows to a base in memory, which keeps its weights.

    texts: a sample of what the pieces were learned from. start: the token that begins a text.
    Returns None, with a notice, where there is no text, or where the model changes what its head says.
    """
    chunks = [_spell(ids, extended, start) for ids in extended.files.coder.encode(_spread(texts))]
    if not chunks:
        console.notice(_("no text to match new rows on: they are made as by `subtoken_mean`"))
        return None
    model.eval().requires_grad_(False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    batch = {"input_ids": chunks[0].old, "rows": torch.arange(chunks[0].old.shape[1])}
    if head is None or not use_blockwise_head(model, batch):
        console.notice(
            _(
                "new rows cannot be matched, since this model changes what its head says: they are made as by `subtoken_mean`"
            )
        )
        return None
    began = time.process_time()
    inside, seen = _fit_inside(model, embedding, extended, chunks)
    bias = matched.bias_direction(_last_states(model, chunks))
    shares, stays = matched.log_shares(_counts(extended, texts), extended.parts, extended.first_new)
    # A token that begins other text, too, keeps its row, such as `K` for the word `Kubernetes`.
    spelling = extended.files.coder.token_bytes
    changed = {at: less for at, less in stays.items() if not spelling[at].isascii()}
    rows = matched.HeadRows.closed_form(head.weight.float(), extended.parts, extended.new_ids, shares, changed, bias)
    states, targets = _states_of_text(model, embedding, extended.first_new, inside, chunks)
    found = matched.fit(rows, head.weight, states, targets)
    report = {
        "old_tokens": sum(chunk.old.shape[1] for chunk in chunks),
        "new_tokens": sum(chunk.new.shape[1] for chunk in chunks),
        "unseen": int((~seen).sum()),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    return MatchedRows(
        inside.numpy(),
        found[len(changed) :].numpy(),
        {at: row.numpy() for at, row in zip(changed, found, strict=False)},
        _name_of(model, head) if head.weight is embedding.weight else "",
        report,
    )


def _spread(texts: Sequence[str]) -> list[str]:
    """Return about CHARACTERS of text in chunks, spread evenly."""
    whole = "\n".join(texts)
    count = -(-min(CHARACTERS, len(whole)) // CHUNK)
    return [whole[begin : begin + CHUNK] for begin in (place * len(whole) // count for place in range(count))]


def _spell(ids: Sequence[int], extended: ExtendedTokenizer, start: int | None) -> Chunk:
    new = ([] if start is None else [start]) + list(ids)
    old = [extended.parts[at - extended.first_new] if at >= extended.first_new else [at] for at in new]
    ends = torch.tensor([len(part) for part in old]).cumsum(0) - 1
    return Chunk(torch.tensor([new]), torch.tensor([[at for part in old for at in part]]), ends)


def _counts(extended: ExtendedTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return the occurrences of each id in the texts, (V + N,)."""
    counts = torch.zeros(extended.new_ids.stop)
    for ids in extended.files.coder.encode(list(texts)):
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(counts))
    return counts


def _fit_inside(
    model: Any, embedding: Any, extended: ExtendedTokenizer, chunks: list[Chunk]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the rows of the input (N, H), which of them occurred (N,)).

    A row is halfway between the mean of its old rows and the last one, plus a map of its first, mean and last old row
    that all pieces share, plus what is its own. The map learns from every piece, also for those that do not occur.
    """
    old, parts = embedding.weight.float(), extended.parts
    mean = torch.stack([old[part].mean(0) for part in parts])
    sides = torch.stack([old[[part[0] for part in parts]], mean, old[[part[-1] for part in parts]]])
    start = (sides[1] + sides[2]) / 2
    shared = torch.zeros(3, old.shape[1], old.shape[1], requires_grad=True)
    own = torch.zeros_like(start, requires_grad=True)
    rates = OWN_RATE * float(old.square().mean().sqrt()), SHARED_RATE
    optimizer = torch.optim.Adam([{"params": [own]}, {"params": [shared]}], betas=(0.9, 0.99))
    top, seen = _lower_layers(model), torch.zeros(len(parts), dtype=torch.bool)
    with console.progress(len(chunks), _("matching rows")) as bar:
        for done, chunk in enumerate(chunks):
            bar.update(done)
            places = chunk.new[0] >= extended.first_new
            ids = chunk.new[0, places] - extended.first_new
            if not len(ids):
                continue
            seen[ids] = True
            rows = start[ids] + torch.einsum("knh,kho->no", sides[:, ids], shared) + own[ids]
            wanted = _directions(_states(model, top, chunk.old)[0, chunk.ends]).detach()
            with _rows_at(embedding, places, rows):
                found = _directions(_states(model, top, chunk.new.masked_fill(places, 0))[0])
            optimizer.zero_grad()
            (found - wanted)[int(places.int().argmax()) :].square().mean().backward()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - done / len(chunks))
            optimizer.step()
    with torch.no_grad():
        return start + torch.einsum("knh,kho->no", sides, shared) + own, seen


def _directions(states: torch.Tensor) -> torch.Tensor:
    """Return states (n, H) at mean square 1, as a layer's norm sees them."""
    return torch.nn.functional.rms_norm(states.float(), states.shape[-1:], eps=1e-6)


def _lower_layers(model: Any) -> Any:
    """Return the topmost of the layers in which the states must agree; None for all of a model without a list of them."""
    _name, part = text_part(model)
    count = part.config.get_text_config().num_hidden_layers
    lists = (one for one in part.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == count)
    layers = next(lists, None)
    return layers[math.ceil(DEPTH * count) - 1] if layers is not None else None


class _Reached(Exception):
    """The layer whose states are wanted has them."""


def _states(model: Any, top: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the states (1, n, H) behind a layer, and compute no further; without one, those that the head gets."""
    found: list[torch.Tensor] = []

    def stop(_module: Any, _arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    head = model.get_output_embeddings()
    handle = (
        top.register_forward_hook(stop)
        if top is not None
        else head.register_forward_pre_hook(lambda _module, arguments: stop(None, None, arguments))
    )
    try:
        model(input_ids=ids, use_cache=False)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError(f"{type(model).__name__} did not run {type(top).__name__}")


def _last_states(model: Any, chunks: list[Chunk]) -> torch.Tensor:
    """Return the states (n, H) that the head gets after each token of about BIAS_TOKENS old tokens."""
    some = chunks[:: max(1, sum(chunk.old.shape[1] for chunk in chunks) // BIAS_TOKENS)]
    return torch.cat([_states(model, None, chunk.old)[0, chunk.ends].float() for chunk in some])


def _states_of_text(
    model: Any, embedding: Any, first_new: int, inside: torch.Tensor, chunks: list[Chunk]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the states (n, H) that the head of the grown model gets, the id (n,) that follows each)."""
    states, targets = [], []
    with console.progress(len(chunks), _("matching rows")) as bar:
        for done, chunk in enumerate(chunks):
            bar.update(done)
            places = chunk.new[0] >= first_new
            with _rows_at(embedding, places, inside[chunk.new[0, places] - first_new]):
                states.append(_states(model, None, chunk.new.masked_fill(places, 0))[0, :-1].float())
            targets.append(chunk.new[0, 1:])
    return torch.cat(states), torch.cat(targets)


@contextmanager
def _rows_at(embedding: Any, places: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """Let an embedding return these rows (n, H) at the places where `places` (L,) is true; some models scale all rows."""

    def put(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        scale = getattr(module, "embed_scale", 1.0)
        out = output.clone()
        out[:, places] = (rows * scale).to(output.dtype)
        return out

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _name_of(model: Any, head: Any) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)
