"""Who asks, and what they may: bearer API keys with scopes.

A server without any key is open to this machine alone; from the first key on, every route needs one, but for the probes and the
page's own shell, which holds no data. Knows keys and paths; does not know what a route does.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from finetune.errors import FinetuneError
from finetune.jobs.keys import KeyStore
from finetune.jobs.store import LOCAL_OWNER
from service.limits import PROBES
from service.problems import problem

log = logging.getLogger(__name__)

SHELL = ("/", "/static/")  # what a browser loads before anybody can type a key into it
KeyScope = Literal["predict", "jobs", "metrics", "admin"]
CHALLENGE = 'Bearer realm="finetune"'


@dataclass(frozen=True)
class Caller:
    """Who asks. `sees` is the owner that queries are narrowed to; None sees everybody's."""

    owner: str
    scopes: frozenset[str]

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes

    @property
    def sees(self) -> str | None:
        return None if self.is_admin else self.owner

    def allows(self, scope: str) -> bool:
        return self.is_admin or scope in self.scopes


LOCAL = Caller(LOCAL_OWNER, frozenset({"predict", "jobs", "metrics", "admin"}))


class Authentication:
    """Lets a request in with its `Caller` in ``scope["state"]["caller"]``, or answers 401 before anything reads its body."""

    def __init__(self, app: ASGIApp, keys: Callable[[], KeyStore]) -> None:
        self.app = app
        self._keys = keys
        self._closed = threading.Event()  # there is a key: keys are revoked but never forgotten, so this is for good

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]):
            return await self.app(scope, receive, send)
        try:
            caller = await run_in_threadpool(self._identify, scope)
        except FinetuneError as error:
            answer = problem(scope, error.http_status, error.message, code=error.code)
            return await answer(scope, receive, send)
        except HTTPException as error:
            answer = problem(scope, error.status_code, str(error.detail), headers=error.headers)
            return await answer(scope, receive, send)
        scope.setdefault("state", {})["caller"] = caller
        return await self.app(scope, receive, send)

    def _identify(self, scope: Scope) -> Caller:
        keys = self._keys()
        if not self._closed.is_set():
            if not keys.list():
                return LOCAL if _is_loopback(scope) else _unauthorized(NO_KEY_YET)
            self._closed.set()
        given = Headers(scope=scope).getlist("authorization")
        scheme, _, secret = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not secret.strip():
            _unauthorized(SEND_A_KEY)
        key = keys.verify(secret.strip())
        if key is None:
            log.warning("a request to %s had a key that is unknown, expired or revoked", scope["path"].encode("unicode_escape"))
            _unauthorized(BAD_KEY, f'{CHALLENGE}, error="invalid_token"')
        return Caller(key.owner, key.scopes)


SEND_A_KEY = (
    "This server wants an API key, as the header 'Authorization: Bearer ft_…'. Its operator makes one: finetune keys create"
)
BAD_KEY = "The API key is unknown, has expired or was revoked"
NO_KEY_YET = "Others can reach this address, and this server has no API key yet. Its operator makes one: finetune keys create"


def _unauthorized(detail: str, challenge: str = CHALLENGE) -> NoReturn:
    raise HTTPException(401, detail, headers={"WWW-Authenticate": challenge})


def _is_open(path: str) -> bool:
    page, files = SHELL
    return path in PROBES or path == page or path.startswith(files)


def _is_loopback(scope: Scope) -> bool:
    """Whether the request came in on an address that only this machine reaches."""
    host = (scope.get("server") or ("", 0))[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def caller(request: Request) -> Caller:
    found: Caller = request.state.caller
    return found


AnyCaller = Annotated[Caller, Depends(caller)]


def needs(*scopes: KeyScope) -> Callable[[Caller], Awaitable[Caller]]:
    """A route's dependency: the caller, if the key has one of `scopes` (or admin)."""

    async def allowed(caller: AnyCaller) -> Caller:
        if not any(caller.allows(scope) for scope in scopes):
            wanted = " or ".join(repr(scope) for scope in scopes)
            raise HTTPException(
                403,
                f"This key has the scopes {', '.join(sorted(caller.scopes))}; this takes {wanted}",
                headers={"WWW-Authenticate": f'{CHALLENGE}, error="insufficient_scope"'},
            )
        return caller

    return allowed


Predicting = Annotated[Caller, Depends(needs("predict"))]
Submitting = Annotated[Caller, Depends(needs("jobs"))]
Reading = Annotated[Caller, Depends(needs("predict", "jobs"))]
Administering = Annotated[Caller, Depends(needs("admin"))]
Measuring = Annotated[Caller, Depends(needs("metrics"))]
