"""A queue for one model: requests are answered one after the other, and only a limited number may wait.

Answers are generated in a thread of the queue and passed on piece by piece, so a slow reader delays nobody. A client that
has disconnected is noticed at the next token.
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
"""(callback for each new token) -> the pieces of an answer"""


class QueueFull(Exception):
    """The queue is full. retry_after: seconds after which to try again."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__()


class ClientDisconnected(Exception):
    """The client no longer waits for this answer."""


@dataclass
class QueuedResponse(Generic[Item]):
    """An answer in progress: its pieces, and its tokens so far."""

    pieces: asyncio.Queue[Item | Exception | None] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    future: Future[float] | None = None

    def on_token(self, index: int) -> None:
        if self.cancelled:
            raise ClientDisconnected
        self.tokens.append(index)

    def cancel(self) -> None:
        """Give the answer up: a waiting one leaves the queue at once, a running one stops at its next token."""
        self.cancelled = True
        if self.future is not None:
            self.future.cancel()

    async def __aiter__(self) -> AsyncIterator[Item]:
        while (piece := await self.pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece


class RequestQueue:
    """Runs requests one at a time. max_waiting: requests that may wait behind the one in progress."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting, self.pending = max_waiting, 0
        self.executor = ThreadPoolExecutor(1, "generate")
        self.mean_seconds = 1.0

    def submit(self, work: Work[Item]) -> QueuedResponse[Item]:
        """Enqueue a request; its `cancel` gives the place back. Raises QueueFull."""
        if self.pending > self.max_waiting:
            raise QueueFull(max(1, round(self.mean_seconds * self.pending)))
        loop = asyncio.get_running_loop()
        answer: QueuedResponse[Item] = QueuedResponse()
        self.pending += 1
        answer.future = self.executor.submit(self._run, work, answer, loop)
        answer.future.add_done_callback(lambda future: loop.call_soon_threadsafe(self._on_done, future))
        return answer

    def _run(self, work: Work[Item], answer: QueuedResponse[Item], loop: asyncio.AbstractEventLoop) -> float:
        """Pass on the pieces, then None or the exception, and return the seconds. Runs in the queue's thread."""

        def put(item: Item | Exception | None) -> None:
            loop.call_soon_threadsafe(answer.pieces.put_nowait, item)

        start = time.monotonic()
        try:
            for piece in work(answer.on_token):
                put(piece)
            put(None)
        except Exception as error:
            put(error.with_traceback(None))  # the traceback's frames hold the tensors of the answer
        return time.monotonic() - start

    def _on_done(self, future: Future[float]) -> None:
        self.pending -= 1
        if not future.cancelled():
            self.mean_seconds += (future.result() - self.mean_seconds) / 8
