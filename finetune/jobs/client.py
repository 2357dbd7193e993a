"""The client's view of jobs, with one interface for two places: this machine's workspace, and a server (`remote`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from finetune.comparison_spec import ComparedRuns, ComparisonSpec
from finetune.errors import Conflict
from finetune.jobs.creation import digest_of
from finetune.jobs.database import open_jobs
from finetune.jobs.job import LOCAL_OWNER, Event, Job
from finetune.jobs.kinds import COMPARISON, TRAINING, Kind
from finetune.jobs.schema import TERMINAL
from finetune.jobs.store import JobStore
from finetune.jobs.tracking import mlflow_run_of
from finetune.naming import dataset_name, model_name
from finetune.progress import ProgressCallback, silent
from finetune.spec import JobSpec
from finetune.storage.rundir import RunDir

Request = JobSpec | ComparisonSpec | ComparedRuns


@dataclass(frozen=True)
class JobView:
    """One job. Times are Unix seconds; `what` summarises the request; `model` is the ``name@version`` that the job registered."""

    id: str
    kind: str
    what: str
    state: str
    phase: str | None
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0
    progress: Mapping[str, Any] | None = None
    model: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    conclusion: str | None = None  # the result of a comparison as a sentence
    backbone: str | None = None  # of a fine-tuning job
    method: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.state in TERMINAL

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class EventView:
    """One event in a job's history; pass `seq` as `after` to get later events."""

    seq: int
    at: float
    level: str
    message: str


class JobsClient(Protocol):
    """The operations that `finetune jobs` and `finetune compare` need, on a workspace or a server."""

    def submit(self, asked: Request, idempotency_key: str | None = None, progress: ProgressCallback = silent) -> JobView:
        """Queue a job; the same idempotency key and request return the job of the first call."""
        ...

    def list(self, limit: int) -> Sequence[JobView]:
        """Return the newest jobs of all kinds, newest first."""
        ...

    def get(self, job_id: str) -> JobView:
        """Return one job. Raises NotFound or, from a server, RequestRefused."""
        ...

    def cancel(self, job_id: str) -> JobView:
        """Request the cancellation of a job; return the job."""
        ...

    def events(self, job_id: str, after: int = 0) -> Sequence[EventView]:
        """Return the events of a job with ``seq > after``, oldest first."""
        ...

    def result(self, job_id: str) -> Mapping[str, Any]:
        """Return the result document of a job that has succeeded."""

    def log(self, job_id: str, offset: int = 0) -> bytes:
        """Return the output of the job's processes, from byte `offset` on."""


class LocalJobs:
    """The jobs of a workspace on this machine, of all owners: no key is needed by a user who can write the database."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = JobStore(open_jobs(home))

    def submit(self, asked: Request, idempotency_key: str | None = None, progress: ProgressCallback = silent) -> JobView:
        """Queue a job. File names become absolute paths, so that a worker on this machine finds them."""
        kind, spec, suffix = _as_queued(asked)
        digest = digest_of(spec)
        job, _ = self.store.create(
            LOCAL_OWNER,
            spec,
            kind=kind,
            spec_digest=digest,
            suffix=suffix,
            idempotency_key=idempotency_key,
            body_sha256=digest,
        )
        return view(job)

    def list(self, limit: int) -> Sequence[JobView]:
        return [view(job) for job in self.store.newest(limit)]

    def get(self, job_id: str) -> JobView:
        return view(self.store.get(job_id))

    def cancel(self, job_id: str) -> JobView:
        return view(self.store.request_cancel(job_id))

    def events(self, job_id: str, after: int = 0) -> Sequence[EventView]:
        return [_event_view(event) for event in self.store.events(job_id, after=after)]

    def result(self, job_id: str) -> Mapping[str, Any]:
        job = self.store.get(job_id)
        if job.result is None:
            raise Conflict(f"{job_id} is {job.state}; only a job that has succeeded has a result")
        return {**job.result, "mlflow_run_id": mlflow_run_of(RunDir(self.home / "runs" / job_id))}

    def log(self, job_id: str, offset: int = 0) -> bytes:
        self.store.get(job_id)  # an unknown job is an error, not an empty log
        path = RunDir(self.home / "runs" / job_id).log
        if not path.exists():
            return b""
        with open(path, "rb") as stream:
            stream.seek(offset)
            return stream.read()


def _as_queued(asked: Request) -> tuple[Kind, dict[str, Any], str | None]:
    """Return a request as it is queued: its kind, the spec for the command, and the name of the model that it may register."""
    if isinstance(asked, ComparedRuns):
        absolute = [str(Path(run).absolute()) for run in asked.runs]
        return COMPARISON, {**asked.model_dump(mode="json"), "runs": absolute}, None
    if isinstance(asked, ComparisonSpec):
        located = asked.with_absolute_paths()
        job = _named(located.job)
        return COMPARISON, located.with_job(job).to_dict(), job.suffix if asked.settings.register_chosen else None
    spec = _named(asked.with_absolute_paths())
    return TRAINING, spec.model_dump(mode="json"), spec.suffix


def _named(spec: JobSpec) -> JobSpec:
    """Return the spec with `suffix` set to the name under which its model will be registered."""
    return spec.model_copy(update={"suffix": model_name(spec.suffix, dataset_name(spec.training_file))})


def view(job: Job) -> JobView:
    """Return the client's view of a stored job."""
    spec, result, kind = job.spec, job.result or {}, job.kind
    is_training = kind is TRAINING
    return JobView(
        id=job.id,
        kind=kind.name,
        what=kind.describe(spec),
        state=job.state,
        phase=job.phase,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        attempts=job.attempts,
        progress=job.progress if job.state in ("running", "cancelling") else None,
        model=kind.registered(result) if result else None,
        error_code=job.error_code,
        error_message=job.error_message,
        conclusion=kind.conclude(result) if result and not is_training else None,
        backbone=spec["model"]["backbone"] if is_training else None,
        method=spec["method"]["type"] if is_training else None,
        metrics=result.get("metrics", {}),
    )


def _event_view(event: Event) -> EventView:
    return EventView(event.seq, event.at, event.level, event.message)
