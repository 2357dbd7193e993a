"""Refuse requests that a web page of another site makes a browser send (DNS rebinding and cross-site requests).

A server without keys on this machine could be reached by every page that its user opens. Three checks prevent this: the ``Host``
header must be one of the server's own names (with DNS rebinding a page points its own name to 127.0.0.1); a request that the
browser marks as coming from another site (``Sec-Fetch-Site``) is refused; and so is one whose ``Origin`` is not the server's.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.limits import HEALTH_CHECKS
from service.problems import problem

_READING = ("GET", "HEAD", "OPTIONS")
_FOREIGN = ("cross-site", "same-site")  # same-site is another port or subdomain, possibly of another owner


class HostAndOriginCheck:
    """Responds with 400 to an unknown host name and with 403 to a request from a page of another origin.

    Args:
        allowed_hosts: the names of this server, without port.
        allowed_origins: origins such as ``https://app.example`` whose pages may use this server; by default none.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: tuple[str, ...], allowed_origins: tuple[str, ...] = ()) -> None:
        self.app = app
        self.allowed_hosts = frozenset(name.lower() for name in allowed_hosts)
        self.allowed_origins = frozenset(origin.lower() for origin in allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in HEALTH_CHECKS:
            headers = Headers(scope=scope)
            host = headers.get("host", "")
            if len(headers.getlist("host")) > 1 or not self._is_own(host):
                answer = problem(
                    scope,
                    400,
                    f"This server does not answer to the host name {host[:100]!r}. Names are allowed with FINETUNE_ALLOWED_HOSTS",
                    code="host_not_allowed",
                )
                return await answer(scope, receive, send)
            if (where := self._foreign_page(scope["method"], headers, host)) is not None:
                answer = problem(
                    scope,
                    403,
                    f"Requests from {where} are not accepted. Origins are allowed with FINETUNE_CORS_ORIGINS",
                    code="origin_not_allowed",
                )
                return await answer(scope, receive, send)
        return await self.app(scope, receive, send)

    def _foreign_page(self, method: str, headers: Headers, host: str) -> str | None:
        """Return the description of the page that sent the request, if that page may not send it; else None."""
        origin = headers.get("origin")
        if origin is not None and origin.lower() in self.allowed_origins:
            return None
        site = headers.get("sec-fetch-site", "").lower()
        follows_a_link = method in ("GET", "HEAD") and headers.get("sec-fetch-mode", "").lower() == "navigate"
        if site in _FOREIGN and not follows_a_link:
            return f"pages of {origin[:100]!r}" if origin else "pages of another site"
        if origin is not None and method not in _READING and urlsplit(origin).netloc.lower() != host.lower():
            return f"pages of {origin[:100]!r}"
        return None

    def _is_own(self, host: str) -> bool:
        name, _, port = host.lower().rpartition(":")
        return (name if name and port.isdecimal() else host.lower()) in self.allowed_hosts
