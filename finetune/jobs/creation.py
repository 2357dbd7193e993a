"""Making something once: ids, one creation at a time, what an Idempotency-Key stands for, whose a model's name is.

Everything here runs inside the transaction that makes the object, so that what was checked still holds when it is committed.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from finetune.errors import InvalidInput
from finetune.jobs.schema import idempotency, jobs

IDEMPOTENCY_SECONDS = 24 * 3600.0
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_OWNERS, _NAMES = 1, 2  # the first half of PostgreSQL's lock numbers: what the second half is the hash of


def new_id(prefix: str) -> str:
    """``ftjob-0c3t…``: 130 bits in 26 characters, sorted by creation time to the microsecond, then at random (72 bits)."""
    number = (time.time_ns() // 1_000 << 72) | secrets.randbits(72)
    return f"{prefix}-" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def digest_of(spec: Mapping[str, Any]) -> str:
    """Return a sha256: equal specs have equal digests."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def one_creation_at_a_time(connection: Connection, owner: str, model_name: str | None = None) -> None:
    """One owner's objects, and jobs that make models of one name, are created one after the other; so quotas and names hold.

    SQLite's write lock does that already.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_OWNERS, func.hashtext(owner))))
        if model_name is not None:
            connection.execute(select(func.pg_advisory_xact_lock(_NAMES, func.hashtext(model_name))))


def earlier_object(connection: Connection, owner: str, key: str | None, body_sha256: str) -> str | None:
    """The id of what was made for this key before, if its answer is still kept.

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
    """The same key and body will give this object from now on."""
    if key is not None:
        answer = {"owner": owner, "key": key, "body_sha256": body_sha256, "object_id": object_id, "created_at": time.time()}
        connection.execute(insert(idempotency).values(answer))


def model_owner(connection: Connection, name: str) -> str | None:
    """Whose model this is: the owner of the oldest job that makes, or made, a model of this name; None if no job did."""
    makers = select(jobs.c.owner).where(jobs.c.suffix == name, jobs.c.state.not_in(("failed", "cancelled")))
    return connection.execute(makers.order_by(jobs.c.id).limit(1)).scalar_one_or_none()
