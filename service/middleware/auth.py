"""Authentication and authorisation by bearer API keys with scopes.

A server without any key accepts all requests from this machine and no others. Once there is a key, every route needs one, except
the health checks and the page's static files, which contain no data.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn
from urllib.parse import quote

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from finetune.errors import FinetuneError
from finetune.jobs.job import LOCAL_OWNER
from finetune.jobs.keys import KeyStore
from finetune.runtime.logs import shown
from service.limits import HEALTH_CHECKS
from service.problems import problem

log = logging.getLogger(__name__)

SHELL = ("/", "/static/")  # the page and its files, which a browser loads before a key can be entered
KeyScope = Literal["predict", "jobs", "metrics", "admin"]
CHALLENGE = 'Bearer realm="finetune"'


@dataclass(frozen=True)
class Caller:
    """The sender of a request. `sees` is the owner to which queries are restricted; None for all owners."""

    owner: str
    scopes: frozenset[str]
    key_id: str | None = None

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes

    @property
    def sees(self) -> str | None:
        return None if self.is_admin else self.owner

    def allows(self, scope: str) -> bool:
        """Return whether the caller has the scope, or the scope ``admin``."""
        return self.is_admin or scope in self.scopes


LOCAL = Caller(LOCAL_OWNER, frozenset({"predict", "jobs", "metrics", "admin"}))


class Authentication:
    """Sets ``scope["state"]["caller"]`` of a request, or responds with 401 before its body is read.

    An accepted key is cached for `remember_seconds`, and so is the absence of keys. Most predictions therefore need no database
    query and work during a short failure of the database. The time of use of a key is written in the background.
    """

    def __init__(self, app: ASGIApp, keys: Callable[[], KeyStore], remember_seconds: float = 2.0) -> None:
        self.app = app
        self._keys = keys
        self._remember_seconds = remember_seconds
        self._closed = False  # whether there is a key; keys are revoked but never deleted, so it stays True
        self._open_until = 0.0  # monotonic seconds
        self._accepted: dict[bytes, tuple[float, Caller]] = {}  # by sha256 of the key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]):
            return await self.app(scope, receive, send)
        caller = self._remembered(scope)
        if caller is None:
            try:
                caller = await run_in_threadpool(self._identify, scope)
            except FinetuneError as error:
                log.error("keys cannot be checked: %s", error)
                answer = problem(scope, error.http_status, KEYS_UNREACHABLE, code=error.code, headers={"Retry-After": "5"})
                return await answer(scope, receive, send)
            except HTTPException as error:
                answer = problem(scope, error.status_code, str(error.detail), headers=error.headers)
                return await answer(scope, receive, send)
        scope.setdefault("state", {})["caller"] = caller
        return await self.app(scope, receive, send)

    def _remembered(self, scope: Scope) -> Caller | None:
        """Return the caller from the cache, if possible."""
        now = time.monotonic()
        if not self._closed:
            return LOCAL if now < self._open_until and _is_loopback(scope) else None
        secret = _secret(scope)
        if secret is None:
            return None
        until, caller = self._accepted.get(hashlib.sha256(secret.encode()).digest(), (0.0, None))
        return caller if now < until else None

    def _identify(self, scope: Scope) -> Caller:
        keys = self._keys()
        if not self._closed:
            if not keys.any():
                self._open_until = time.monotonic() + min(1.0, self._remember_seconds)
                return LOCAL if _is_loopback(scope) else _unauthorized(NO_KEY_YET)
            self._closed = True
        secret = _secret(scope)
        if secret is None:
            _unauthorized(SEND_A_KEY)
        key = keys.verify(secret)
        if key is None:
            log.warning("a request to %s had a key that is unknown, expired or revoked", shown(quote(scope["path"])))
            _unauthorized(BAD_KEY, f'{CHALLENGE}, error="invalid_token"')
        caller = Caller(key.owner, key.scopes, key.id)
        self._remember(secret, caller, key.expires_at)
        return caller

    def _remember(self, secret: str, caller: Caller, expires_at: float | None) -> None:
        seconds = self._remember_seconds if expires_at is None else min(self._remember_seconds, expires_at - time.time())
        if len(self._accepted) >= _MAX_REMEMBERED:
            self._accepted.clear()
        self._accepted[hashlib.sha256(secret.encode()).digest()] = (time.monotonic() + seconds, caller)


def _secret(scope: Scope) -> str | None:
    """Return the bearer key of a request; None if there is none or more than one."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return None
    scheme, _, secret = given[0].decode("latin-1").partition(" ")
    return secret.strip() or None if scheme.lower() == "bearer" else None


_MAX_REMEMBERED = 10_000
KEYS_UNREACHABLE = "The server cannot check API keys now. Try again in a moment; its log has the cause"
SEND_A_KEY = (
    "This server requires an API key in the header 'Authorization: Bearer ft_…'. The operator creates one: finetune keys create"
)
BAD_KEY = "The API key is unknown, has expired or was revoked"
NO_KEY_YET = (
    "Other machines can reach this address, but this server has no API key yet. The operator creates one: finetune keys create"
)


def _unauthorized(detail: str, challenge: str = CHALLENGE) -> NoReturn:
    raise HTTPException(401, detail, headers={"WWW-Authenticate": challenge})


def _is_open(path: str) -> bool:
    page, files = SHELL
    return path in HEALTH_CHECKS or path == page or path.startswith(files)


def _is_loopback(scope: Scope) -> bool:
    """Return whether the request arrived on a loopback address."""
    host = (scope.get("server") or ("", 0))[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def caller(request: Request) -> Caller:
    """Return the caller that `Authentication` stored in the request."""
    found: Caller = request.state.caller
    return found


AnyCaller = Annotated[Caller, Depends(caller)]


def caller_with(request: Request, scope: KeyScope) -> Caller:
    """Return the caller of a request. Raises `HTTPException` 403 unless their key has `scope` (or admin)."""
    found: Caller = request.state.caller
    if not found.allows(scope):
        _forbid(found, (scope,))
    return found


def _forbid(caller: Caller, scopes: tuple[KeyScope, ...]) -> NoReturn:
    wanted = " or ".join(repr(scope) for scope in scopes)
    raise HTTPException(
        403,
        f"This key has the scopes {', '.join(sorted(caller.scopes))}; this request needs {wanted}",
        headers={"WWW-Authenticate": f'{CHALLENGE}, error="insufficient_scope"'},
    )


def needs(*scopes: KeyScope) -> Callable[[Caller], Awaitable[Caller]]:
    """Return a FastAPI dependency for the caller, which raises 403 unless the key has one of `scopes` (or admin)."""

    async def allowed(caller: AnyCaller) -> Caller:
        if not any(caller.allows(scope) for scope in scopes):
            _forbid(caller, scopes)
        return caller

    return allowed


Submitting = Annotated[Caller, Depends(needs("jobs"))]
Reading = Annotated[Caller, Depends(needs("predict", "jobs"))]
Administering = Annotated[Caller, Depends(needs("admin"))]
Measuring = Annotated[Caller, Depends(needs("metrics"))]
