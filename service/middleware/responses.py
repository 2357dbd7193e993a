"""The outermost middleware: adds a request id and security headers to every response, converts errors to problem documents, and
writes access log and metrics.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.runtime.logs import shown, without_secrets
from service.limits import HEALTH_CHECKS
from service.metrics import UNMATCHED, Metrics
from service.problems import INTERNAL_DETAIL, MEDIA_TYPE, REQUEST_ID_HEADER, detail_of, problem

log = logging.getLogger("service.access")

ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
MAX_REWRITTEN_BYTES = 64 * 1024
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class ResponseMiddleware:
    """Adds request id and security headers, converts errors to problem documents, and records each response."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(scope, receive, send, request_id)
        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, answer.send)
        except Exception:
            log.exception("%s %s %s failed", request_id, shown(scope["method"]), shown(quote(scope["path"])))
            await answer.fail()
        finally:
            seconds = time.perf_counter() - started
            self.metrics.in_flight.dec()
            self.metrics.answered(_route(scope), scope["method"], answer.status, seconds)
            level = logging.DEBUG if scope["path"] in HEALTH_CHECKS else logging.INFO
            logged = (request_id, shown(scope["method"]), shown(quote(scope["path"])), answer.status, seconds * 1000)
            names = ("request_id", "method", "path", "status", "milliseconds")
            caller = scope["state"].get("caller")
            fields = {**dict(zip(names, logged, strict=True)), "owner": getattr(caller, "owner", None), "route": _route(scope)}
            log.log(level, "%s %s %s %d %.1f ms", *logged, extra={"fields": fields})
        return None


class _Answer:
    """One response being sent. An error that is not a problem document yet is held back and sent as one."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.status = 500
        self._scope = scope
        self._receive = receive
        self._send = send
        self._request_id = request_id
        self._started = False
        self._held: Message | None = None
        self._held_body = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status >= 400 and not Headers(raw=message["headers"]).get("content-type", "").startswith(MEDIA_TYPE):
                self._held = message
                return
            self._started = True
            self._add_headers(message)
        elif self._held is not None:
            self._held_body += message.get("body", b"")[: MAX_REWRITTEN_BYTES - len(self._held_body)]
            if not message.get("more_body", False):
                await self._send_as_problem(self._held)
            return
        await self._send(message)

    async def fail(self) -> None:
        """Send a problem document with status 500, unless a response has already begun."""
        if not self._started:
            await problem(self._scope, 500, INTERNAL_DETAIL)(self._scope, self._receive, self.send)

    async def _send_as_problem(self, start: Message) -> None:
        headers = Headers(raw=start["headers"])
        kept = {name: headers[name] for name in ("allow", "retry-after", "www-authenticate") if name in headers}
        detail = detail_of(self._scope, self.status, headers.get("content-type", ""), bytes(self._held_body))
        self._held = None
        await problem(self._scope, self.status, detail, headers=kept)(self._scope, self._receive, self.send)

    def _add_headers(self, start: Message) -> None:
        headers = MutableHeaders(scope=start)
        headers[REQUEST_ID_HEADER] = self._request_id
        headers.setdefault("Cache-Control", "no-store")
        for name, value in SECURITY_HEADERS.items():
            headers.setdefault(name, value)


def _request_id(headers: Headers) -> str:
    """Return the caller's own request id if it is safe for a log line and holds no API key, else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    is_safe = ACCEPTED_ID.fullmatch(given) and without_secrets(given) == given
    return given if is_safe else f"req_{uuid.uuid4().hex}"


def _route(scope: Scope) -> str:
    """Return the template of the matched route, which the router stores in the scope."""
    return getattr(scope.get("route"), "path", UNMATCHED)
