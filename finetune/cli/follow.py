"""Show jobs and API keys in a terminal: a progress bar with the job's events above it, and tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from finetune.cli.terminal import table
from finetune.messages import duration
from finetune.progress import Progress
from finetune.progress_bars import console, progress_bars
from finetune.tasks import TASKS
from finetune.tasks.leading import recorded_leading

if TYPE_CHECKING:
    from finetune.jobs.client import EventView, JobsClient, JobView
    from finetune.jobs.keys import ApiKey

POLL_SECONDS = 1.0
NO_WORKER_SECONDS = 10.0  # a job that is queued for this long without events may have no worker
_COLOURS = {"error": "red", "warning": "yellow", "warn": "yellow"}


def follow(client: JobsClient, job: JobView, *, shown: bool, poll_seconds: float = POLL_SECONDS) -> JobView:
    """Show the events and progress of a job until it ends; return the finished job."""
    seen, followed_since, hinted = 0, time.monotonic(), False
    try:
        with progress_bars(shown=shown) as bars:
            while True:
                job = client.get(job.id)
                for event in client.events(job.id, after=seen):
                    seen = event.seq
                    if shown:
                        show_event(event)
                if job.finished:
                    break
                if job.progress is not None:
                    bars(_progress(job.progress))
                if shown and not hinted and job.state == "queued" and time.monotonic() - followed_since > NO_WORKER_SECONDS:
                    hinted = True
                    console.print("still queued: is there a worker? finetune worker starts one", style="yellow")
                time.sleep(poll_seconds)
    except KeyboardInterrupt:
        if shown:
            console.print(
                f"the job goes on: finetune jobs show {job.id} --follow, or finetune jobs cancel {job.id}", markup=False
            )
        raise
    if shown:
        show_job(job, ())
    return job


def _progress(document: Mapping[str, Any]) -> Progress:
    values = {name: value for name, value in document["values"].items() if value is not None}
    return Progress(document["phase"], document["done"], document["total"], document["unit"], values, document["message"])


def show_event(event: EventView) -> None:
    """Print one event with its time, coloured by its level."""
    console.print(f"{_clock(event.at)}  {event.message}", style=_COLOURS.get(event.level), markup=False)


def show_job(job: JobView, events: Sequence[EventView]) -> None:
    """Print one job for `finetune jobs show`: state, result or error, and history."""
    facts = [["state", _state(job)], ["what", job.what], ["created", _date(job.created_at)]]
    if job.started_at is not None:
        facts.append(["took" if job.finished_at else "runs since", _running_time(job)])
    if job.attempts > 1:
        facts.append(["attempts", str(job.attempts)])
    if job.progress is not None:
        facts.append(["progress", f"{job.progress['done']} of {job.progress['total']} {job.progress['unit']}"])
    if job.model is not None:
        facts.append(["model", job.model])
    shown = _leading_names(job.metrics)
    facts += [[name, f"{value:.4f}"] for name, value in job.metrics.items() if name in shown]
    if job.conclusion is not None:
        facts.append(["verdict", job.conclusion])
    if job.error_message is not None:
        facts.append([f"error ({job.error_code})", job.error_message])
    table(job.id, ["what", "value"], facts)
    for event in events:
        show_event(event)


def _leading_names(metrics: Mapping[str, float]) -> list[str]:
    """Return the keys of the metrics to show: for each split the metric that is reported first, and the headline."""
    splits = dict.fromkeys(name.partition("/")[0] for name in metrics)
    tasks = [task for task in TASKS if any(f"{split}/{task.headline.key}" in metrics for split in splits)]
    return [
        f"{split}/{key}"
        for task in tasks
        for split in splits
        for key in (recorded_leading(task, metrics, split).key, task.headline.key)
    ]


def show_jobs(jobs: Sequence[JobView]) -> None:
    """Print a table of jobs for `finetune jobs list`."""
    if not jobs:
        console.print("no job yet: `finetune jobs submit FOLDER` queues one")
        return
    rows = [[job.id, _state(job), job.what, _date(job.created_at), job.model or job.error_code or ""] for job in jobs]
    table("", ["job", "state", "what", "created", "model or error"], rows)


def _state(job: JobView) -> str:
    return job.state if job.phase is None else f"{job.state}, {job.phase}"


def show_keys(keys: Sequence[ApiKey]) -> None:
    """Print a table of API keys for `finetune keys list`."""
    if not keys:
        console.print("no key yet: `finetune keys create OWNER` creates one")
        return
    now = time.time()
    rows = [
        [key.id, key.owner, ", ".join(sorted(key.scopes)), _key_state(key, now), _date(key.created_at), _date(key.last_used_at)]
        for key in keys
    ]
    table("", ["key", "owner", "scopes", "state", "created", "last used"], rows)


def _key_state(key: ApiKey, now: float) -> str:
    if key.revoked_at is not None:
        return f"revoked {_date(key.revoked_at)}"
    if key.expires_at is None:
        return "valid"
    return f"{'expired' if key.expires_at <= now else 'valid until'} {_date(key.expires_at)}"


def _running_time(job: JobView) -> str:
    return duration(max(0.0, (job.finished_at or time.time()) - (job.started_at or 0.0)))


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%H:%M:%S")


def _date(at: float | None) -> str:
    return "never" if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")
