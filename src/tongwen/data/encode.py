"""Encode rendered spans to token ids with a loss mask; boundaries are exact for every tokenizer.

Each prompt part and each answer is tokenised separately, as at inference: the prompt is tokenised whole, then the tokens of
the answer follow one by one. So no token crosses a boundary, and the mask depends on positions, never on comparing ids
(pad = eos is common and harmless). If a tokenizer puts a space before every text (SentencePiece's dummy prefix), a
continuation is tokenised after an anchor, and the tokens of the anchor are removed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from tongwen.core import console
from tongwen.core.chat_template import APART, RenderedSample, Template
from tongwen.core.errors import DataError, ModelError, RowRejected
from tongwen.core.i18n import _
from tongwen.core.records import Dialogue, Document, Message, Preference, Span
from tongwen.data.ledger import Ledger, RejectedRow
from tongwen.data.tiktoken_encoder import TiktokenEncoder, make_tiktoken_encoder
from tongwen.data.token_store import Batch, TokenStore, spans_of
from tongwen.recipe.training import Sft

ANCHORS = ("\n", ":", "a")
BATCH = 1000  # dialogues tokenised in one call of the tokenizer library
ROUND_TRIPS = 20_000  # dialogues that are decoded again, at most: a few seconds
OF_TEMPLATE = ("part_lost", "prompt_differs", "answer_changed", "no_stop", "template_refuses", "template_fails")
FAST_FROM = 500  # texts from which a faster encoder pays off: creating it takes a second or two


Ids = Sequence[int] | np.ndarray


class Piece(NamedTuple):
    """Ids of a part of a text, whether they are learned, and whether they belong to an answer."""

    ids: Ids
    learn: bool
    answer: bool = False


class Encoder:
    """A tokenizer with its prefix and its way to continue a text.

    tokenizer: a fast transformers tokenizer
    prefix:    ids that the tokenizer itself puts before a text, such as `<s>`; written exactly once
    anchor:    text before a continuation when it is tokenised; "" if the tokenizer adds no space, or if the model was
               trained with the space (ChatGLM)
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
        if self.backend is None:
            raise ModelError(
                _("this tokenizer has no fast form (tokenizer.json)"),
                place=type(tokenizer).__name__,
                remedy="AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )
        self.fast: TiktokenEncoder | None = None
        self._fast_searched = False
        self.prefix = prefix_of(tokenizer)
        self.anchor = "" if getattr(tokenizer, "answers_start_with_space", False) else self._find_anchor()

    def _ids(self, texts: list[str]) -> list[Ids]:
        if not self._fast_searched and len(texts) >= FAST_FROM:
            self.fast, self._fast_searched = self._find_fast(texts[:FAST_FROM]), True
        if self.fast is None:
            return self._slow_ids(texts)
        out = self.fast.encode_all(texts)
        rest = [place for place, ids in enumerate(out) if ids is None]
        for place, ids in zip(rest, self._slow_ids([texts[place] for place in rest]), strict=True):
            out[place] = np.array(ids, np.uint32)
        return out  # type: ignore[return-value]

    def _slow_ids(self, texts: list[str]) -> list[Ids]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _find_fast(self, texts: list[str]) -> TiktokenEncoder | None:
        """Return tiktoken with the same vocabulary, if it provably gives the same ids and does so for these texts."""
        fast = make_tiktoken_encoder(self.backend)
        if fast is None:
            return None
        for text, wanted in zip(texts, self._slow_ids(texts), strict=True):
            found = fast.encode(text)
            if found is not None and found.tolist() != wanted:
                console.notice(
                    _("tiktoken splits {text!r} differently; using the tokenizers library instead").format(
                        text=text[:20]
                    )
                )
                return None
        return fast

    def _find_anchor(self) -> str:
        """Return a text after which a continuation gets no dummy prefix space; "" when the tokenizer adds none."""
        alone = self._slow_ids(["是"])[0]
        for anchor in ANCHORS:
            head, joined = self._slow_ids([anchor, f"{anchor}是"])
            if list(joined) == [*head, *alone]:
                return ""
        return ANCHORS[0]

    def _continue(self, text: str, piece: Ids) -> Ids:
        """Return the ids of a continuation; piece: the ids of the usual anchor and the text."""
        for anchor in ANCHORS:
            head = list(self._ids([anchor])[0])
            joined = piece if anchor == self.anchor else self._ids([anchor + text])[0]
            if list(joined[: len(head)]) == head:
                return joined[len(head) :]
        raise ModelError(
            _("the tokenizer cannot continue a text with {text!r}").format(text=text[:20]),
            place=type(self.backend).__name__,
        )

    def encode(self, samples: Sequence[Sequence[Span]]) -> list[list[Piece]]:
        """Return the pieces of each sample. All texts are tokenised in one call of the library."""
        joined = [join_spans(spans) for spans in samples]
        if not self.anchor:
            encoded = iter(self._ids([span.text for spans in joined for span in spans]))
            out = [[Piece(next(encoded), span.learn, span.answer) for span in spans] for spans in joined]
        else:
            out = self._encode_with_anchor(joined)
        return [self.with_prefix(pieces) for pieces in out] if self.prefix else out

    def _encode_with_anchor(self, samples: list[list[Span]]) -> list[list[Piece]]:
        head = list(self._ids([self.anchor])[0])
        encoded = iter(
            self._ids(
                [
                    self.anchor + span.text if number else span.text
                    for spans in samples
                    for number, span in enumerate(spans)
                ]
            )
        )
        out = []
        for spans in samples:
            pieces = []
            for number, span in enumerate(spans):
                ids = next(encoded)
                if number:
                    ids = ids[len(head) :] if list(ids[: len(head)]) == head else self._continue(span.text, ids)
                pieces.append(Piece(ids, span.learn, span.answer))
            out.append(pieces)
        return out

    def encode_texts(self, texts: list[str]) -> list[Ids]:
        """Return the ids of each text, without the tokenizer's prefix."""
        return self._ids(texts)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, the same as in training; the parts between APART are tokenised separately."""
        first, *rest = text.split(APART)
        ids = [index for piece in self.encode([[Span(first, False)]])[0] for index in piece.ids]
        for part in rest:
            piece = self._ids([self.anchor + part])[0]
            ids += self._continue(part, piece) if self.anchor else piece
        return [int(index) for index in ids]

    def keeps_stop(self, pieces: Sequence[Piece]) -> bool:
        """Whether the tokens of a sample contain the stop of its last answer: always true, except in LegacyEncoder."""
        return True

    def with_prefix(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces with the tokenizer's prefix exactly once, whether or not the template writes it."""
        count = len(self.prefix)
        first = pieces[0]
        if list(first.ids[:count]) != self.prefix:
            return [Piece(self.prefix, learn=False), *pieces]
        if list(first.ids[count : 2 * count]) == self.prefix:
            return [first._replace(ids=first.ids[count:]), *pieces[1:]]
        return pieces


def prefix_of(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer puts before every text: `<s>` for LLaMA, nothing for Qwen and BLOOM."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


def join_spans(spans: Iterable[Span]) -> list[Span]:
    """Join neighbouring spans with the same `learn` and `answer`: each result is tokenised together."""
    out: list[Span] = []
    for span in spans:
        if not span.text:
            continue
        if out and (out[-1].learn, out[-1].answer) == (span.learn, span.answer):
            out[-1] = Span(out[-1].text + span.text, span.learn, span.answer, span.stop)
        else:
            out.append(span)
    return out


class _Sample(NamedTuple):
    """A sample before it is stored. dialogue: index of its dialogue in the batch."""

    dialogue: int
    pieces: list[Piece]
    stop: bool
    size: int  # tokens


def encode_dialogues(
    dialogues: Iterable[Dialogue],
    template: Template,
    encoder: Encoder,
    section: Sft,
    ledger: Ledger,
    reject: Callable[[RejectedRow], None],
) -> Iterator[Batch]:
    """Yield the samples of the dialogues, in batches. `sft.too_long` decides about samples that are too long; `reject` gets
    the samples that cannot be trained, and the ledger counts them. A row counts as kept when at least one of its samples
    is kept; tokens are counted per sample. The stop token is never cut off."""
    stream = iter(dialogues)
    while True:
        with _without_gc():
            chunk = list(islice(stream, BATCH))
            if not chunk:
                return
            batch = _batch(_trainable_samples(chunk, template, encoder, section, ledger, reject), chunk)
        yield batch


@contextmanager
def _without_gc() -> Iterator[None]:
    """Turn off garbage collection: the ids form no cycles, and scanning millions of them costs a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _trainable_samples(
    chunk: list[Dialogue],
    template: Template,
    encoder: Encoder,
    section: Sft,
    ledger: Ledger,
    reject: Callable[[RejectedRow], None],
) -> list[_Sample]:
    """Return the trainable samples of some dialogues; reject the others."""
    rendered: list[tuple[int, RenderedSample]] = []
    for number, found in enumerate(template.samples_of_each(chunk, section.learn, section.thinking)):
        if isinstance(found, RowRejected):
            dialogue = chunk[number]
            ledger.enter(0)
            ledger.lose(found.reason, 0)
            reject(RejectedRow(dialogue.origin, found.reason, found.rule, dialogue.to_dict()))
        else:
            rendered += [(number, sample) for sample in found]
    encoded = encoder.encode([sample.spans for _, sample in rendered])
    samples = [
        _Sample(
            number,
            pieces,
            sample.learns_to_stop and encoder.keeps_stop(pieces),
            sum([len(piece.ids) for piece in pieces]),
        )
        for (number, sample), pieces in zip(rendered, encoded, strict=True)
    ]
    shares = np.bincount([sample.dialogue for sample in samples], minlength=len(chunk)).tolist()
    ledger.enter(sum(sample.size for sample in samples), items=sum(map(bool, shares)))
    kept, reasons = [], {}
    for sample in samples:
        reason, rule = _reason_unfit(sample, section.max_length)
        if reason == "too_long" and section.too_long != "reject" and shares[sample.dialogue] == 1:
            shorter, lost = _shorten(chunk[sample.dialogue], sample, template, encoder, section)
            ledger.lose(lost, sample.size - shorter.size, items=0)
            sample = shorter
            reason, rule = _reason_unfit(sample, section.max_length)
        if reason:
            dialogue = chunk[sample.dialogue]
            reasons[sample.dialogue] = reason
            ledger.lose(reason, sample.size, items=0)
            reject(RejectedRow(dialogue.origin, reason, rule, dialogue.to_dict()))
        else:
            kept.append(sample)
    taken = {sample.dialogue for sample in kept}
    ledger.keep(sum(sample.size for sample in kept), items=len(taken))
    for number, reason in reasons.items():
        if number not in taken:
            ledger.lose(reason, 0)
    return kept


def _reason_unfit(sample: _Sample, max_length: int) -> tuple[str, str]:
    if sample.size > max_length:
        return "too_long", _("{size} tokens, max_length is {max_length}").format(
            size=sample.size, max_length=max_length
        )
    learned = sum([len(piece.ids) for piece in sample.pieces if piece.learn])
    if learned < 1 or (learned == 1 and sample.pieces[0].learn):
        return "nothing_to_learn", _("this sample has no token to learn")
    return "", ""


def _shorten(
    dialogue: Dialogue, sample: _Sample, template: Template, encoder: Encoder, section: Sft
) -> tuple[_Sample, str]:
    """Shorten a dialogue to max_length: drop its oldest turns, or cut the end of its longest question; its answer and stop
    token stay whole. Return (sample, the ledger's reason for the loss); the sample is unchanged if that is impossible."""

    def fitting(messages: Sequence[Message]) -> _Sample | None:
        try:
            samples = template.samples(replace(dialogue, messages=tuple(messages)), section.learn, section.thinking)
        except RowRejected:
            return None
        pieces = encoder.encode([samples[0].spans])[0]
        size = sum(len(piece.ids) for piece in pieces)
        return sample._replace(pieces=pieces, size=size) if size <= section.max_length and len(samples) == 1 else None

    head = [message for message in dialogue.messages if message.role == "system"]
    turns = list(dialogue.messages[len(head) :])
    asks = [place for place, message in enumerate(turns) if message.role == "user"]
    for place in asks[1:]:
        if found := fitting([*head, *turns[place:]]):
            return found, "turns_dropped"
    if section.too_long != "cut_prompt" or not asks:
        return sample, "too_long"
    turns = turns[asks[-1] :]
    longest = max(range(len(turns)), key=lambda place: len(turns[place].content) * (turns[place].role != "assistant"))
    whole = turns[longest].content
    least, most = 0, len(whole)  # the longest beginning that fits lies in [least, most)
    best = None
    while most - least > 1:
        middle = (least + most) // 2
        turns[longest] = replace(turns[longest], content=whole[:middle])
        if found := fitting([*head, *turns]):
            best, least = found, middle
        else:
            most = middle
    return best or sample, "prompt_cut"


def encode_preferences(
    preferences: Iterable[Preference],
    template: Template,
    encoder: Encoder,
    section: Sft,
    paired: bool,
    ledger: Ledger,
    reject: Callable[[RejectedRow], None],
) -> Iterator[Batch]:
    """Yield the samples of the preferences, in batches: of a pair the chosen one, then the rejected one. Both are kept, or
    neither is. paired: reject answers with a label, which have no partner."""
    stream = iter(preferences)
    while chunk := list(islice(stream, BATCH)):
        dialogues = [dialogue for preference in chunk for dialogue in preference.dialogues]
        rendered = template.samples_of_each(dialogues, section.learn, section.thinking)
        encoded = iter(encoder.encode([each.spans for found in rendered if isinstance(found, list) for each in found]))
        kept: list[_Sample] = []
        number = 0
        for preference in chunk:
            samples, reason, rule = list[_Sample](), "", ""
            for place in range(number, number + len(preference.dialogues)):
                found = rendered[place]
                if isinstance(found, RowRejected):
                    reason, rule = found.reason, found.rule
                    continue
                for each in found:
                    pieces = next(encoded)
                    if any(piece.learn for piece in pieces):
                        size = sum(len(piece.ids) for piece in pieces)
                        samples.append(_Sample(place, pieces, each.learns_to_stop, size))
            number += len(preference.dialogues)
            size = sum(sample.size for sample in samples)
            ledger.enter(size)
            if not reason:
                reason, rule = _reason_unfit_preference(preference, samples, section.max_length, paired)
            if reason:
                ledger.lose(reason, size)
                reject(RejectedRow(preference.origin, reason, rule, preference.to_dict()))
            else:
                ledger.keep(size)
                kept += samples
        yield replace(_batch(kept, dialogues), rows=len(chunk))


def _reason_unfit_preference(
    preference: Preference, samples: list[_Sample], max_length: int, paired: bool
) -> tuple[str, str]:
    """Return (reason, rule) why a preference cannot be trained on: "" if it can."""
    if paired and not preference.is_pair:
        return "unpaired", _("this answer has a label and no partner; only `method: kto` learns from it")
    for sample in samples:
        if (unfit := _reason_unfit(sample, max_length))[0]:
            return unfit
    if len(samples) != len(preference.dialogues):
        return "answer_split", _("the template renders the turns of this answer apart from each other")
    if len({tuple(int(index) for index in _prompt_ids(sample)) for sample in samples}) > 1:
        return "prompts_differ", _("the template renders the prompt differently for the two answers")
    if preference.is_pair and _all_ids(samples[0]) == _all_ids(samples[1]):
        return "equal_answers", _("both answers have the same tokens")
    return "", ""


def _prompt_ids(sample: _Sample) -> list[int]:
    """Return the ids ahead of the first learned one."""
    ids: list[int] = []
    for piece in sample.pieces:
        if piece.learn:
            break
        ids += piece.ids
    return ids


def _all_ids(sample: _Sample) -> list[int]:
    return [int(index) for piece in sample.pieces for index in piece.ids]


def encode_documents(
    documents: Iterable[Document],
    encoder: Encoder,
    end: int,
    max_length: int,
    ledger: Ledger,
    window_bytes: int = 1 << 22,
    arrangement: str = "apart",
) -> Iterator[Batch]:
    """Yield samples of plain text, all learned: the tokenizer's prefix, the text, the end-of-text token, each once.
    Batches of about window_bytes limit the memory.

    apart:        a document longer than max_length becomes several samples of about the same length
    concatenated: the documents of a batch end to end, split in the same way; no token is lost
    blocks:       the same, split at every max_length-th token; the rest of a batch is dropped, and counted
    """
    stream = iter(documents)
    while True:
        with _without_gc():
            chunk = list(_window(stream, window_bytes))
            if not chunk:
                return
            texts = [
                _with_ends(ids, encoder, end) for ids in encoder.encode_texts([document.text for document in chunk])
            ]
            sizes = [len(ids) for ids in texts]
            ledger.enter(sum(sizes), items=len(texts))
            samples = (
                _one_by_one(texts, max_length)
                if arrangement == "apart"
                else _concatenated(texts, max_length, arrangement)
            )
            kept = sum(sample.size for sample in samples)
            # The end of a batch is dropped; a document is lost when all its tokens are.
            lost = sum(begin >= kept for begin in np.cumsum([0, *sizes[:-1]])) if arrangement == "blocks" else 0
            ledger.keep(kept, items=len(texts) - int(lost))
            if sum(sizes) > kept:
                ledger.lose("block_remainder", sum(sizes) - kept, items=int(lost))
            batch = _batch(samples, chunk)
        yield batch


def _with_ends(ids: Ids, encoder: Encoder, end: int) -> np.ndarray:
    """Return a document's ids with prefix and end token, each once, also if the text already contains them."""
    pieces = encoder.with_prefix([Piece(ids, learn=True)]) if encoder.prefix else [Piece(ids, learn=True)]
    whole = np.concatenate([np.asarray(piece.ids, np.uint32) for piece in pieces])
    return whole if len(whole) > 1 and whole[-1] == end else np.append(whole, np.uint32(end))


def _one_by_one(texts: list[np.ndarray], max_length: int) -> list[_Sample]:
    return [
        _Sample(number, [Piece(part, learn=True)], last, len(part))
        for number, ids in enumerate(texts)
        for part, last in _split_evenly(ids, max_length)
    ]


def _split_evenly(ids: np.ndarray, max_length: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield (piece, whether it is the last): as few pieces as possible, of about equal length. A last piece of one token
    would have no context to predict it from."""
    parts = np.array_split(ids, -(-len(ids) // max_length))
    yield from zip(parts, [False] * (len(parts) - 1) + [True], strict=True)


def _concatenated(texts: list[np.ndarray], max_length: int, arrangement: str) -> list[_Sample]:
    """Return samples across documents. Each belongs to the document in which it begins; `stop` if a document ends in it."""
    flow, ends = np.concatenate(texts), np.cumsum([len(ids) for ids in texts])
    if arrangement == "blocks":
        parts = [flow[begin : begin + max_length] for begin in range(0, len(flow) - max_length + 1, max_length)]
    else:
        parts = [part for part, _ in _split_evenly(flow, max_length)]
    borders = np.cumsum([0, *[len(part) for part in parts]])
    firsts = np.searchsorted(ends, borders[:-1], side="right")
    ended = np.searchsorted(ends, borders, side="right")
    return [
        _Sample(int(first), [Piece(part, learn=True)], bool(after > before), len(part))
        for part, first, before, after in zip(parts, firsts, ended[:-1], ended[1:], strict=True)
    ]


def _window(stream: Iterator[Document], size: int) -> Iterator[Document]:
    while size > 0 and (document := next(stream, None)) is not None:
        size -= len(document.text.encode("utf-8", "surrogatepass"))
        yield document


def _batch(samples: list[_Sample], chunk: Sequence[Dialogue | Document]) -> Batch:
    pieces = [piece for sample in samples for piece in sample.pieces]
    lengths = [len(piece.ids) for piece in pieces]
    parts = [piece.ids for piece in pieces]
    if all(part.__class__ is np.ndarray for part in parts):
        ids = np.concatenate([np.zeros(0, np.uint32), *parts])
    else:
        ids = np.fromiter(chain.from_iterable(parts), np.uint32, sum(lengths))
    sizes = np.array([sample.size for sample in samples], np.int64)
    ends = np.cumsum(sizes)
    learn = np.repeat(np.array([piece.learn for piece in pieces], bool), lengths)
    learn[(ends - sizes)[sizes > 0]] = False  # the first token has no context, so it cannot be a target
    answer = np.repeat(np.array([piece.answer for piece in pieces], bool), lengths)
    return Batch(
        ids,
        ends,
        spans_of(learn),
        np.array([sample.stop for sample in samples], bool),
        [chunk[sample.dialogue].origin for sample in samples],
        len(chunk),
        int(answer.sum()),
        int((answer & learn).sum()),
    )


def check_store(store: TokenStore, section: Sft, rejected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the statistics of the mask over all samples. rejected: the rows of rejected.jsonl. Raises DataError when no
    sample is left, or too few samples learn their stop token."""
    if not len(store):
        too_long = sum(bad["reason"] == "too_long" for bad in rejected)
        first = rejected[0] if rejected else None
        raise DataError(
            (
                _(
                    "no sample is left to train on ({too_long} of {count} are longer than max_length {max_length})"
                ).format(too_long=too_long, count=len(rejected), max_length=section.max_length)
                + (_("; the first: {rule}").format(rule=first["rule"]) if first else "")
            ),
            place=f"{first['file']}:{first['row']}" if first else "sft",
            remedy=_("; ").join(dict.fromkeys(_remedy(bad["reason"]) for bad in rejected))
            or _("shorten the samples, or raise sft.max_length"),
        )
    stops = float(np.mean(store.stops))
    if stops < section.min_stop_learned:
        raise DataError(
            _(
                "only {stops:.1%} of the samples learn their stop token; the model would not learn to end its answers"
            ).format(stops=stops),
            place="sft.learn",
            remedy="sft: {learn: assistant}" + _(", or lower sft.min_stop_learned"),
        )
    return describe(store)


def _remedy(reason: str) -> str:
    """Return what can be done about rows that are refused for this reason."""
    if reason == "too_long":
        return _("raise sft.max_length, or shorten the samples (sft.too_long: drop_turns or cut_prompt)")
    if reason in OF_TEMPLATE:
        return _(
            "choose an `sft.template` that renders such rows: chatml, or plain where the tokenizer lacks its tokens"
        )
    if reason == "no_thinking":
        return "sft: {thinking: mixed}"
    return _("mend these rows, or leave them out")


def describe(store: TokenStore) -> dict[str, Any]:
    """Return counts of tokens and learned tokens, and the lengths of the samples."""
    tokens, learned = len(store.ids), store.learned_tokens
    answers, learned_answers = store.roles
    return {
        "tokens": tokens,
        "learned_tokens": learned,
        "learned_share": round(learned / tokens, 6),
        "roles": {
            "assistant": {"tokens": answers, "learned": learned_answers},
            "prompt": {"tokens": tokens - answers, "learned": learned - learned_answers},
        },
        "samples": len(store),
        "stop_learned_share": round(float(np.mean(store.stops)), 6),
        "longest": int(store.lengths.max()),
        "mean_length": round(float(store.lengths.mean()), 2),
        "lengths": histogram(store.lengths),
    }


def histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Return (upper edge, number of samples in the bin); edges are powers of two."""
    edges = [16]
    while edges[-1] < int(lengths.max()):
        edges.append(2 * edges[-1])
    places = np.searchsorted(edges, lengths)
    return [(edge, int(count)) for edge, count in zip(edges, np.bincount(places, minlength=len(edges)), strict=True)]


def check_round_trip(
    records: Iterable[Any], count: int, render: Callable[[Any], Iterable[Sequence[Span]]], encoder: Encoder
) -> dict[str, int]:
    """Count the samples that do not decode to the rendered text, because the tokenizer lacks or changes characters. Prefix
    tokens and spaces are ignored. At most ROUND_TRIPS records are checked, evenly spread."""
    checked = differ = 0
    stream = islice(records, 0, None, max(1, -(-count // ROUND_TRIPS)))
    while chunk := list(islice(stream, BATCH)):
        samples = [spans for record in chunk for spans in render(record)]
        encoded = encoder.encode(samples)
        ids = [[int(index) for piece in pieces for index in piece.ids] for pieces in encoded]
        for spans, text in zip(samples, encoder.backend.decode_batch(ids, skip_special_tokens=False), strict=True):
            checked += 1
            differ += "".join("".join(span.text for span in spans).split()) not in "".join(text.split())
    return {"checked": checked, "differ": differ}


def token_bytes(tokenizer: Any) -> np.ndarray:
    """Return (V,) int32: the number of UTF-8 bytes of each token, from the raw token; special tokens count 0.

    Byte-level BPE writes one character per byte; SentencePiece writes U+2581 for a space and <0xNN> for a byte.
    """
    pieces: dict[str, int] = tokenizer.get_vocab()
    sizes = np.zeros(max(pieces.values()) + 1, dtype=np.int32)
    special = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    written = getattr(tokenizer, "written", {})  # texts of ChatGLM's pieces with other names: line ends, runs of spaces
    special |= {index for index, token in added.items() if token.special}
    sentencepiece = any(piece.startswith("\u2581") for piece in pieces) and "Ġ" not in pieces
    for piece, index in pieces.items():
        if index in special:
            continue
        if piece in written:
            sizes[index] = len(written[piece])
        elif index in added:
            sizes[index] = len(str(added[index].content).encode())
        elif sentencepiece:
            is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
            sizes[index] = 1 if is_byte else len(piece.replace("\u2581", " ").encode())
        else:
            sizes[index] = len(piece)
    return sizes
