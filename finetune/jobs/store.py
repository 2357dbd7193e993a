"""The durable rows behind fine-tuning jobs, and the only code that changes a job's state.

    queued ──claim──▶ running ──▶ succeeded | failed | cancelled        terminal states never change
      ▲                  │ ▲
      │                  ▼ │ (request_cancel)
      └── hand_back ── cancelling ──▶ cancelled
          reap

A claim is a lease with a fencing token (`fence`): every later write of the holder names the token, and a write that changes no
row means that the job belongs to somebody else now. Knows nothing of processes, run folders or HTTP.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, and_, func, insert, or_, select, update

from finetune.errors import Conflict, InvalidInput, NotFound
from finetune.jobs.clock import LeaseTime, lease_time
from finetune.jobs.database import writing
from finetune.jobs.schema import HELD, TERMINAL, idempotency, job_events, jobs

LEASE_SECONDS = 30.0
IDEMPOTENCY_SECONDS = 24 * 3600.0
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u


class LeaseLost(Exception):
    """The job is no longer held under this claim: stop working on it and write nothing more."""


@dataclass(frozen=True)
class Job:
    """One row, decoded."""

    id: str
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

    @property
    def finished(self) -> bool:
        return self.state in TERMINAL


@dataclass(frozen=True)
class Claim:
    """The right to work on a job until the lease runs out; `fence` proves it in every write."""

    job: Job
    worker: str
    fence: int


@dataclass(frozen=True)
class Event:
    """One line of a job's history; `seq` grows over all jobs and is the cursor of readers."""

    seq: int
    job_id: str
    at: float
    level: str
    kind: str
    message: str
    data: Mapping[str, Any]


def new_id(prefix: str) -> str:
    """``ftjob-01jx…``: sorts by creation time to the millisecond, then at random (80 bits)."""
    number = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    return f"{prefix}-" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


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
        spec_digest: str,
        request: Mapping[str, Any] | None = None,
        suffix: str | None = None,
        priority: int = 0,
        idempotency_key: str | None = None,
        body_sha256: str = "",
        max_queued: int | None = None,
    ) -> tuple[Job, bool]:
        """Queue a job; returns it and whether it is new. The same key and body give the job that was made the first time.

        Raises:
            InvalidInput: the key was used with another body.
            QueueFull: the owner already has `max_queued` jobs that have not finished.
        """
        now = time.time()
        with writing(self.engine) as connection:
            if idempotency_key is not None:
                earlier = _earlier_answer(connection, owner, idempotency_key, body_sha256, now)
                if earlier is not None:
                    return _job(_row(connection, earlier, owner)), False
            if max_queued is not None:
                _check_quota(connection, owner, max_queued)
            job_id = new_id("ftjob")
            connection.execute(
                insert(jobs).values(
                    id=job_id, owner=owner, state="queued", priority=priority, spec=_dumps(spec), spec_digest=spec_digest,
                    request=None if request is None else _dumps(request), suffix=suffix, created_at=now, not_before=0.0,
                    attempts=0, stalled_attempts=0, fence=0,
                )
            )  # fmt: skip
            if idempotency_key is not None:
                answer = {
                    "owner": owner,
                    "key": idempotency_key,
                    "body_sha256": body_sha256,
                    "object_id": job_id,
                    "created_at": now,
                }
                connection.execute(insert(idempotency).values(answer))
            _record(connection, job_id, now, "info", "queued", "The job is queued.")
            return _job(_row(connection, job_id, owner)), True

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """One job; another owner's job does not exist (NotFound). `owner` None sees every job."""
        with self.engine.connect() as connection:
            return _job(_row(connection, job_id, owner))

    def list(
        self, owner: str | None = None, *, after: str | None = None, limit: int = 20, state: str | None = None
    ) -> tuple[Sequence[Job], bool]:
        """Newest first, from the one after `after`; returns the page and whether there is more."""
        query = select(jobs).order_by(jobs.c.id.desc()).limit(limit + 1)
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        if after is not None:
            query = query.where(jobs.c.id < after)
        if state is not None:
            query = query.where(jobs.c.state == state)
        with self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def queue_position(self, job: Job) -> int | None:
        """How many queued jobs will be claimed before this one; None when it is not queued."""
        if job.state != "queued":
            return None
        with self.engine.connect() as connection:
            mine = connection.execute(select(jobs.c.priority).where(jobs.c.id == job.id)).scalar_one()
            before = or_(jobs.c.priority > mine, and_(jobs.c.priority == mine, jobs.c.id < job.id))
            return connection.execute(select(func.count()).where(jobs.c.state == "queued", before)).scalar_one()

    def request_cancel(self, job_id: str, owner: str | None = None) -> Job:
        """A queued job is cancelled at once, a running one becomes ``cancelling``; asking again changes nothing.

        Raises:
            Conflict: the job has already succeeded or failed.
        """
        now = time.time()
        with writing(self.engine) as connection:
            row = _row(connection, job_id, owner)
            if row["state"] in ("succeeded", "failed"):
                raise Conflict(f"{job_id} has already {row['state']}; a finished job cannot be cancelled")
            if row["state"] == "queued":
                cancelled = {"state": "cancelled", "cancel_requested_at": now, "finished_at": now}
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancelled))
                _record(connection, job_id, now, "info", "cancelled", "The job was cancelled before it started.")
            elif row["state"] == "running":
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(state="cancelling", cancel_requested_at=now))
                _record(connection, job_id, now, "info", "cancelling", "Cancelling was asked for.")
            return _job(_row(connection, job_id, owner))

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> Sequence[Event]:
        """The job's events with ``seq > after``, oldest first."""
        query = select(job_events).where(job_events.c.job_id == job_id, job_events.c.seq > after)
        with self.engine.connect() as connection:
            rows = connection.execute(query.order_by(job_events.c.seq).limit(limit)).mappings().all()
        return [_event(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state (states without a job are left out)."""
        with self.engine.connect() as connection:
            rows = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
            return {str(state): int(count) for state, count in rows}

    # ── what workers do ──────────────────────────────────────────────────────────────────────────

    def claim(self, worker: str) -> Claim | None:
        """Take the next queued job under a fresh lease, or None when there is none to take now."""
        now = time.time()
        with writing(self.engine) as connection:
            next_id = connection.execute(
                select(jobs.c.id)
                .where(jobs.c.state == "queued", jobs.c.not_before <= now)
                .order_by(jobs.c.priority.desc(), jobs.c.created_at, jobs.c.id)
                .limit(1)
                .with_for_update(skip_locked=True)
            ).scalar_one_or_none()
            if next_id is None:
                return None
            taken = {
                **self._lease(lease_time(connection)), "state": "running", "lease_owner": worker, "fence": jobs.c.fence + 1,
                "attempts": jobs.c.attempts + 1, "started_at": func.coalesce(jobs.c.started_at, now), "phase": "preparing",
            }  # fmt: skip
            connection.execute(update(jobs).where(jobs.c.id == next_id).values(taken))
            row = _row(connection, next_id, None)
            _record(connection, next_id, now, "info", "running", f"Attempt {row['attempts']} started.", {"worker": worker})
            return Claim(_job(row), worker, row["fence"])

    def heartbeat(self, claim: Claim, *, phase: str | None = None, progress: Mapping[str, Any] | None = None) -> bool:
        """Renew the lease and publish where the run is; returns whether cancelling was asked for.

        Raises:
            LeaseLost: the job is held by somebody else, or has ended.
        """
        with writing(self.engine) as connection:
            values: dict[str, Any] = self._lease(lease_time(connection))
            if phase is not None:
                values["phase"] = phase
            if progress is not None:
                values |= {"progress": _dumps(progress), "progress_at": time.time()}
            self._write_held(connection, claim, values)
            return bool(_row(connection, claim.job.id, None)["state"] == "cancelling")

    def cancel_requested(self, claim: Claim) -> bool:
        """Whether cancelling was asked for; cheaper than a heartbeat, for polling each second."""
        with self.engine.connect() as connection:
            return connection.execute(select(jobs.c.state).where(jobs.c.id == claim.job.id)).scalar_one_or_none() == "cancelling"

    def forward_events(self, claim: Claim, records: Sequence[Mapping[str, Any]]) -> None:
        """Add to the job's history those of the run's own event lines (all of them, in order) that it does not have yet.

        A record has ``at``, ``kind`` and ``message``, perhaps ``level``; the rest becomes the event's data. Safe to repeat after
        a crash at any point: what was added is counted in the same transaction. LeaseLost as in `heartbeat`.
        """
        with writing(self.engine) as connection:
            self._write_held(connection, claim, self._lease(lease_time(connection)))
            have = connection.execute(select(func.max(job_events.c.line)).where(job_events.c.job_id == claim.job.id)).scalar_one()
            for line, record in enumerate(records):
                if have is None or line > have:
                    data = {key: value for key, value in record.items() if key not in ("at", "level", "kind", "message")}
                    level, kind, message = str(record.get("level", "info")), str(record["kind"]), str(record["message"])
                    _record(connection, claim.job.id, float(record["at"]), level, kind, message, data, line)

    def finish(
        self,
        claim: Claim,
        state: str,
        *,
        result: Mapping[str, Any] | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
    ) -> None:
        """End the job as succeeded, failed or cancelled, once; LeaseLost as in `heartbeat`."""
        if state not in TERMINAL:
            raise ValueError(f"{state!r} is not one of {TERMINAL}")
        now = time.time()
        ended = {
            "state": state, "finished_at": now, "lease_owner": None, "lease_until": None, "phase": None,
            "result": None if result is None else _dumps(result), "error_code": error_code, "error_message": error_message,
        }  # fmt: skip
        with writing(self.engine) as connection:
            self._write_held(connection, claim, ended)
            level = "error" if state == "failed" else "info"
            _record(
                connection, claim.job.id, now, level, state, error_message or f"The job {_ENDED[state]}.", {"code": error_code}
            )

    def hand_back(self, claim: Claim, reason: str, *, delay_seconds: float = 0.0, progressed: bool = True) -> None:
        """Put the job back in the queue (a dying worker, a failure that another attempt may cure); LeaseLost as in `heartbeat`.

        `progressed` says that this attempt left a newer checkpoint; attempts without one in a row are counted (see `stalled`).
        A job whose cancelling was asked for is cancelled instead.
        """
        now = time.time()
        with writing(self.engine) as connection:
            stalled = 0 if progressed else jobs.c.stalled_attempts + 1
            released = {"lease_owner": None, "lease_until": None, "stalled_attempts": stalled, "phase": None}
            if _row(connection, claim.job.id, None)["state"] == "cancelling":
                self._write_held(connection, claim, {**released, "state": "cancelled", "finished_at": now})
                _record(connection, claim.job.id, now, "info", "cancelled", "The job was cancelled.")
                return
            self._write_held(connection, claim, {**released, "state": "queued", "not_before": now + delay_seconds})
            _record(connection, claim.job.id, now, "warning", "requeued", reason, {"delay_seconds": delay_seconds})

    def stalled_attempts(self, claim: Claim) -> int:
        """How many attempts in a row ended without a new checkpoint before this one."""
        with self.engine.connect() as connection:
            return int(connection.execute(select(jobs.c.stalled_attempts).where(jobs.c.id == claim.job.id)).scalar_one())

    def reap(self) -> Sequence[str]:
        """Put jobs whose lease has run out back in the queue (or cancel them, if that was asked for); returns their ids."""
        now = time.time()
        with writing(self.engine) as connection:
            clock = lease_time(connection)
            expired = or_(jobs.c.lease_epoch != clock.epoch, jobs.c.lease_until < clock.seconds)
            query = select(jobs.c.id, jobs.c.state, jobs.c.lease_owner).where(jobs.c.state.in_(HELD), expired)
            rows = connection.execute(query.with_for_update(skip_locked=True)).all()
            for job_id, state, owner in rows:
                released: dict[str, Any] = {"lease_owner": None, "lease_until": None, "phase": None}
                if state == "cancelling":
                    connection.execute(
                        update(jobs).where(jobs.c.id == job_id).values(released, state="cancelled", finished_at=now)
                    )
                    _record(connection, job_id, now, "info", "cancelled", "The job was cancelled.")
                else:
                    connection.execute(update(jobs).where(jobs.c.id == job_id).values(**released, state="queued"))
                    lost = f"Worker {owner} stopped renewing its lease; the job is queued again and resumes."
                    _record(connection, job_id, now, "warning", "worker_lost", lost)
        return [row[0] for row in rows]

    def _lease(self, clock: LeaseTime) -> dict[str, Any]:
        return {"lease_until": clock.seconds + self.lease_seconds, "lease_epoch": clock.epoch}

    @staticmethod
    def _write_held(connection: Connection, claim: Claim, values: Mapping[str, Any]) -> None:
        held = and_(jobs.c.id == claim.job.id, jobs.c.state.in_(HELD), jobs.c.fence == claim.fence)
        if connection.execute(update(jobs).where(held).values(values)).rowcount != 1:
            raise LeaseLost(f"{claim.job.id} is no longer held under fence {claim.fence}")


class QueueFull(Conflict):
    code, http_status = "queue_full", 429


_ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "was cancelled"}


def _check_quota(connection: Connection, owner: str, max_queued: int) -> None:
    unfinished = select(func.count()).where(jobs.c.owner == owner, jobs.c.state.not_in(TERMINAL))
    if connection.execute(unfinished).scalar_one() >= max_queued:
        raise QueueFull(f"{max_queued} jobs of yours have not finished yet, and that is the limit; wait for one or cancel one")


def _earlier_answer(connection: Connection, owner: str, key: str, body_sha256: str, now: float) -> str | None:
    """The job made for this key before, if its answer is still kept."""
    found = connection.execute(
        select(idempotency.c.body_sha256, idempotency.c.object_id, idempotency.c.created_at).where(
            idempotency.c.owner == owner, idempotency.c.key == key
        )
    ).one_or_none()
    if found is None:
        return None
    if found.created_at < now - IDEMPOTENCY_SECONDS:
        connection.execute(idempotency.delete().where(idempotency.c.owner == owner, idempotency.c.key == key))
        return None
    if found.body_sha256 != body_sha256:
        raise InvalidInput(f"the Idempotency-Key {key!r} was used before with another body; send a new key with a new request")
    return str(found.object_id)


def _row(connection: Connection, job_id: str, owner: str | None) -> RowMapping:
    row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one_or_none()
    if row is None or (owner is not None and row["owner"] != owner):
        raise NotFound(f"no fine-tuning job {job_id!r}; list yours with GET /v1/fine_tuning/jobs")
    return row


def _record(
    connection: Connection,
    job_id: str,
    at: float,
    level: str,
    kind: str,
    message: str,
    data: Mapping[str, Any] | None = None,
    line: int | None = None,
) -> None:
    values = {
        "job_id": job_id,
        "at": at,
        "level": level,
        "kind": kind,
        "message": message,
        "data": _dumps(data or {}),
        "line": line,
    }
    connection.execute(insert(job_events).values(values))


def _job(row: RowMapping) -> Job:
    return Job(
        id=row["id"], owner=row["owner"], state=row["state"], phase=row["phase"], spec=json.loads(row["spec"]),
        request=_loads(row["request"]), suffix=row["suffix"], created_at=row["created_at"], started_at=row["started_at"],
        finished_at=row["finished_at"], attempts=row["attempts"], progress=_loads(row["progress"]), result=_loads(row["result"]),
        error_code=row["error_code"], error_message=row["error_message"], cancel_requested_at=row["cancel_requested_at"],
    )  # fmt: skip


def _event(row: RowMapping) -> Event:
    return Event(row["seq"], row["job_id"], row["at"], row["level"], row["kind"], row["message"], json.loads(row["data"] or "{}"))


def _dumps(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _loads(text: str | None) -> Any:
    return None if text is None else json.loads(text)
