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

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        super().__init__()


class ClientDisconnected(Exception):
    """Nobody waits for this answer any more."""


@dataclass
class QueuedResponse(Generic[Item]):
    """An answer on its way: its pieces, and the tokens that were heard so far."""

    pieces: asyncio.Queue[Item | Exception | None] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)
    gone: bool = False
    turn: Future[float] | None = None

    def hear(self, index: int) -> None:
        if self.gone:
            raise ClientDisconnected
        self.tokens.append(index)

    def leave(self) -> None:
        """Nobody reads on: a place in the line is free at once, the voice at its next token."""
        self.gone = True
        if self.turn is not None:
            self.turn.cancel()

    async def __aiter__(self) -> AsyncIterator[Item]:
        while (piece := await self.pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece


class RequestQueue:
    """places: how many may wait behind the one who is being answered."""

    def __init__(self, places: int) -> None:
        self.places, self.inside = places, 0
        self.voice = ThreadPoolExecutor(1, "voice")
        self.usual_seconds = 1.0

    def ask(self, work: Work[Item]) -> QueuedResponse[Item]:
        """Take a place in the line; `leave` gives it back. Raises Busy when there is none."""
        if self.inside > self.places:
            raise QueueFull(max(1, round(self.usual_seconds * self.inside)))
        loop = asyncio.get_running_loop()
        answer: QueuedResponse[Item] = QueuedResponse()
        self.inside += 1
        answer.turn = self.voice.submit(self._speak, work, answer, loop)
        answer.turn.add_done_callback(lambda turn: loop.call_soon_threadsafe(self._leave, turn))
        return answer

    def _speak(self, work: Work[Item], answer: QueuedResponse[Item], loop: asyncio.AbstractEventLoop) -> float:
        """In the voice's thread: hand over the pieces, then None or what went wrong. Returns the seconds it took."""

        def hand_over(item: Item | Exception | None) -> None:
            loop.call_soon_threadsafe(answer.pieces.put_nowait, item)

        began = time.monotonic()
        try:
            for piece in work(answer.hear):
                hand_over(piece)
            hand_over(None)
        except Exception as error:
            hand_over(error.with_traceback(None))  # whose frames hold the tensors of the answer
        return time.monotonic() - began

    def _leave(self, turn: Future[float]) -> None:
        self.inside -= 1
        if not turn.cancelled():
            self.usual_seconds += (turn.result() - self.usual_seconds) / 8
