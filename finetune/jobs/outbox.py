"""The outbox of webhook deliveries: rows that are written in the same transaction as the change that they report.

Thus every committed change is reported and no change that was rolled back is, whichever process is killed in between.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, insert, select

from finetune.jobs.kinds import KINDS
from finetune.jobs.schema import TERMINAL, webhook_deliveries, webhooks

if TYPE_CHECKING:
    from finetune.jobs.job import Job

PROMOTED, DEPLOYED, DRIFTED = "model.promoted", "deployment.changed", "model.drifted"
TYPES = (*(f"{kind.object}.{state}" for kind in KINDS.values() for state in TERMINAL), PROMOTED, DEPLOYED, DRIFTED)


def enqueue_ended(connection: Connection, job: Job, at: float) -> None:
    """Queue the event of a job's end for every webhook of its owner that subscribes to it."""
    event_type = f"{job.kind.object}.{job.state}"
    if not (wanting := webhooks_for(connection, event_type, job.owner)):
        return
    data = {
        "id": job.id,
        "status": job.state,
        "model": None if job.result is None else job.kind.registered(job.result),
        "metadata": job.spec.get("metadata") or {},
        "error": None if job.error_code is None else {"code": job.error_code},
        "url": f"{job.kind.path}/{job.id}",
    }
    for webhook_id in wanting:
        enqueue(connection, webhook_id, event_type, data, at, key=job.id)


def webhooks_for(connection: Connection, event_type: str, owner: str | None = None) -> list[str]:
    """Return the ids of the webhooks that subscribe to a type of event, of one owner or of all."""
    query = select(webhooks.c.id, webhooks.c.events).where(webhooks.c.disabled_at.is_(None))
    rows = connection.execute(query if owner is None else query.where(webhooks.c.owner == owner)).all()
    return [webhook_id for webhook_id, events in rows if event_type in events.split(",")]


def enqueue(connection: Connection, webhook_id: str, event_type: str, data: Mapping[str, Any], at: float, *, key: str) -> None:
    """Queue one event for one webhook, unless it is already queued.

    Args:
        key: identifies the event among those of its type.
    """
    digest = hashlib.sha256(f"{webhook_id} {event_type} {key}".encode()).hexdigest()
    delivery_id = f"msg_{digest[:32]}"
    if connection.execute(select(webhook_deliveries.c.id).where(webhook_deliveries.c.id == delivery_id)).first() is not None:
        return
    timestamp = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    payload = json.dumps({"type": event_type, "timestamp": timestamp, "data": dict(data)}, separators=(",", ":"))
    values = {
        "id": delivery_id, "webhook_id": webhook_id, "type": event_type, "payload": payload, "created_at": at, "due_at": at,
    }  # fmt: skip
    connection.execute(insert(webhook_deliveries).values(values))
