"""Refuse what a web page may not make a browser do: reach this server under a foreign name, or send it requests from another
site.

An open server on this machine can be reached by every page that its user has open. Three checks keep such pages out: the ``Host``
header must be one of the server's own names (a page can point its own name at 127.0.0.1: DNS rebinding), a request that a browser
marks as coming from another site (``Sec-Fetch-Site``) is refused, and so is one whose ``Origin`` is not the server's own.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.limits import PROBES
from service.problems import problem

_READING = ("GET", "HEAD", "OPTIONS")
_FOREIGN = ("cross-site", "same-site")  # same-site: another port or subdomain, which somebody else may run


class HostAndOriginCheck:
    """Answer 400 to a foreign host name and 403 to a request from a page of another origin.

    Args:
        allowed_hosts: the names of this server, without a port.
        allowed_origins: origins such as ``https://app.example`` whose pages may use this server; none by default.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: tuple[str, ...], allowed_origins: tuple[str, ...] = ()) -> None:
        self.app = app
        self.allowed_hosts = frozenset(name.lower() for name in allowed_hosts)
        self.allowed_origins = frozenset(origin.lower() for origin in allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
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
        """Return which page the request comes from, if it is a page that may not send it."""
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
