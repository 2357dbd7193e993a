"""Find, lock and change the rows of jobs and record their events, inside a transaction of `finetune.jobs.store`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    Text,
    and_,
    case,
    cast,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from finetune.errors import NotFound
from finetune.executors.endings import MAX_LOST_ATTEMPTS
from finetune.jobs.clock import LeaseTime
from finetune.jobs.job import Claim, LeaseLost, finite_values, job_of, storable_text, to_json
from finetune.jobs.kinds import Kind, kind_of_id
from finetune.jobs.outbox import enqueue_ended
from finetune.jobs.schema import HELD, STATES, TERMINAL, job_events, jobs


def claimable(clock: LeaseTime, kinds: Collection[str]) -> Select[str]:
    """Return the query for the id of the next job. A `not_before` of an earlier boot counts as past.

    Among jobs of equal priority, those of the owner with the fewest running jobs come first, then those of the owner whose last
    job started longest ago, so that one owner's long queue does not delay the others.
    """
    due = or_(jobs.c.not_before <= clock.seconds, jobs.c.clock_epoch != clock.epoch)
    held = case((jobs.c.state.in_(HELD), 1), else_=0)
    owners = (
        select(jobs.c.owner, func.sum(held).label("running"), func.coalesce(func.max(jobs.c.started_at), 0.0).label("served_at"))
        .group_by(jobs.c.owner)
        .subquery()
    )
    turn = (jobs.c.priority.desc(), owners.c.running, owners.c.served_at, jobs.c.created_at, jobs.c.id)
    return (
        select(jobs.c.id)
        .join(owners, owners.c.owner == jobs.c.owner)
        .where(jobs.c.state == "queued", jobs.c.kind.in_(kinds), due)
        .order_by(*turn)
        .limit(1)
    )


def metadata_value(dialect: str, key: str) -> ColumnElement[str]:
    """Return the value of one metadata key inside the spec's JSON."""
    if dialect == "postgresql":
        value: ColumnElement[str] = cast(jobs.c.spec, JSONB)["metadata"][key].astext
        return value
    return cast(func.json_extract(jobs.c.spec, literal(f'$.metadata."{key}"')), Text)


def expired(clock: LeaseTime) -> Select[Any]:
    """Return the query for the jobs whose lease has ended, or was given before the machine was started again."""
    ended = or_(jobs.c.clock_epoch != clock.epoch, jobs.c.lease_until < clock.seconds)
    return select(jobs).where(jobs.c.state.in_(HELD), ended)


def job_row(
    connection: Connection, job_id: str, owner: str | None, kind: Kind | None = None, *, lock: bool = False
) -> RowMapping:
    """Return the row of a job of `owner` and `kind`, each any if None; `lock` it until the transaction ends.

    Raises:
        NotFound: there is no such job, or it has another owner or kind.
    """
    query = select(jobs).where(jobs.c.id == job_id)
    found = connection.execute(query.with_for_update() if lock else query) if "\0" not in job_id else None
    row = None if found is None else found.mappings().one_or_none()
    if row is None or owner not in (None, row["owner"]) or (kind is not None and row["kind"] != kind.name):
        asked = kind or kind_of_id(job_id)
        raise NotFound(f"no {asked.title} {job_id!r}; finetune jobs list shows yours, and so does GET {asked.path}")
    return row


def held_row(connection: Connection, claim: Claim) -> RowMapping:
    """Lock and return the job's row. Raises LeaseLost if the job is no longer held under this claim."""
    query = select(jobs).where(jobs.c.id == claim.job.id, jobs.c.state.in_(HELD), jobs.c.fence == claim.fence)
    row = connection.execute(query.with_for_update()).mappings().one_or_none()
    if row is None:
        raise LeaseLost(f"{claim.job.id} is no longer held under fence {claim.fence}")
    return row


def write_held(connection: Connection, claim: Claim, values: Mapping[str, Any]) -> None:
    """Change the job's row. Raises LeaseLost if the job is no longer held under this claim."""
    held = and_(jobs.c.id == claim.job.id, jobs.c.state.in_(HELD), jobs.c.fence == claim.fence)
    if connection.execute(update(jobs).where(held).values(values)).rowcount != 1:
        raise LeaseLost(f"{claim.job.id} is no longer held under fence {claim.fence}")


def released() -> dict[str, Any]:
    """Return the values of the columns of a job that nobody holds."""
    return {"lease_owner": None, "lease_until": None, "phase": None}


def attempt_counts(row: RowMapping, more: str | None) -> dict[str, int]:
    """Return the new counts of consecutive attempts without a new checkpoint when an attempt ends; it counts as `more`."""
    return {
        f"{kind}_attempts": 0 if row["progressed"] else row[f"{kind}_attempts"] + (kind == more) for kind in ("stalled", "lost")
    }


def end_time(row: RowMapping, now: float) -> float:
    """Return `now`, but at least the job's start, in case the wall clock was set back."""
    return max(now, float(row["started_at"] or row["created_at"]))


def release_lost(connection: Connection, row: RowMapping, now: float) -> None:
    """Requeue or cancel a job whose worker no longer renews its lease."""
    lost, counts = f"Worker {row['lease_owner']} stopped renewing its lease", attempt_counts(row, "lost")
    ended = {"finished_at": end_time(row, now)}
    if row["state"] == "cancelling":
        values, kind, level, text = {**ended, "state": "cancelled"}, "cancelled", "info", "The job was cancelled."
    elif counts["lost_attempts"] >= MAX_LOST_ATTEMPTS:
        text = (
            f"{lost}, as {MAX_LOST_ATTEMPTS - 1} did before it; the job itself seems to end them, most often for lack of memory."
        )
        values = {**ended, "state": "failed", "error_code": "crash_loop", "error_message": text}
        kind, level = "failed", "error"
    else:
        values, kind, level = {"state": "queued", "not_before": 0.0}, "worker_lost", "warning"
        text = f"{lost}; the job is queued again and resumes."
    connection.execute(update(jobs).where(jobs.c.id == row["id"]).values({**released(), **counts, **values}))
    record_event(connection, row["id"], now, kind, text, level=level)


def record_event(
    connection: Connection,
    job_id: str,
    at: float,
    kind: str,
    message: str,
    *,
    level: str = "info",
    data: Mapping[str, Any] | None = None,
    line: int | None = None,
) -> None:
    """Add an event to a job's history. An event that ends the job is also queued for the owner's webhooks.

    Args:
        line: number of the line in the run's ``events.jsonl`` that the event comes from; None: it is an event of the job itself.
    """
    event = {
        "job_id": job_id,
        "at": at,
        "level": level,
        "kind": kind,
        "message": storable_text(message),
        "data": to_json(data or {}),
        "line": line,
    }
    connection.execute(insert(job_events).values(event))
    if kind in TERMINAL and line is None:
        enqueue_ended(connection, job_of(job_row(connection, job_id, None)), at)


def add_run_events(connection: Connection, job_id: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Add the records that are not in the job's history yet, except the run's own final event: the job has one of its own."""
    if not records:
        return
    newest = connection.execute(select(func.max(job_events.c.line)).where(job_events.c.job_id == job_id)).scalar_one()
    for line, record in enumerate(records):
        if (newest is None or line > newest) and record["kind"] not in STATES:
            data = {key: finite_values(value) for key, value in record.items() if key not in ("at", "level", "kind", "message")}
            record_event(
                connection, job_id, float(record["at"]), str(record["kind"]), str(record["message"]),
                level=str(record.get("level", "info")), data=data, line=line,
            )  # fmt: skip
