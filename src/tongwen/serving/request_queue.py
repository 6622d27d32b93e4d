"""One voice and the line before it: answers are given one after the other, and no more may wait than there are places.

An answer is made in the voice's own thread and handed over piece by piece, so a reader who is slow holds up nobody; one
who has gone is noticed at the next token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Work = Callable[[Callable[[int], None]], Iterator[Item]]
"""called with what hears each new token -> the pieces of an answer"""


class QueueFull(Exception):
    """All places are taken. seconds: when it is worth asking again."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__()


class ClientDisconnected(Exception):
    """Nobody waits for this answer any more."""


@dataclass
class QueuedResponse(Generic[Item]):
    """An answer on its way: its pieces, and the tokens that were heard so far."""

    pieces: asyncio.Queue[Item | Exception | None] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    future: Future[float] | None = None

    def on_token(self, index: int) -> None:
        if self.cancelled:
            raise ClientDisconnected
        self.tokens.append(index)

    def cancel(self) -> None:
        """Nobody reads on: a place in the line is free at once, the voice at its next token."""
        self.cancelled = True
        if self.future is not None:
            self.future.cancel()

    async def __aiter__(self) -> AsyncIterator[Item]:
        while (piece := await self.pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece


class RequestQueue:
    """places: how many may wait behind the one who is being answered."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting, self.pending = max_waiting, 0
        self.executor = ThreadPoolExecutor(1, "generate")
        self.mean_seconds = 1.0

    def submit(self, work: Work[Item]) -> QueuedResponse[Item]:
        """Take a place in the line; `leave` gives it back. Raises Busy when there is none."""
        if self.pending > self.max_waiting:
            raise QueueFull(max(1, round(self.mean_seconds * self.pending)))
        loop = asyncio.get_running_loop()
        answer: QueuedResponse[Item] = QueuedResponse()
        self.pending += 1
        answer.future = self.executor.submit(self._run, work, answer, loop)
        answer.future.add_done_callback(lambda future: loop.call_soon_threadsafe(self._on_done, future))
        return answer

    def _run(self, work: Work[Item], answer: QueuedResponse[Item], loop: asyncio.AbstractEventLoop) -> float:
        """In the voice's thread: hand over the pieces, then None or what went wrong. Returns the seconds it took."""

        def put(item: Item | Exception | None) -> None:
            loop.call_soon_threadsafe(answer.pieces.put_nowait, item)

        start = time.monotonic()
        try:
            for piece in work(answer.on_token):
                put(piece)
            put(None)
        except Exception as error:
            put(error.with_traceback(None))  # whose frames hold the tensors of the answer
        return time.monotonic() - start

    def _on_done(self, future: Future[float]) -> None:
        self.pending -= 1
        if not future.cancelled():
            self.mean_seconds += (future.result() - self.mean_seconds) / 8
