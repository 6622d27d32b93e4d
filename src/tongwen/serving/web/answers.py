"""Answers as server-sent events: a few at the same time, a few more that wait."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from starlette.responses import StreamingResponse

from tongwen.core.i18n import use_language
from tongwen.serving.web.backend import CONCURRENCY
from tongwen.serving.web.conversation import StreamedAnswer

WAITING = 16  # questions that may wait; further ones are refused


class Answers:
    """The threads that answer, for one language."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.threads = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix=f"answers-{language}")
        self.asked = 0

    @property
    def full(self) -> bool:
        return self.asked >= CONCURRENCY + WAITING

    def respond(self, answer: StreamedAnswer) -> StreamingResponse:
        """Return the events of an answer. It takes its place in the line at once."""
        self.asked += 1
        loop, queue, stopped = asyncio.get_running_loop(), asyncio.Queue[str | None](), threading.Event()
        self.threads.submit(self._produce, answer, stopped, loop, queue.put_nowait, self._leave)
        return _Events(_events(answer, queue, self.language), stopped)

    def _leave(self) -> None:
        self.asked -= 1

    def _produce(
        self,
        answer: StreamedAnswer,
        stopped: threading.Event,
        loop: asyncio.AbstractEventLoop,
        put: Callable[[str | None], None],
        leave: Callable[[], None],
    ) -> None:
        with suppress(RuntimeError), use_language(self.language):  # the loop is closed when the server has ended
            try:
                pieces = answer.pieces()
                while not stopped.is_set() and (piece := next(pieces, None)) is not None:
                    loop.call_soon_threadsafe(put, piece)
                pieces.close()
            finally:
                loop.call_soon_threadsafe(put, None)
                loop.call_soon_threadsafe(leave)


class _Events(StreamingResponse):
    """Events that tell their source when the visitor has gone."""

    def __init__(self, events: AsyncIterator[str], stopped: threading.Event) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.stopped = stopped

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self.stopped.set()


async def _events(answer: StreamedAnswer, queue: asyncio.Queue[str | None], language: str) -> AsyncIterator[str]:
    finished = False
    while not finished:
        pieces = [await queue.get()]
        while not queue.empty():
            pieces.append(queue.get_nowait())
        finished = None in pieces
        text = "".join(piece for piece in pieces if piece)
        if text:
            yield _event({"text": text})
    with use_language(language):
        yield _event({"pace": answer.pace, "problem": answer.problem})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
