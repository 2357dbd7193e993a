"""Documents of jobs, events and checkpoints, in the form of the public fine-tuning API with additional fields."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from finetune.advice import for_http
from finetune.jobs.job import Event, Job
from finetune.storage.files import found_in, modified_ns
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from service.event_streams import EVENT_PREFIX
from service.schemas.lists import ListItem, Page

JobStatus = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
_LEVELS: Mapping[str, Literal["info", "warn", "error"]] = {"warning": "warn", "error": "error"}
_ABOUT_THE_DATA = ("invalid_data", "invalid_image", "dataset_changed")
_ABOUT_THE_MODEL = ("unknown_backbone", "weights_unavailable")


class JobError(BaseModel):
    """Why a job failed."""

    code: str = Field(description="A stable code for programs.")
    message: str
    param: str | None = None


class ProgressDocument(BaseModel):
    """The progress of the run: `done` of `total` `unit`s of the phase."""

    phase: str
    done: int
    total: int
    unit: str
    values: dict[str, float | None] = {}
    message: str = ""


class JobState(ListItem):
    """The state of a job of any kind. `status` is one of the fixed names, including `cancelling`."""

    created_at: int = Field(description="Unix seconds, like all times.")
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    status: JobStatus
    phase: str | None = Field(description="preparing, features, training, evaluating, exporting, registering or runs.")
    progress: ProgressDocument | None
    attempts: int = Field(description="How often the job was started; if its worker dies, it is started again and resumes.")
    queue_position: int | None = Field(description="While the job is queued: the number of jobs before it.")
    organization_id: str = Field(description="Whose job it is.")


class JobDocument(JobState):
    """A fine-tuning job."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    model: str = Field(description="The backbone.")
    fine_tuned_model: str | None = Field(description="The registered model's name, once there is one.")
    fine_tuned_version: str | None
    method: dict[str, Any]
    hyperparameters: dict[str, Any] = Field(
        description="The resolved values, or `auto` until the run has resolved them. Null: not used. The object can be "
        "sent in a new request."
    )
    seed: int
    suffix: str | None
    training_file: str
    validation_file: str | None
    test_file: str | None
    metadata: dict[str, str]
    metrics: dict[str, float | None] = Field(description="Metrics of the finished model, by `split/name`.")
    error: JobError | None
    result_files: list[str] = Field(default=[], description="Paths on this server: result, report, bundle.")
    integrations: list[dict[str, Any]] = Field(default=[])
    trained_tokens: int | None = None


class ResultDocument(BaseModel):
    """The result of a finished job."""

    object: Literal["fine_tuning.job.result"] = "fine_tuning.job.result"
    job_id: str
    status: JobStatus
    model: str | None = Field(description="The registered model.")
    version: str | None
    classes: list[str]
    method: dict[str, Any]
    hyperparameters: dict[str, Any] = Field(
        description="The resolved values: no field is `auto`. Null: not used, such as the learning rate of a linear probe."
    )
    metrics: dict[str, float | None] = Field(description="By `split/name`.")
    cost: dict[str, float | None] = Field(description="Seconds, bytes, parameters, the latency of one prediction.")
    splits: dict[str, Any] = Field(
        description="By split: number of images, metrics with intervals, table by class, confusion matrix."
    )
    cross_validation: dict[str, Any] | None
    warnings: list[str]
    summary: str
    license: str | None = Field(description="Licence of the pretrained weights.")
    links: dict[str, str | None] = Field(description="Paths on this server: version, report, bundle; null if there is none.")


class EventDocument(ListItem):
    """One event in a job's history."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    kind: str = Field(description="The kind of event, for programs: queued, running, warning, requeued, …")
    data: dict[str, Any]


EventList = Page[EventDocument]


class CheckpointMetrics(BaseModel):
    """The metrics of a checkpoint's step."""

    step: int
    train_loss: float | None = None
    valid_loss: float | None = None
    values: dict[str, float | None] = Field({}, description="All metrics of that step, by `split/name`.")


class CheckpointDocument(ListItem):
    """One checkpoint of a job's run."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str = Field(
        description="A checkpoint that the run can resume from; it is not a model that can be served."
    )
    step_number: int
    metrics: CheckpointMetrics


CheckpointList = Page[CheckpointDocument]


def job_document(
    job: Job, *, queue_position: int | None, within: Callable[[str], str], resolved: Mapping[str, Any] | None = None
) -> JobDocument:
    """Return the document of a fine-tuning job.

    Args:
        within: removes local paths from texts.
        resolved: the resolved hyperparameters of the run.
    """
    spec, result = job.spec, job.result or {}
    asked = job.request or spec
    return JobDocument(
        **job_state(job, queue_position),
        model=spec["model"]["backbone"],
        fine_tuned_model=result.get("model"),
        fine_tuned_version=result.get("version"),
        method=dict(spec["method"]),
        hyperparameters={**spec["hyperparameters"], **_decided(spec["hyperparameters"], resolved or {})},
        seed=spec["seed"],
        suffix=job.suffix,
        training_file=asked["training_file"],
        validation_file=asked.get("validation_file"),
        test_file=asked.get("test_file"),
        metadata=dict(spec["metadata"]),
        metrics=dict(result.get("metrics", {})),
        error=job_error(job, within),
        result_files=result_links(job.id, result),
    )


def job_state(job: Job, queue_position: int | None) -> dict[str, Any]:
    """Return the fields of `JobState` for a job."""
    progress = ProgressDocument.model_validate(job.progress) if job.progress and not job.finished else None
    return {
        "id": job.id,
        "created_at": int(job.created_at),
        "started_at": _whole(job.started_at),
        "finished_at": _whole(job.finished_at),
        "estimated_finish": _estimated_finish(progress),
        "status": job.state,
        "phase": job.phase,
        "progress": progress,
        "attempts": job.attempts,
        "queue_position": queue_position,
        "organization_id": job.owner,
    }


def _decided(asked: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved values of the fields that were requested as ``auto``, as a request may give them.

    They are null if the run does not use them. The training size of images that are not square is its shorter side.
    """
    found = {key: resolved[key] for key, value in asked.items() if value == "auto" and key in resolved}
    if found.get("train_size_px"):
        found["train_size_px"] = min(found["train_size_px"])
    return found


def result_links(job_id: str, result: Mapping[str, Any]) -> list[str]:
    """Return the URL paths of a finished job's result, report and bundle."""
    if not result:
        return []
    links = [f"/v1/fine_tuning/jobs/{job_id}/result"]
    if result.get("model") is not None:
        place = f"/v1/models/{result['model']}/versions/{result['version']}"
        links += [f"{place}/report", f"{place}/bundle"]
    return links


def _estimated_finish(progress: ProgressDocument | None) -> int | None:
    """Return the estimated end of the present phase, in Unix seconds. Training takes nearly all the time of a run."""
    seconds = None if progress is None else progress.values.get("eta_seconds")
    return None if seconds is None else int(time.time() + seconds)


def job_error(job: Job, within: Callable[[str], str]) -> JobError | None:
    """Return the error of a failed job, else None; `within` removes local paths from its message."""
    if job.error_code is None:
        return None
    param = "training_file" if job.error_code in _ABOUT_THE_DATA else "model" if job.error_code in _ABOUT_THE_MODEL else None
    return JobError(code=job.error_code, message=for_http(within(job.error_message or "")), param=param)


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def event_document(event: Event, within: Callable[[str], str]) -> EventDocument:
    """Return the document of an event; `within` removes local paths from texts."""
    return EventDocument(
        id=f"{EVENT_PREFIX}{event.seq}",
        created_at=int(event.at),
        level=_LEVELS.get(event.level, "info"),
        message=within(event.message),
        kind=event.kind,
        data=json.loads(within(json.dumps(dict(event.data), ensure_ascii=False))),
    )


def checkpoint_documents(job_id: str, run: RunDir) -> list[CheckpointDocument]:
    """Return the complete checkpoints of a run, newest first, each with the last metrics up to its step."""
    rows = read_lines(run.metrics)
    found = []
    for checksum in found_in(run.checkpoints, "step-*.sha256"):  # written last, so the checkpoint is complete
        matched, created_ns = re.match(r"step-(\d+)", checksum.name), modified_ns(checksum)
        if matched is None or created_ns is None:  # None: the run has made newer ones, and keeps only a few
            continue
        step = int(matched[1])
        values: dict[str, float | None] = {}
        for row in rows:
            if row["step"] <= step:
                values |= row["values"]
        metrics = CheckpointMetrics(
            step=step, train_loss=values.get("train/loss"), valid_loss=values.get("val/loss"), values=values
        )
        found.append(
            CheckpointDocument(
                id=f"ftckpt-{job_id.removeprefix('ftjob-')}-{step}",
                created_at=created_ns // 10**9,
                fine_tuning_job_id=job_id,
                fine_tuned_model_checkpoint=f"{job_id}:step-{step}",
                step_number=step,
                metrics=metrics,
            )
        )
    return sorted(found, key=lambda one: -one.step_number)
