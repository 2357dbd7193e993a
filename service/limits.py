"""What one request may cost, and who may ask: host names, the pace of a body, predictions at the same time.

The size of a body is counted by FastAPI itself (``max_body_size`` on the app and on each route) as bytes are read, so a missing
or lying ``Content-Length`` changes nothing. Knows ASGI; does not know models.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.errors import Overloaded
from service.problems import problem

T = TypeVar("T")

KIB = 1024
MAX_JSON_BYTES = 1024 * KIB  # every body that no route gives more room
MULTIPART_OVERHEAD_BYTES = 64 * KIB  # boundaries, part headers and the small fields beside an image
BODY_GRACE_SECONDS = 20.0
BODY_MIN_BYTES_PER_SECOND = 4 * KIB
PROBES = ("/livez", "/readyz")  # asked by address by whatever runs the container


class HostAllowList:
    """Answers only to its own names, so that a web page cannot reach a local server through a name it controls (DNS rebinding),
    nor make a browser post to it from elsewhere. There are no CORS headers at all."""

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self.app = app
        self.allowed = frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if not self._allows(host):
                answer = problem(
                    scope,
                    400,
                    f"This server does not answer to the host name {host[:100]!r}. Names are allowed with FINETUNE_ALLOWED_HOSTS",
                    code="host_not_allowed",
                )
                return await answer(scope, receive, send)
            if origin is not None and scope["method"] not in ("GET", "HEAD") and not self._allows(urlsplit(origin).netloc):
                answer = problem(scope, 403, f"Requests from pages of {origin[:100]!r} are not taken", code="origin_not_allowed")
                return await answer(scope, receive, send)
        return await self.app(scope, receive, send)

    def _allows(self, host: str) -> bool:
        name, _, port = host.lower().rpartition(":")
        return (name if name and port.isdecimal() else host.lower()) in self.allowed


class BodyPace:
    """Cuts off a body that comes in too slowly: after a grace it must have kept a minimum rate on average."""

    def __init__(
        self, app: ASGIApp, grace_seconds: float = BODY_GRACE_SECONDS, min_bytes_per_second: float = BODY_MIN_BYTES_PER_SECOND
    ) -> None:
        self.app = app
        self.grace_seconds = grace_seconds
        self.min_bytes_per_second = min_bytes_per_second

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.grace_seconds
        finished = False

        async def paced() -> Message:
            nonlocal deadline, finished
            if finished:  # waiting for a disconnect is allowed to take as long as the answer takes
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "The body came in too slowly") from None
            deadline += len(message.get("body", b"")) / self.min_bytes_per_second
            finished = not message.get("more_body", False)
            return message

        return await self.app(scope, paced, send)


class Slots:
    """`threads` pieces of work run at once, `waiting` more stand in line, and the next is refused at once.

    One ONNX Runtime call runs on one core, so more threads than cores would only make every answer slower.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self.capacity = threads + waiting
        self.taken = 0
        self._limiter = anyio.CapacityLimiter(threads)

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """Raises `Overloaded` when the line is full."""
        if self.taken >= self.capacity:
            raise Overloaded(f"{self.taken} predictions are already running or waiting. Try again in a moment")
        self.taken += 1
        try:
            return await anyio.to_thread.run_sync(functools.partial(work, *args), limiter=self._limiter)
        finally:
            self.taken -= 1
