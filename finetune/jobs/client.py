"""Jobs as whoever submits them sees them, in one form for two places: this machine's workspace and a server (`remote`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from finetune.jobs.database import open_jobs
from finetune.jobs.schema import TERMINAL
from finetune.jobs.store import LOCAL_OWNER, Event, Job, JobStore
from finetune.naming import dataset_name, model_name
from finetune.progress import ProgressCallback, silent
from finetune.spec import JobSpec
from finetune.storage.rundir import RunDir


@dataclass(frozen=True)
class JobView:
    """One job. Times are Unix seconds; `model` is ``name@version`` of what it made."""

    id: str
    state: str
    phase: str | None
    backbone: str
    method: str
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0
    progress: Mapping[str, Any] | None = None
    model: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.state in TERMINAL

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class EventView:
    """One line of a job's history; `seq` is the cursor for asking what came after it."""

    seq: int
    at: float
    level: str
    message: str


class JobsClient(Protocol):
    """What `finetune jobs` needs of either place."""

    def submit(self, spec: JobSpec, idempotency_key: str | None = None, progress: ProgressCallback = silent) -> JobView: ...
    def list(self, limit: int) -> Sequence[JobView]: ...
    def get(self, job_id: str) -> JobView: ...
    def cancel(self, job_id: str) -> JobView: ...
    def events(self, job_id: str, after: int = 0) -> Sequence[EventView]: ...

    def log(self, job_id: str, offset: int = 0) -> bytes:
        """What the job's processes have printed, from byte `offset` on."""


class LocalJobs:
    """The jobs of a workspace on this machine. Whoever can write its database sees every owner's."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = JobStore(open_jobs(home))

    def submit(self, spec: JobSpec, idempotency_key: str | None = None, progress: ProgressCallback = silent) -> JobView:
        """Queue a job; a worker on this machine will find its files by their absolute paths."""
        spec = spec.with_absolute_paths()
        spec = spec.model_copy(update={"suffix": model_name(spec.suffix, dataset_name(spec.training_file))})
        digest = spec.digest()
        job, _ = self.store.create(
            LOCAL_OWNER,
            spec.model_dump(mode="json"),
            spec_digest=digest,
            suffix=spec.suffix,
            idempotency_key=idempotency_key,
            body_sha256=digest,
        )
        return view(job)

    def list(self, limit: int) -> Sequence[JobView]:
        jobs, _ = self.store.list(limit=limit)
        return [view(job) for job in jobs]

    def get(self, job_id: str) -> JobView:
        return view(self.store.get(job_id))

    def cancel(self, job_id: str) -> JobView:
        return view(self.store.request_cancel(job_id))

    def events(self, job_id: str, after: int = 0) -> Sequence[EventView]:
        return [_event_view(event) for event in self.store.events(job_id, after=after)]

    def log(self, job_id: str, offset: int = 0) -> bytes:
        self.store.get(job_id)  # an unknown job is an error, not an empty log
        path = RunDir(self.home / "runs" / job_id).log
        if not path.exists():
            return b""
        with open(path, "rb") as stream:
            stream.seek(offset)
            return stream.read()


def view(job: Job) -> JobView:
    """A stored job as its owner sees it."""
    spec, result = job.spec, job.result or {}
    return JobView(
        id=job.id,
        state=job.state,
        phase=job.phase,
        backbone=spec["model"]["backbone"],
        method=spec["method"]["type"],
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        attempts=job.attempts,
        progress=job.progress if job.state in ("running", "cancelling") else None,
        model=f"{result['model']}@{result['version']}" if result else None,
        error_code=job.error_code,
        error_message=job.error_message,
        metrics=result.get("metrics", {}),
    )


def _event_view(event: Event) -> EventView:
    return EventView(event.seq, event.at, event.level, event.message)
