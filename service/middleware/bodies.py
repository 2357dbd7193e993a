"""Bound what the bodies of all requests cost: how long one may take, and how much memory all of them hold together.

The size of one body is bounded by FastAPI itself (``max_body_size`` on the app and on each route), which counts bytes as they are
read, so a missing or wrong ``Content-Length`` changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.limits import BODY_MIN_BYTES_PER_SECOND, BODY_SILENCE_SECONDS, MAX_BUFFERED_BYTES, SEND_SECONDS


class BufferedBodies:
    """The bytes of all bodies that are being read into memory.

    When there is no room for the next bytes, the largest body of all is given up. So a few clients that hold large bodies cannot
    keep out the many that send small ones.
    """

    def __init__(self, max_bytes: int = MAX_BUFFERED_BYTES) -> None:
        self.max_bytes = max_bytes
        self.total_bytes = 0
        self._bodies: set[_Body] = set()

    def add(self, body: _Body, n_bytes: int) -> None:
        self._bodies.add(body)
        body.buffered_bytes += n_bytes
        self.total_bytes += n_bytes
        while self.total_bytes > self.max_bytes:
            largest = max(self._bodies, key=lambda one: one.buffered_bytes)
            self.release(largest)
            largest.give_up()

    @property
    def has_room(self) -> bool:
        """Whether less than three quarters are used."""
        return 4 * self.total_bytes < 3 * self.max_bytes

    def release(self, body: _Body) -> None:
        self._bodies.discard(body)
        self.total_bytes -= body.buffered_bytes
        body.buffered_bytes = 0


class _Body:
    """One body on its way in."""

    def __init__(self) -> None:
        self.buffered_bytes = 0
        self.given_up = False
        self.waiting: asyncio.Timeout | None = None

    def give_up(self) -> None:
        self.given_up = True
        if self.waiting is not None:
            self.waiting.reschedule(0.0)


class BodyLimits:
    """Cut off a body that arrives too slowly, one for which there is no memory, and a client that does not take in its answer.

    A body must keep up a minimum rate. Bytes that came faster buy time, but never more than `silence_seconds` of it.

    Args:
        streams_to_disk: whether a request's body is written to disk as it comes (by method and path), and so holds no memory.
    """

    def __init__(
        self,
        app: ASGIApp,
        buffered: BufferedBodies,
        streams_to_disk: Callable[[str, str], bool] = lambda method, path: False,
        *,
        silence_seconds: float = BODY_SILENCE_SECONDS,
        min_bytes_per_second: float = BODY_MIN_BYTES_PER_SECOND,
        send_seconds: float = SEND_SECONDS,
    ) -> None:
        self.app = app
        self.buffered = buffered
        self.streams_to_disk = streams_to_disk
        self.silence_seconds = silence_seconds
        self.min_bytes_per_second = min_bytes_per_second
        self.send_seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        clock = asyncio.get_running_loop().time
        body = _Body()
        counts = not self.streams_to_disk(scope["method"], scope["path"])
        deadline = clock() + self.silence_seconds
        complete = False

        async def limited_receive() -> Message:
            nonlocal deadline, complete
            if complete:  # waiting for a disconnect may take as long as the answer takes
                return await receive()
            try:
                async with asyncio.timeout_at(deadline) as body.waiting:
                    message = await receive()
            except TimeoutError:
                _refuse_given_up(body)
                raise HTTPException(408, "The body came in too slowly") from None
            received = len(message.get("body", b""))
            deadline = min(deadline + received / self.min_bytes_per_second, clock() + self.silence_seconds)
            complete = not message.get("more_body", False)
            if counts and received:
                self.buffered.add(body, received)
                _refuse_given_up(body)
            return message

        async def limited_send(message: Message) -> None:
            async with asyncio.timeout(self.send_seconds):
                await send(message)

        try:
            return await self.app(scope, limited_receive, limited_send)
        finally:
            self.buffered.release(body)


def _refuse_given_up(body: _Body) -> None:
    if body.given_up:
        raise HTTPException(503, "Too many large bodies are arriving at once. Try again in a moment", {"Retry-After": "1"})
