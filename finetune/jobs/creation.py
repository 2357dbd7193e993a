"""Create objects exactly once: ids, locks on creation, idempotency keys, and owners of model names.

Everything here runs inside the transaction that creates the object, so that its checks still hold when it commits.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from finetune.errors import Conflict, InvalidInput
from finetune.jobs.schema import UNFINISHED, idempotency, jobs

IDEMPOTENCY_SECONDS = 24 * 3600.0
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_OWNERS, _NAMES = 1, 2  # first key of PostgreSQL's advisory locks; the second is the hash of an owner or a model name


def new_id(prefix: str) -> str:
    """Return an id such as ``ftjob-0c3t…``: 26 characters that sort by creation time in microseconds, then 72 random bits."""
    number = (time.time_ns() // 1_000 << 72) | secrets.randbits(72)
    return f"{prefix}-" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def digest_of(spec: Mapping[str, Any]) -> str:
    """Return the sha256 of a spec, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def creation_lock(connection: Connection, owner: str, model_name: str | None = None) -> None:
    """Lock, until the transaction ends, the creation of objects of this owner and of jobs for this model name.

    Without it two transactions could both pass the checks of quotas and names. SQLite's write lock is sufficient by itself.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_OWNERS, func.hashtext(owner))))
        if model_name is not None:
            connection.execute(select(func.pg_advisory_xact_lock(_NAMES, func.hashtext(model_name))))


def earlier_object(connection: Connection, owner: str, key: str | None, body_sha256: str) -> str | None:
    """Return the id of the object that was created with this key, or None if there is none or the key has expired.

    Raises:
        InvalidInput: the key was used with another body.
    """
    if key is None:
        return None
    found = connection.execute(
        select(idempotency.c.body_sha256, idempotency.c.object_id, idempotency.c.created_at).where(
            idempotency.c.owner == owner, idempotency.c.key == key
        )
    ).one_or_none()
    if found is None:
        return None
    if found.created_at < time.time() - IDEMPOTENCY_SECONDS:
        connection.execute(delete(idempotency).where(idempotency.c.owner == owner, idempotency.c.key == key))
        return None
    if found.body_sha256 != body_sha256:
        raise InvalidInput(f"the Idempotency-Key {key!r} was used before with another body; send a new key with a new request")
    return str(found.object_id)


def remember_object(connection: Connection, owner: str, key: str | None, body_sha256: str, object_id: str) -> None:
    """Record the object that was created for this key and body."""
    if key is not None:
        answer = {"owner": owner, "key": key, "body_sha256": body_sha256, "object_id": object_id, "created_at": time.time()}
        connection.execute(insert(idempotency).values(answer))


def model_owner(connection: Connection, name: str) -> str | None:
    """Return the owner of a model's name: that of the oldest job for it that neither failed nor was cancelled, or None."""
    makers = select(jobs.c.owner).where(jobs.c.suffix == name, jobs.c.state.not_in(("failed", "cancelled")))
    return connection.execute(makers.order_by(jobs.c.id).limit(1)).scalar_one_or_none()


class QueueFull(Conflict):
    """The owner has reached the limit on unfinished jobs."""

    code, http_status = "queue_full", 429


class NameTaken(Conflict):
    """The name of a new job's model belongs to another owner."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the model name {name!r} is taken; choose another suffix")


def check_quota(connection: Connection, owner: str, max_queued: int) -> None:
    """Raise `QueueFull` if the owner already has `max_queued` unfinished jobs."""
    unfinished = select(func.count()).where(jobs.c.owner == owner, jobs.c.state.in_(UNFINISHED))
    if connection.execute(unfinished).scalar_one() >= max_queued:
        raise QueueFull(f"{max_queued} jobs of yours have not finished yet, and that is the limit; wait for one or cancel one")
