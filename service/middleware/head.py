"""Answer HEAD requests like GET requests, without the body."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS_ONLY = "headers_only"
"""Key of ``scope["state"]`` that is true for a HEAD request, for routes that would work long for a body that is not sent."""


class _BodyNotWanted(BaseException):
    """Ends a response after its headers. It is not an `Exception`, so that no handler in between treats it as a failure."""


class HeadAsGet:
    """Passes a HEAD request to the app as GET. The server that sends the response leaves out the body.

    A body that comes in pieces ends with the first of them. The ``Accept`` header is removed, so that no stream of events is
    begun, which would never end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)
        headers = [(name, value) for name, value in scope["headers"] if name != b"accept"]
        scope.setdefault("state", {})[HEADERS_ONLY] = True
        as_get = {**scope, "method": "GET", "headers": headers}

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.body" and message.get("more_body", False):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                raise _BodyNotWanted
            await send(message)

        try:
            return await self.app(as_get, receive, send_headers)
        except _BodyNotWanted:
            return None
        finally:
            if "route" in as_get:  # for the metrics
                scope["route"] = as_get["route"]
