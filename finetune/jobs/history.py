"""Read-only queries for watching jobs: newest events of a job, updates of many jobs at once, owners of models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, func, select

from finetune.jobs import creation
from finetune.jobs.database import reading
from finetune.jobs.job import Event
from finetune.jobs.schema import TERMINAL, job_events, jobs

_IDS_A_QUERY = 500


@dataclass(frozen=True)
class Update:
    """The present state of a job, and its new events, oldest first."""

    state: str
    phase: str | None
    progress: Mapping[str, Any] | None
    events: Sequence[Event]

    @property
    def finished(self) -> bool:
        return self.state in TERMINAL


def newest_events(engine: Engine, job_id: str, *, before: int | None = None, limit: int = 20) -> tuple[Sequence[Event], bool]:
    """Return the job's events with ``seq < before``, newest first, and whether there are older ones."""
    query = select(job_events).where(job_events.c.job_id == job_id).order_by(job_events.c.seq.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(job_events.c.seq < before)
    with reading(engine) as connection:
        rows = connection.execute(query).mappings().all()
    return [Event.of(row) for row in rows[:limit]], len(rows) > limit


def updates(engine: Engine, known: Mapping[str, int]) -> dict[str, Update]:
    """Return the updates of many jobs by id, each with the events after ``known[job id]``. Deleted jobs are left out.

    Makes two queries for every 500 jobs, and one more for each job with new events. States are read before events: a job's last
    event is committed together with its final state, so the events of a finished job are complete.
    """
    ids = sorted(known)
    found: dict[str, Update] = {}
    with reading(engine) as connection:
        for start in range(0, len(ids), _IDS_A_QUERY):
            some = ids[start : start + _IDS_A_QUERY]
            columns = (jobs.c.id, jobs.c.state, jobs.c.phase, jobs.c.progress)
            rows = connection.execute(select(*columns).where(jobs.c.id.in_(some))).all()
            newest = select(job_events.c.job_id, func.max(job_events.c.seq)).where(job_events.c.job_id.in_(some))
            last = {row[0]: row[1] for row in connection.execute(newest.group_by(job_events.c.job_id))}
            for row in rows:
                fresh = _events(connection, row.id, known[row.id]) if last.get(row.id, 0) > known[row.id] else []
                found[row.id] = Update(row.state, row.phase, json.loads(row.progress or "null"), fresh)
    return found


def _events(connection: Connection, job_id: str, after: int) -> list[Event]:
    query = select(job_events).where(job_events.c.job_id == job_id, job_events.c.seq > after).order_by(job_events.c.seq)
    return [Event.of(row) for row in connection.execute(query).mappings()]


def model_owner(engine: Engine, name: str) -> str | None:
    """Return the owner of a model's name; None if no job made it."""
    with reading(engine) as connection:
        return creation.model_owner(connection, name)
