"""Answer HEAD requests like GET requests, without the body."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class HeadAsGet:
    """Passes a HEAD request to the app as GET. The server that sends the response leaves out the body.

    The ``Accept`` header is removed, so that no stream of events is begun, which would not end by itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)
        headers = [(name, value) for name, value in scope["headers"] if name != b"accept"]
        as_get = {**scope, "method": "GET", "headers": headers}
        try:
            return await self.app(as_get, receive, send)
        finally:
            if "route" in as_get:  # for the metrics
                scope["route"] = as_get["route"]
