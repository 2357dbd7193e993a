"""Refuse predictions that would wait too long, before their bodies are read or parsed.

A refusal costs a few microseconds and is sent after a pause. Otherwise clients that retry at once would cause so many refusals
that these slow down the accepted requests.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from service.admission import OVERLOADED, WorkQueue
from service.middleware.bodies import BufferedBodies
from service.problems import problem

PAUSE_SECONDS = 0.5
MAX_PAUSING = 256  # more than these are refused at once


_SMALL_SHARE = 16  # a body below 1/16 of the memory for bodies is always accepted: larger ones are aborted for it


class OverloadRefusal:
    """Responds with 503 to predictions for which there is no room in the queue or in the memory for bodies."""

    def __init__(self, app: ASGIApp, queue: WorkQueue, buffered: BufferedBodies) -> None:
        self.app = app
        self.queue = queue
        self.buffered = buffered
        self._pausing = 0

    def _is_small(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        return given.isdigit() and int(given) * _SMALL_SHARE <= self.buffered.max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(("/predict", "/infer")):
            return await self.app(scope, receive, send)
        if self.queue.has_room and (self.buffered.has_room or self._is_small(scope)):
            return await self.app(scope, receive, send)
        if self._pausing < MAX_PAUSING:
            self._pausing += 1
            try:
                await asyncio.sleep(PAUSE_SECONDS)
            finally:
                self._pausing -= 1
        answer = problem(scope, 503, OVERLOADED.format(self.queue.taken), code="overloaded", headers={"Retry-After": "1"})
        return await answer(scope, receive, send)
