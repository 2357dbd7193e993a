"""API keys and their scopes. Only a hash of a key is stored; the key itself is shown once, when it is created.

A key has 256 random bits, so one round of SHA-256 is safe: it cannot be found by guessing, unlike a password.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Engine, RowMapping, func, insert, or_, select, update

from finetune.errors import FinetuneError, InvalidInput, NotFound, did_you_mean
from finetune.jobs.database import reading, writing
from finetune.jobs.schema import api_keys

log = logging.getLogger(__name__)

SCOPES = ("predict", "jobs", "metrics", "admin")
_REMEMBER_USE_SECONDS = 60.0  # `last_used_at` of a key is written at most once in this time


@dataclass(frozen=True)
class ApiKey:
    """A stored key. `scopes`: predict, jobs (files, jobs, models), metrics, or admin (everything, of every owner)."""

    id: str
    owner: str
    scopes: frozenset[str]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None

    def allows(self, scope: str) -> bool:
        """Return whether the key has the scope, or the scope ``admin``."""
        return scope in self.scopes or "admin" in self.scopes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scopes": sorted(self.scopes)}


class KeyStore:
    """The keys of one job database."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def create(self, owner: str, scopes: Iterable[str], *, lifetime_seconds: float | None = None) -> tuple[str, ApiKey]:
        """Create a key; return its secret text ``ft_<id>_<43 characters>``, which is not stored, and the stored key.

        Raises:
            InvalidInput: a scope is unknown, or there is none.
        """
        wanted = frozenset(scopes)
        for scope in sorted(wanted - frozenset(SCOPES)):
            raise InvalidInput(f"unknown scope {scope!r}; allowed are {', '.join(SCOPES)}.{did_you_mean(scope, SCOPES)}")
        if not wanted:
            raise InvalidInput(f"a key needs at least one scope of {', '.join(SCOPES)}")
        key_id, now = secrets.token_hex(6), time.time()
        secret = f"ft_{key_id}_{secrets.token_urlsafe(32)}"
        expires_at = None if lifetime_seconds is None else now + lifetime_seconds
        values = {
            "id": key_id, "owner": owner, "secret_sha256": _digest(secret), "scopes": ",".join(sorted(wanted)),
            "created_at": now, "expires_at": expires_at,
        }  # fmt: skip
        with writing(self.engine) as connection:
            connection.execute(insert(api_keys).values(values))
        return secret, ApiKey(key_id, owner, wanted, now, expires_at, None, None)

    def verify(self, secret: str) -> ApiKey | None:
        """Return the key with this secret text, or None if there is none, or it has expired or was revoked."""
        if not secret.isascii() or "\0" in secret:
            return None
        prefix, _, rest = secret.partition("_")
        key_id, _, _ = rest.partition("_")
        with reading(self.engine) as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).mappings().one_or_none()
        now = time.time()
        stored = row["secret_sha256"] if row is not None else bytes(32)
        if not hmac.compare_digest(stored, _digest(secret)) or row is None or prefix != "ft":
            return None
        if row["revoked_at"] is not None or (row["expires_at"] is not None and row["expires_at"] <= now):
            return None
        if row["last_used_at"] is None or row["last_used_at"] < now - _REMEMBER_USE_SECONDS:
            threading.Thread(target=self._note_use, args=(key_id, now), name="key use", daemon=True).start()
        return _key(row)

    def _note_use(self, key_id: str, at: float) -> None:
        """Record when a key was used. A failure is only logged, so that keys are verified even if the database is read-only."""
        try:
            with writing(self.engine) as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(last_used_at=at))
        except FinetuneError as error:
            log.warning("the last use of key %s was not written: %s", key_id, error)

    def any(self) -> bool:
        """Return whether any key was ever created."""
        with reading(self.engine) as connection:
            return connection.execute(select(api_keys.c.id).limit(1)).first() is not None

    def is_usable(self, key_id: str) -> bool:
        """Return whether a key is neither revoked nor expired."""
        alive = or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > time.time())
        query = select(api_keys.c.id).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None), alive)
        with reading(self.engine) as connection:
            return connection.execute(query).first() is not None

    def list(self) -> Sequence[ApiKey]:
        """Return all keys, including expired and revoked ones, oldest first."""
        with reading(self.engine) as connection:
            rows = connection.execute(select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)).mappings().all()
        return [_key(row) for row in rows]

    def revoke(self, key_id: str) -> None:
        """Revoke a key permanently. Raises NotFound if there is no such key."""
        with writing(self.engine) as connection:
            revoked = (
                update(api_keys)
                .where(api_keys.c.id == key_id)
                .values(revoked_at=func.coalesce(api_keys.c.revoked_at, time.time()))
            )
            if connection.execute(revoked).rowcount == 0:
                raise NotFound(f"no API key {key_id!r}; list them with finetune keys list")

    def any_usable(self) -> bool:
        """Return whether at least one key is neither revoked nor expired."""
        alive = or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > time.time())
        with reading(self.engine) as connection:
            return bool(connection.execute(select(func.count()).where(api_keys.c.revoked_at.is_(None), alive)).scalar_one())


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _key(row: RowMapping) -> ApiKey:
    scopes = frozenset(row["scopes"].split(","))
    return ApiKey(row["id"], row["owner"], scopes, row["created_at"], row["expires_at"], row["revoked_at"], row["last_used_at"])
