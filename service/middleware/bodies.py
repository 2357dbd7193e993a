"""Limit the time in which a request's body must arrive, and the memory of all bodies together.

The size of one body is limited by FastAPI itself (``max_body_size`` on the app and on each route), which counts the bytes that
are read, so that a missing or wrong ``Content-Length`` makes no difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.limits import BODY_MIN_BYTES_PER_SECOND, BODY_SILENCE_SECONDS, MAX_BUFFERED_BYTES, SEND_SECONDS


class BufferedBodies:
    """Counts the bytes of all bodies that are being read into memory.

    If they exceed the limit, the largest body is aborted. Thus a few clients with large bodies cannot block the many with small
    ones.
    """

    def __init__(self, max_bytes: int = MAX_BUFFERED_BYTES) -> None:
        self.max_bytes = max_bytes
        self.total_bytes = 0
        self._bodies: set[_Body] = set()

    def add(self, body: _Body, n_bytes: int) -> None:
        """Count further bytes of a body; abort the largest bodies while the limit is exceeded."""
        self._bodies.add(body)
        body.buffered_bytes += n_bytes
        self.total_bytes += n_bytes
        while self.total_bytes > self.max_bytes:
            largest = max(self._bodies, key=lambda one: one.buffered_bytes)
            self.release(largest)
            largest.give_up()

    @property
    def has_room(self) -> bool:
        """Whether less than three quarters of the memory for bodies is used."""
        return 4 * self.total_bytes < 3 * self.max_bytes

    def release(self, body: _Body) -> None:
        """Stop counting a body."""
        self._bodies.discard(body)
        self.total_bytes -= body.buffered_bytes
        body.buffered_bytes = 0


class _Body:
    """One body that is being received."""

    def __init__(self) -> None:
        self.buffered_bytes = 0
        self.given_up = False
        self.waiting: asyncio.Timeout | None = None

    def give_up(self) -> None:
        self.given_up = True
        if self.waiting is not None:
            self.waiting.reschedule(0.0)


class BodyLimits:
    """Aborts bodies that arrive too slowly or for which there is no memory, and connections whose client does not read.

    A body must arrive at a minimum rate on average. A body that was faster may pause for at most `silence_seconds`.

    Args:
        streams_to_disk: whether the body of a request (by method and path) is streamed to disk and so uses no memory.
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
            if complete:  # from now on the app waits for a disconnect, which has no time limit
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
