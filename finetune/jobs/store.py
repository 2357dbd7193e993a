"""The database rows of jobs of every kind, and the only code that changes the state of a job.

    queued ──claim──▶ running ──▶ succeeded | failed | cancelled        terminal states never change
      ▲                  │ ▲
      │                  ▼ │ (request_cancel)
      └── hand_back ── cancelling ──▶ cancelled
          reap

A claim is a lease with a fencing token (`fence`). Every later write of the worker is conditional on the token; if it changes no
row, another worker has claimed the job. Every change of a job locks its row first, so that its events are numbered in the order
in which they happened.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    RowMapping,
    Select,
    Text,
    and_,
    case,
    cast,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from finetune.errors import Conflict, NotFound
from finetune.executors.endings import MAX_LOST_ATTEMPTS
from finetune.jobs.clock import LeaseTime, lease_time
from finetune.jobs.creation import earlier_object, model_owner, new_id, one_creation_at_a_time, remember_object
from finetune.jobs.database import reading, writing
from finetune.jobs.files import check_not_full, stored_by
from finetune.jobs.kinds import KINDS, TRAINING, Kind, kind_of_id
from finetune.jobs.outbox import enqueue_ended
from finetune.jobs.schema import HELD, STATES, TERMINAL, UNFINISHED, idempotency, job_events, jobs

LEASE_SECONDS = 30.0
LOCAL_OWNER = "local"  # owner of jobs that were submitted without an API key


class LeaseLost(Exception):
    """The job is no longer held under this claim. The caller must stop working on it and write nothing more."""


@dataclass(frozen=True)
class Job:
    """One job, decoded from its row."""

    id: str
    kind: Kind
    owner: str
    state: str
    phase: str | None
    spec: Mapping[str, Any]
    request: Mapping[str, Any] | None
    suffix: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempts: int
    progress: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    error_code: str | None
    error_message: str | None
    cancel_requested_at: float | None
    worker: str | None  # name of the worker that holds it now

    @property
    def finished(self) -> bool:
        return self.state in TERMINAL


@dataclass(frozen=True)
class Claim:
    """The right to work on a job until the lease ends; `fence` is the token that every write needs."""

    job: Job
    worker: str
    fence: int


@dataclass(frozen=True)
class Event:
    """One event of a job's history; `seq` increases over all jobs and is the cursor of readers."""

    seq: int
    job_id: str
    at: float
    level: str
    kind: str
    message: str
    data: Mapping[str, Any]

    @staticmethod
    def of(row: RowMapping) -> Event:
        data = json.loads(row["data"] or "{}")
        return Event(row["seq"], row["job_id"], row["at"], row["level"], row["kind"], row["message"], data)


class JobStore:
    """Jobs and their events in one database. Every method is one transaction, safe between threads and processes."""

    def __init__(self, engine: Engine, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self.engine = engine
        self.lease_seconds = lease_seconds

    # ── what clients do ──────────────────────────────────────────────────────────────────────────

    def create(
        self,
        owner: str,
        spec: Mapping[str, Any],
        *,
        kind: Kind = TRAINING,
        spec_digest: str,
        request: Mapping[str, Any] | None = None,
        suffix: str | None = None,
        priority: int = 0,
        idempotency_key: str | None = None,
        body_sha256: str = "",
        max_queued: int | None = None,
        any_suffix: bool = False,
        models_bytes: int = 0,
        max_owner_bytes: int | None = None,
    ) -> tuple[Job, bool]:
        """Queue a job; return it and whether it is new. The same key and body return the job of the first request.

        Args:
            any_suffix: allow a suffix that belongs to another owner's model; the job then makes a new version of it.
            models_bytes: disk space of the owner's models, which are in the registry, not in the database.
            max_owner_bytes: limit on the disk space of the owner's uploads, finished jobs and models.

        Raises:
            InvalidInput: the key was used with another body.
            QueueFull: the owner already has `max_queued` unfinished jobs.
            NameTaken: the suffix belongs to another owner.
            FilesFull: the owner already stores more than `max_owner_bytes`.
        """
        now = time.time()
        with writing(self.engine) as connection:
            one_creation_at_a_time(connection, owner, suffix)
            earlier = earlier_object(connection, owner, idempotency_key, body_sha256)
            if earlier is not None:
                return _job(_row(connection, earlier, owner)), False
            if suffix is not None and not any_suffix and model_owner(connection, suffix) not in (None, owner):
                raise NameTaken(suffix)
            if max_queued is not None:
                _check_quota(connection, owner, max_queued)
            if max_owner_bytes is not None:
                check_not_full(stored_by(connection, owner) + models_bytes, max_owner_bytes)
            job_id = new_id(kind.prefix)
            connection.execute(
                insert(jobs).values(
                    id=job_id, kind=kind.name, owner=owner, state="queued", priority=priority, spec=_dumps(spec),
                    spec_digest=spec_digest, request=None if request is None else _dumps(request), suffix=suffix, created_at=now,
                )
            )  # fmt: skip
            remember_object(connection, owner, idempotency_key, body_sha256, job_id)
            _record(connection, job_id, now, "queued", "The job is queued.")
            return _job(_row(connection, job_id, owner)), True

    def get(self, job_id: str, owner: str | None = None, kind: Kind | None = None) -> Job:
        """Return a job of `owner` and `kind`, each any if None. Raises NotFound also if the job has another owner or kind."""
        with reading(self.engine) as connection:
            return _job(_row(connection, job_id, owner, kind))

    def newest(self, limit: int) -> Sequence[Job]:
        """Return the newest jobs of all kinds and owners, newest first."""
        query = select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        with reading(self.engine) as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    def list(
        self,
        owner: str | None = None,
        *,
        kind: Kind = TRAINING,
        after: str | None = None,
        limit: int = 20,
        state: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[Sequence[Job], bool]:
        """Return a page of jobs of one kind, newest first, beginning after the id `after`, and whether there are more.

        Args:
            metadata: only jobs whose metadata contains all of these items.
        """
        query = select(jobs).where(jobs.c.kind == kind.name).order_by(jobs.c.id.desc()).limit(limit + 1)
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        if after is not None:
            query = query.where(jobs.c.id < after)
        if state is not None:
            query = query.where(jobs.c.state == state)
        for key, value in (metadata or {}).items():
            query = query.where(_metadata_value(self.engine.dialect.name, key) == value)
        with reading(self.engine) as connection:
            rows = connection.execute(query).mappings().all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def queue_position(self, job: Job) -> int | None:
        """Return how many queued jobs are before this one by priority and age; None if it is not queued."""
        if job.state != "queued":
            return None
        with reading(self.engine) as connection:
            mine = connection.execute(select(jobs.c.priority).where(jobs.c.id == job.id)).scalar_one()
            older = or_(jobs.c.created_at < job.created_at, and_(jobs.c.created_at == job.created_at, jobs.c.id < job.id))
            before = or_(jobs.c.priority > mine, and_(jobs.c.priority == mine, older))
            return connection.execute(select(func.count()).where(jobs.c.state == "queued", before)).scalar_one()

    def request_cancel(self, job_id: str, owner: str | None = None, kind: Kind | None = None) -> Job:
        """Cancel a queued job at once; set a running one to ``cancelling``. Idempotent.

        Raises:
            Conflict: the job has already succeeded or failed.
        """
        now = time.time()
        with writing(self.engine) as connection:
            row = _row(connection, job_id, owner, kind, lock=True)
            if row["state"] in ("succeeded", "failed"):
                raise Conflict(f"{job_id} has already {row['state']}; a finished job cannot be cancelled")
            if row["state"] == "queued":
                cancelled = {"state": "cancelled", "cancel_requested_at": now, "finished_at": _after(row, now)}
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancelled))
                _record(connection, job_id, now, "cancelled", "The job was cancelled while it was queued.")
            elif row["state"] == "running":
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(state="cancelling", cancel_requested_at=now))
                _record(connection, job_id, now, "cancelling", "Cancelling was asked for.")
            return _job(_row(connection, job_id, owner))

    def delete(self, job_id: str, owner: str | None = None, kind: Kind | None = None) -> None:
        """Delete a job that has ended, with its events. The model that it registered is kept.

        Raises:
            NotFound: there is no such job.
            Conflict: it has not ended, or another unfinished job uses its run.
        """
        with writing(self.engine) as connection:
            row = _row(connection, job_id, owner, kind, lock=True)
            if row["state"] not in TERMINAL:
                raise Conflict(f"{job_id} is {row['state']}; cancel it and wait for its end before you delete it")
            reads = select(jobs.c.id).where(jobs.c.state.in_(UNFINISHED), jobs.c.spec.contains(job_id, autoescape=True)).limit(1)
            if (reader := connection.execute(reads).scalar_one_or_none()) is not None:
                raise Conflict(f"{job_id} is read by {reader}, which has not finished; cancel that one or wait for its end")
            connection.execute(delete(idempotency).where(idempotency.c.object_id == job_id))
            connection.execute(delete(job_events).where(job_events.c.job_id == job_id))
            connection.execute(delete(jobs).where(jobs.c.id == job_id))

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> Sequence[Event]:
        """Return the job's events with ``seq > after``, oldest first."""
        query = select(job_events).where(job_events.c.job_id == job_id, job_events.c.seq > after)
        with reading(self.engine) as connection:
            rows = connection.execute(query.order_by(job_events.c.seq).limit(limit)).mappings().all()
        return [Event.of(row) for row in rows]

    def ended_since(self, at: float) -> Sequence[tuple[str, str]]:
        """Return (id, state) of the jobs that ended after `at`, without those that never started."""
        ended = select(jobs.c.id, jobs.c.state).where(jobs.c.state.in_(TERMINAL), jobs.c.attempts > 0, jobs.c.finished_at > at)
        with reading(self.engine) as connection:
            return [(str(job_id), str(state)) for job_id, state in connection.execute(ended)]

    def counts(self, owner: str | None = None, kinds: Collection[str] = tuple(KINDS)) -> dict[str, int]:
        """Return the number of jobs of these kinds in each state; states without jobs are left out."""
        query = select(jobs.c.state, func.count()).where(jobs.c.kind.in_(kinds)).group_by(jobs.c.state)
        with reading(self.engine) as connection:
            rows = connection.execute(query if owner is None else query.where(jobs.c.owner == owner))
            return {str(state): int(count) for state, count in rows}

    # ── what workers do ──────────────────────────────────────────────────────────────────────────

    def claim(self, worker: str, kinds: Collection[str] = tuple(KINDS)) -> Claim | None:
        """Claim the next queued job with a new lease; return None if there is none.

        Args:
            kinds: names of the kinds of jobs that the worker executes.
        """
        with reading(self.engine) as connection:  # usually there is none; a read does not block other writers
            if connection.execute(_claimable(lease_time(connection), kinds)).first() is None:
                return None
        now = time.time()
        with writing(self.engine) as connection:
            clock = lease_time(connection)
            job_id = connection.execute(_claimable(clock, kinds).with_for_update(skip_locked=True, of=jobs)).scalar_one_or_none()
            if job_id is None:
                return None
            taken = {
                **self._lease(clock), "state": "running", "lease_owner": worker, "fence": jobs.c.fence + 1, "progressed": False,
                "attempts": jobs.c.attempts + 1, "started_at": func.coalesce(jobs.c.started_at, now), "phase": "preparing",
            }  # fmt: skip
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(taken))
            row = _row(connection, job_id, None)
            _record(connection, job_id, now, "running", f"Attempt {row['attempts']} started.", data={"worker": worker})
            return Claim(_job(row), worker, row["fence"])

    def heartbeat(
        self,
        claim: Claim,
        *,
        phase: str | None = None,
        progress: Mapping[str, Any] | None = None,
        progressed: bool = False,
        records: Sequence[Mapping[str, Any]] = (),
    ) -> bool:
        """Renew the lease and store the run's progress; return whether cancelling was requested.

        Args:
            progressed: whether this attempt has written a new checkpoint; it stays set for the rest of the attempt.
            records: all lines of the run's ``events.jsonl``, in order. Those that are not in the job's history are added; the
                number of lines is stored in the same transaction, so that nothing is added twice after a crash. A record has
                ``at``, ``kind``, ``message`` and optionally ``level``; all other keys become the event's data.

        Raises:
            LeaseLost: another worker holds the job, or it has ended.
        """
        with writing(self.engine) as connection:
            row = _held(connection, claim)
            values: dict[str, Any] = self._lease(lease_time(connection))
            if phase is not None:
                values["phase"] = phase
            if progress is not None:
                values |= {"progress": _dumps(progress), "progress_at": time.time()}
            if progressed:
                values["progressed"] = True
            _write(connection, claim, values)
            _add_run_events(connection, claim.job.id, records)
            return bool(row["state"] == "cancelling")

    def cancel_requested(self, claim: Claim) -> bool:
        """Return whether cancelling was requested; a read that is cheaper than `heartbeat`, for polling."""
        with reading(self.engine) as connection:
            return connection.execute(select(jobs.c.state).where(jobs.c.id == claim.job.id)).scalar_one_or_none() == "cancelling"

    def finish(
        self,
        claim: Claim,
        state: str,
        *,
        message: str | None = None,
        result: Mapping[str, Any] | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
        stored_bytes: int = 0,
    ) -> None:
        """End the job as succeeded, failed or cancelled. `stored_bytes` is its folder's disk space. Raises LeaseLost."""
        if state not in TERMINAL:
            raise ValueError(f"{state!r} is not one of {TERMINAL}")
        now = time.time()
        error_message = None if error_message is None else _plain(error_message)
        with writing(self.engine) as connection:
            row = _held(connection, claim)
            values = {
                "result": None if result is None else _dumps(result),
                "error_code": error_code,
                "error_message": error_message,
                "stored_bytes": stored_bytes,
            }
            _write(connection, claim, {**_released(), **values, "state": state, "finished_at": _after(row, now)})
            said = error_message or message or f"The job {_ENDED[state]}."
            level = "error" if state == "failed" else "info"
            _record(connection, claim.job.id, now, state, said, level=level, data={"code": error_code} if error_code else {})

    def hand_back(
        self, claim: Claim, reason: str, *, delay_seconds: float = 0.0, counted: Literal["stalled", "lost"] | None = "stalled"
    ) -> None:
        """Return the job to the queue, because the worker stops or another attempt may succeed. Raises LeaseLost.

        A job for which cancelling was requested is cancelled instead.

        Args:
            counted: how the attempt counts towards the limit of attempts without a new checkpoint; None if the job did not
                cause its end.
        """
        now = time.time()
        with writing(self.engine) as connection:
            row = _held(connection, claim)
            if row["state"] == "cancelling":
                _write(connection, claim, {**_released(), "state": "cancelled", "finished_at": _after(row, now)})
                _record(connection, claim.job.id, now, "cancelled", "The job was cancelled.")
                return
            clock = lease_time(connection)
            waiting = {"state": "queued", "not_before": clock.seconds + delay_seconds, "clock_epoch": clock.epoch}
            _write(connection, claim, {**_released(), **waiting, **_counts(row, counted)})
            _record(
                connection,
                claim.job.id,
                now,
                "requeued",
                reason,
                level="warning",
                data={"delay_seconds": round(delay_seconds, 1)},
            )

    def fruitless_attempts(self, claim: Claim) -> tuple[int, int]:
        """Return the numbers of consecutive attempts without a new checkpoint, if this one counts as stalled and as lost."""
        with reading(self.engine) as connection:
            row = _row(connection, claim.job.id, None)
            return _counts(row, "stalled")["stalled_attempts"], _counts(row, "lost")["lost_attempts"]

    def reap(self) -> Sequence[str]:
        """Return jobs with an expired lease to the queue, or cancel them if that was requested; return their ids."""
        with reading(self.engine) as connection:
            if connection.execute(_expired(lease_time(connection))).first() is None:
                return []
        now = time.time()
        with writing(self.engine) as connection:
            rows = connection.execute(_expired(lease_time(connection)).with_for_update(skip_locked=True)).mappings().all()
            for row in rows:
                _release_lost(connection, row, now)
        return [row["id"] for row in rows]

    def _lease(self, clock: LeaseTime) -> dict[str, Any]:
        return {"lease_until": clock.seconds + self.lease_seconds, "clock_epoch": clock.epoch}


class QueueFull(Conflict):
    """The owner has reached the limit on unfinished jobs."""

    code, http_status = "queue_full", 429


class NameTaken(Conflict):
    """The name of a new job's model belongs to another owner."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the model name {name!r} is taken; choose another suffix")


_ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "was cancelled"}


def _claimable(clock: LeaseTime, kinds: Collection[str]) -> Select[str]:
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


def _metadata_value(dialect: str, key: str) -> ColumnElement[str]:
    """Return the value of one metadata key inside the spec's JSON."""
    if dialect == "postgresql":
        value: ColumnElement[str] = cast(jobs.c.spec, JSONB)["metadata"][key].astext
        return value
    return cast(func.json_extract(jobs.c.spec, literal(f'$.metadata."{key}"')), Text)


def _expired(clock: LeaseTime) -> Select[Any]:
    ended = or_(jobs.c.clock_epoch != clock.epoch, jobs.c.lease_until < clock.seconds)
    return select(jobs).where(jobs.c.state.in_(HELD), ended)


def _held(connection: Connection, claim: Claim) -> RowMapping:
    """Lock and return the job's row. Raises LeaseLost if the job is no longer held under this claim."""
    query = select(jobs).where(jobs.c.id == claim.job.id, jobs.c.state.in_(HELD), jobs.c.fence == claim.fence)
    row = connection.execute(query.with_for_update()).mappings().one_or_none()
    if row is None:
        raise LeaseLost(f"{claim.job.id} is no longer held under fence {claim.fence}")
    return row


def _write(connection: Connection, claim: Claim, values: Mapping[str, Any]) -> None:
    held = and_(jobs.c.id == claim.job.id, jobs.c.state.in_(HELD), jobs.c.fence == claim.fence)
    if connection.execute(update(jobs).where(held).values(values)).rowcount != 1:
        raise LeaseLost(f"{claim.job.id} is no longer held under fence {claim.fence}")


def _released() -> dict[str, Any]:
    return {"lease_owner": None, "lease_until": None, "phase": None}


def _counts(row: RowMapping, more: str | None) -> dict[str, int]:
    """Return the new counts of consecutive attempts without a new checkpoint when an attempt ends; it counts as `more`."""
    return {
        f"{kind}_attempts": 0 if row["progressed"] else row[f"{kind}_attempts"] + (kind == more) for kind in ("stalled", "lost")
    }


def _after(row: RowMapping, now: float) -> float:
    """Return `now`, but at least the job's start, in case the wall clock was set back."""
    return max(now, float(row["started_at"] or row["created_at"]))


def _release_lost(connection: Connection, row: RowMapping, now: float) -> None:
    """Requeue or cancel a job whose worker no longer renews its lease."""
    lost, counts = f"Worker {row['lease_owner']} stopped renewing its lease", _counts(row, "lost")
    ended = {"finished_at": _after(row, now)}
    if row["state"] == "cancelling":
        values, kind, level, said = {**ended, "state": "cancelled"}, "cancelled", "info", "The job was cancelled."
    elif counts["lost_attempts"] >= MAX_LOST_ATTEMPTS:
        said = (
            f"{lost}, as {MAX_LOST_ATTEMPTS - 1} did before it; the job itself seems to end them, most often for want of memory."
        )
        values, kind, level = {**ended, "state": "failed", "error_code": "crash_loop", "error_message": said}, "failed", "error"
    else:
        values, kind, level = {"state": "queued", "not_before": 0.0}, "worker_lost", "warning"
        said = f"{lost}; the job is queued again and resumes."
    connection.execute(update(jobs).where(jobs.c.id == row["id"]).values({**_released(), **counts, **values}))
    _record(connection, row["id"], now, kind, said, level=level)


def _add_run_events(connection: Connection, job_id: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Add the records that are not in the job's history yet, except the run's own final event: the job has one of its own."""
    if not records:
        return
    newest = connection.execute(select(func.max(job_events.c.line)).where(job_events.c.job_id == job_id)).scalar_one()
    for line, record in enumerate(records):
        if (newest is None or line > newest) and record["kind"] not in STATES:
            data = {key: _finite(value) for key, value in record.items() if key not in ("at", "level", "kind", "message")}
            _record(
                connection, job_id, float(record["at"]), str(record["kind"]), str(record["message"]),
                level=str(record.get("level", "info")), data=data, line=line,
            )  # fmt: skip


def _check_quota(connection: Connection, owner: str, max_queued: int) -> None:
    unfinished = select(func.count()).where(jobs.c.owner == owner, jobs.c.state.in_(UNFINISHED))
    if connection.execute(unfinished).scalar_one() >= max_queued:
        raise QueueFull(f"{max_queued} jobs of yours have not finished yet, and that is the limit; wait for one or cancel one")


def _row(connection: Connection, job_id: str, owner: str | None, kind: Kind | None = None, *, lock: bool = False) -> RowMapping:
    query = select(jobs).where(jobs.c.id == job_id)
    found = connection.execute(query.with_for_update() if lock else query) if "\0" not in job_id else None
    row = None if found is None else found.mappings().one_or_none()
    if row is None or owner not in (None, row["owner"]) or (kind is not None and row["kind"] != kind.name):
        asked = kind or kind_of_id(job_id)
        raise NotFound(f"no {asked.title} {job_id!r}; finetune jobs list shows yours, and so does GET {asked.path}")
    return row


def _record(
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
    event = {
        "job_id": job_id,
        "at": at,
        "level": level,
        "kind": kind,
        "message": _plain(message),
        "data": _dumps(data or {}),
        "line": line,
    }
    connection.execute(insert(job_events).values(event))
    if kind in TERMINAL and line is None:
        enqueue_ended(connection, _job(_row(connection, job_id, None)), at)


def _job(row: RowMapping) -> Job:
    return Job(
        id=row["id"], kind=KINDS[row["kind"]], owner=row["owner"], state=row["state"], phase=row["phase"],
        spec=json.loads(row["spec"]),
        request=_loads(row["request"]), suffix=row["suffix"], created_at=row["created_at"], started_at=row["started_at"],
        finished_at=row["finished_at"], attempts=row["attempts"], progress=_loads(row["progress"]), result=_loads(row["result"]),
        error_code=row["error_code"], error_message=row["error_message"], cancel_requested_at=row["cancel_requested_at"],
        worker=row["lease_owner"],
    )  # fmt: skip


def _dumps(value: Mapping[str, Any]) -> str:
    """Return ASCII JSON, in which lone surrogates and NULs, which databases reject as text, are escaped."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _plain(text: str) -> str:
    """Return `text` with the characters replaced that databases reject."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def _finite(value: Any) -> Any:
    """Return `value` with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


def _loads(text: str | None) -> Any:
    return None if text is None else json.loads(text)
