"""The store of jobs of every kind: the only code that changes the state of a job.

    queued ──claim──▶ running ──▶ succeeded | failed | cancelled        terminal states never change
      ▲                  │ ▲
      │                  ▼ │ (request_cancel)
      └── requeue ── cancelling ──▶ cancelled
          reap

A claim is a lease with a fencing token (`fence`). Every later write of the worker is conditional on the token; if it changes no
row, another worker has claimed the job. Every change of a job locks its row first, so that its events are numbered in the order
in which they happened.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import Engine, and_, delete, func, insert, or_, select, update

from finetune.errors import Conflict
from finetune.jobs.clock import LeaseTime, lease_time
from finetune.jobs.creation import (
    NameTaken,
    check_quota,
    creation_lock,
    earlier_object,
    model_owner,
    new_id,
    remember_object,
)
from finetune.jobs.database import reading, writing
from finetune.jobs.files import check_not_full, lock_files, stored_by
from finetune.jobs.job import Claim, Event, Job, job_of, storable_text, to_json
from finetune.jobs.kinds import BATCH, KINDS, TRAINING, Kind
from finetune.jobs.rows import (
    add_run_events,
    attempt_counts,
    claimable,
    end_time,
    expired,
    held_row,
    job_row,
    metadata_value,
    record_event,
    release_lost,
    released,
    write_held,
)
from finetune.jobs.schema import TERMINAL, UNFINISHED, idempotency, job_events, jobs

LEASE_SECONDS = 30.0
_ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "was cancelled"}


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
        reads: Collection[str] = (),
        models_bytes: int = 0,
        max_owner_bytes: int | None = None,
    ) -> tuple[Job, bool]:
        """Queue a job; return it and whether it is new. The same key and body return the job of the first request.

        Args:
            any_suffix: allow a suffix that belongs to another owner's model; the job then makes a new version of it.
            reads: ids of the uploads that the job reads. They must still exist; from now on they cannot be deleted.
            models_bytes: disk space of the owner's models, which are in the registry, not in the database.
            max_owner_bytes: limit on the disk space of the owner's uploads, finished jobs and models.

        Raises:
            InvalidInput: the key was used with another body.
            NotFound: an upload of `reads` was deleted in the meantime.
            QueueFull: the owner already has `max_queued` unfinished jobs.
            NameTaken: the suffix belongs to another owner.
            FilesFull: the owner already stores more than `max_owner_bytes`.
        """
        now = time.time()
        with writing(self.engine) as connection:
            creation_lock(connection, owner, suffix)
            earlier = earlier_object(connection, owner, idempotency_key, body_sha256)
            if earlier is not None:
                return job_of(job_row(connection, earlier, owner)), False
            lock_files(connection, reads)
            if suffix is not None and not any_suffix and model_owner(connection, suffix) not in (None, owner):
                raise NameTaken(suffix)
            if max_queued is not None:
                check_quota(connection, owner, max_queued)
            if max_owner_bytes is not None:
                check_not_full(stored_by(connection, owner) + models_bytes, max_owner_bytes)
            job_id = new_id(kind.prefix)
            connection.execute(
                insert(jobs).values(
                    id=job_id, kind=kind.name, owner=owner, state="queued", priority=priority, spec=to_json(spec),
                    spec_digest=spec_digest, request=None if request is None else to_json(request), suffix=suffix, created_at=now,
                )
            )  # fmt: skip
            remember_object(connection, owner, idempotency_key, body_sha256, job_id)
            record_event(connection, job_id, now, "queued", "The job is queued.")
            return job_of(job_row(connection, job_id, owner)), True

    def get(self, job_id: str, owner: str | None = None, kind: Kind | None = None) -> Job:
        """Return a job of `owner` and `kind`, each any if None. Raises NotFound also if the job has another owner or kind."""
        with reading(self.engine) as connection:
            return job_of(job_row(connection, job_id, owner, kind))

    def newest(self, limit: int) -> Sequence[Job]:
        """Return the newest jobs of all kinds and owners, newest first."""
        query = select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        with reading(self.engine) as connection:
            return [job_of(row) for row in connection.execute(query).mappings()]

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
            query = query.where(metadata_value(self.engine.dialect.name, key) == value)
        with reading(self.engine) as connection:
            rows = connection.execute(query).mappings().all()
        return [job_of(row) for row in rows[:limit]], len(rows) > limit

    def batches_with(self, name: str, version: str | None = None) -> Sequence[Job]:
        """Return the unfinished batch predictions by a model, or by one version of it, of all owners, oldest first."""
        query = select(jobs).where(jobs.c.kind == BATCH.name, jobs.c.state.in_(UNFINISHED)).order_by(jobs.c.id)
        with reading(self.engine) as connection:
            found = [job_of(row) for row in connection.execute(query).mappings()]
        wanted = [str(job.spec.get("model") or "").partition("@") for job in found]
        return [job for job, (of, _, its) in zip(found, wanted, strict=True) if of == name and version in (None, its)]

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
            row = job_row(connection, job_id, owner, kind, lock=True)
            if row["state"] in ("succeeded", "failed"):
                raise Conflict(f"{job_id} has already {row['state']}; a finished job cannot be cancelled")
            if row["state"] == "queued":
                cancelled = {"state": "cancelled", "cancel_requested_at": now, "finished_at": end_time(row, now)}
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancelled))
                record_event(connection, job_id, now, "cancelled", "The job was cancelled while it was queued.")
            elif row["state"] == "running":
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(state="cancelling", cancel_requested_at=now))
                record_event(connection, job_id, now, "cancelling", "Cancellation was requested.")
            return job_of(job_row(connection, job_id, owner))

    def delete(self, job_id: str, owner: str | None = None, kind: Kind | None = None) -> None:
        """Delete a job that has ended, with its events. The model that it registered is kept.

        Raises:
            NotFound: there is no such job.
            Conflict: it has not ended, or another unfinished job uses its run.
        """
        with writing(self.engine) as connection:
            row = job_row(connection, job_id, owner, kind, lock=True)
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
            if connection.execute(claimable(lease_time(connection), kinds)).first() is None:
                return None
        now = time.time()
        with writing(self.engine) as connection:
            clock = lease_time(connection)
            job_id = connection.execute(claimable(clock, kinds).with_for_update(skip_locked=True, of=jobs)).scalar_one_or_none()
            if job_id is None:
                return None
            taken = {
                **self._lease(clock), "state": "running", "lease_owner": worker, "fence": jobs.c.fence + 1, "progressed": False,
                "attempts": jobs.c.attempts + 1, "started_at": func.coalesce(jobs.c.started_at, now), "phase": "preparing",
            }  # fmt: skip
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(taken))
            row = job_row(connection, job_id, None)
            record_event(connection, job_id, now, "running", f"Attempt {row['attempts']} started.", data={"worker": worker})
            return Claim(job_of(row), worker, row["fence"])

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
            row = held_row(connection, claim)
            values: dict[str, Any] = self._lease(lease_time(connection))
            if phase is not None:
                values["phase"] = phase
            if progress is not None:
                values |= {"progress": to_json(progress), "progress_at": time.time()}
            if progressed:
                values["progressed"] = True
            write_held(connection, claim, values)
            add_run_events(connection, claim.job.id, records)
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
        error_message = None if error_message is None else storable_text(error_message)
        with writing(self.engine) as connection:
            row = held_row(connection, claim)
            values = {
                "result": None if result is None else to_json(result),
                "error_code": error_code,
                "error_message": error_message,
                "stored_bytes": stored_bytes,
            }
            write_held(connection, claim, {**released(), **values, "state": state, "finished_at": end_time(row, now)})
            event_message = error_message or message or f"The job {_ENDED[state]}."
            level = "error" if state == "failed" else "info"
            record_event(
                connection, claim.job.id, now, state, event_message, level=level, data={"code": error_code} if error_code else {}
            )

    def requeue(
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
            row = held_row(connection, claim)
            if row["state"] == "cancelling":
                write_held(connection, claim, {**released(), "state": "cancelled", "finished_at": end_time(row, now)})
                record_event(connection, claim.job.id, now, "cancelled", "The job was cancelled.")
                return
            clock = lease_time(connection)
            waiting = {"state": "queued", "not_before": clock.seconds + delay_seconds, "clock_epoch": clock.epoch}
            write_held(connection, claim, {**released(), **waiting, **attempt_counts(row, counted)})
            record_event(
                connection,
                claim.job.id,
                now,
                "requeued",
                reason,
                level="warning",
                data={"delay_seconds": round(delay_seconds, 1)},
            )

    def attempts_without_progress(self, claim: Claim) -> tuple[int, int]:
        """Return the numbers of consecutive attempts without a new checkpoint, if this one counts as stalled and as lost."""
        with reading(self.engine) as connection:
            row = job_row(connection, claim.job.id, None)
            return attempt_counts(row, "stalled")["stalled_attempts"], attempt_counts(row, "lost")["lost_attempts"]

    def reap(self) -> Sequence[str]:
        """Return jobs with an expired lease to the queue, or cancel them if that was requested; return their ids."""
        with reading(self.engine) as connection:
            if connection.execute(expired(lease_time(connection))).first() is None:
                return []
        now = time.time()
        with writing(self.engine) as connection:
            rows = connection.execute(expired(lease_time(connection)).with_for_update(skip_locked=True)).mappings().all()
            for row in rows:
                release_lost(connection, row, now)
        return [row["id"] for row in rows]

    def _lease(self, clock: LeaseTime) -> dict[str, Any]:
        return {"lease_until": clock.seconds + self.lease_seconds, "clock_epoch": clock.epoch}
