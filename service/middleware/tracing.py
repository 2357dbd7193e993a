"""Record one tracing span per request, if OpenTelemetry is configured (`finetune.runtime.tracing`)."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.runtime.tracing import Tracing
from service.limits import HEALTH_CHECKS
from service.metrics import METHODS, UNMATCHED


class TracingMiddleware:
    """Stores the span in ``scope["state"]["span"]``, so that handlers can add child spans."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app, self.tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in HEALTH_CHECKS:
            return await self.app(scope, receive, send)
        method = scope["method"] if scope["method"] in METHODS else "other"
        span = self.tracing.begin(method, Headers(scope=scope))
        state = scope.setdefault("state", {})
        state["span"] = span

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            route = getattr(scope.get("route"), "path", UNMATCHED)
            span.update_name(f"{method} {route}")
            span.set_attributes({"http.request.method": method, "http.route": route, "finetune.request_id": state["request_id"]})
            span.end()
        return None
