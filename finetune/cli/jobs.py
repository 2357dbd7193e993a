"""`worker`, `jobs` and `keys`: the job queue and API keys. None of these commands needs torch."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.executing import executor_options
from finetune.cli.training import json_option, spec_options

if TYPE_CHECKING:
    from finetune.jobs.client import JobsClient, JobView
    from finetune.spec import JobSpec

EXIT_CODES = {"succeeded": 0, "failed": 1, "cancelled": 130}
SECONDS_PER_DAY = 86400.0


@click.command()
@click.option("--slots", type=click.IntRange(min=1), help="Number of jobs in parallel. Default: one per GPU, else 1.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Number of CPU threads for all jobs together. Default: the cores of this machine.",
)
@click.option("--gpus", metavar="0,1", help="CUDA devices to use. Default: all visible ones; with Ray, none.")
@click.option("--stall-minutes", default=30.0, show_default=True, help="Restart a job that has written nothing for this time.")
@click.option(
    "--max-memory-gib",
    type=click.FloatRange(min=0.0, min_open=True),
    envvar="FINETUNE_MAX_JOB_MEMORY_GIB",
    help="Fail a job that uses more memory than this. Default: no limit.",
)
@click.option(
    "--kinds",
    metavar="KIND,…",
    help="Kinds of jobs to run: training, comparison, batch, check. Default: all that the installed packages allow.",
)
@click.option("--until-idle", is_flag=True, help="Exit when no job is queued or running.")
@executor_options("Where jobs run.")
def worker(
    slots: int | None,
    threads: int | None,
    gpus: str | None,
    stall_minutes: float,
    max_memory_gib: float | None,
    kinds: str | None,
    until_idle: bool,
    executor: str,
    ray_address: str | None,
) -> None:
    """Run queued jobs, each in a process of its own.

    Any number of workers may share a workspace. Ctrl-C or SIGTERM stops the worker and puts its running jobs back into the
    queue. If a worker dies, its jobs are resumed by another one from their newest checkpoints. `finetune serve` runs a worker
    itself. Without torch, a worker runs batch predictions only.

    With --executor ray, each job runs on a Ray cluster with --threads / --slots cores and, if --gpus lists one device per slot,
    one GPU.
    """
    from finetune.executors import open_executor
    from finetune.jobs.database import open_jobs
    from finetune.jobs.store import JobStore
    from finetune.jobs.worker import Worker, WorkerSettings
    from finetune.runtime.cores import available_cores
    from finetune.runtime.device import visible_gpus
    from finetune.runtime.logs import configure_logs, wants_json
    from finetune.runtime.tracing import tracing_from_environment
    from finetune.storage.workspace import Workspace

    workspace = Workspace.from_environment()
    configure_logs("finetune.jobs", as_json=wants_json(os.environ))
    on_ray = executor == "ray"
    devices = _numbers(gpus) if gpus is not None else () if on_ray else visible_gpus()
    settings = WorkerSettings(
        slots=slots or len(devices) or 1,
        threads=threads or available_cores(),
        gpus=devices,
        stall_seconds=60 * stall_minutes,
        max_memory_bytes=None if max_memory_gib is None else int(max_memory_gib * 2**30),
        kinds=_kinds(kinds),
    )
    runs = open_executor(executor, ray_address=ray_address, stop_seconds=settings.cancel_grace_seconds)
    tracing = tracing_from_environment()
    try:
        Worker(JobStore(open_jobs(workspace.root)), runs, workspace.root, settings, tracing).run(until_idle=until_idle)
    finally:
        if tracing is not None:
            tracing.stop()


def _kinds(text: str | None) -> tuple[str, ...]:
    from finetune.jobs.kinds import KINDS, runnable_kinds

    if text is None:
        return runnable_kinds()
    asked = tuple(name.strip() for name in text.split(",") if name.strip())
    if not asked or any(name not in KINDS for name in asked):
        raise click.BadParameter(
            f"{text!r}: expected one or more of {', '.join(KINDS)}, separated by commas", param_hint="--kinds"
        )
    return asked


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: expected device numbers separated by commas, such as 0,1", param_hint="--gpus"
        ) from None


@click.group()
def jobs() -> None:
    """Queue and follow jobs, in this workspace or on a server.

    \b
    finetune jobs submit photos --method full --server http://gpu-box:3000
    finetune jobs list
    finetune jobs show ftjob-… --follow
    """


def place_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--server`` to a command, which is called with a `client` of that server, or of the workspace."""

    def build(*, server: str | None, **given: Any) -> Any:
        return command(client=client_of(server), **given)

    option = click.option(
        "--server",
        metavar="URL",
        envvar="FINETUNE_SERVER",
        help="Use this server instead of the workspace; the key is read from FINETUNE_API_KEY.",
    )
    return option(functools.update_wrapper(build, command))


def client_of(server: str | None) -> JobsClient:
    """Return the jobs client of a server, with the API key from the environment, or of this workspace."""
    from finetune.jobs.client import LocalJobs
    from finetune.jobs.remote import RemoteJobs
    from finetune.storage.workspace import Workspace

    return RemoteJobs(server, os.environ.get("FINETUNE_API_KEY")) if server else LocalJobs(Workspace.from_environment().root)


@jobs.command()
@spec_options
@place_option
@click.option("--detach", is_flag=True, help="Print the id of the job and exit without waiting for its end.")
@click.option(
    "--idempotency-key", metavar="KEY", help="Makes repetition safe: the same key and spec, sent again, return the same job."
)
@json_option
def submit(spec: JobSpec, client: JobsClient, detach: bool, idempotency_key: str | None, as_json: bool) -> None:
    """Queue a fine-tuning job and follow it to its end.

    The arguments are those of `finetune train`. Ctrl-C stops following, but not the job. Exit codes: 0 succeeded, 1 failed, 130
    cancelled.

    \b
    finetune jobs submit photos --method full --server http://gpu-box:3000
    """
    from finetune.cli.follow import follow
    from finetune.cli.terminal import print_json
    from finetune.progress_bars import console, progress_bars

    with progress_bars(shown=not as_json) as progress:
        job = client.submit(spec, idempotency_key, progress)
    if not as_json:
        console.print(f"job {job.id}", markup=False)
    if not detach:
        job = follow(client, job, shown=not as_json)
    print_json(job.to_dict()) if as_json else click.echo(job.id)
    sys.exit(0 if detach else EXIT_CODES[job.state])


@jobs.command("list")
@place_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1))
@json_option
def list_jobs(client: JobsClient, limit: int, as_json: bool) -> None:
    """List the newest jobs and comparisons."""
    from finetune.cli.follow import show_jobs
    from finetune.cli.terminal import print_json

    found = client.list(limit)
    print_json({"jobs": [job.to_dict() for job in found]}) if as_json else show_jobs(found)


@jobs.command()
@click.argument("job_id")
@place_option
@click.option("--follow", "following", is_flag=True, help="Follow the job to its end; the exit code tells its outcome.")
@json_option
def show(job_id: str, client: JobsClient, following: bool, as_json: bool) -> None:
    """Show the state, events and result of a job."""
    from finetune.cli.follow import follow, show_job
    from finetune.cli.terminal import print_json

    job = client.get(job_id)
    if following:
        job = follow(client, job, shown=not as_json)
    if as_json:
        print_json(job.to_dict())
    else:
        show_job(job, () if following else client.events(job_id))
    sys.exit(EXIT_CODES[job.state] if following else 0)


@jobs.command()
@click.argument("job_id")
@place_option
@click.option("--follow", "following", is_flag=True, help="Keep printing until the job ends.")
def logs(job_id: str, client: JobsClient, following: bool) -> None:
    """Print the output of the processes of a job."""
    import time

    offset = 0
    while True:
        finished = client.get(job_id).finished  # before reading the log, so that its end is not missed
        text = client.log(job_id, offset)
        offset += len(text)
        click.echo(text, nl=False)
        if finished or not following:
            return
        time.sleep(1.0)


@jobs.command()
@click.argument("job_id")
@place_option
@json_option
def cancel(job_id: str, client: JobsClient, as_json: bool) -> None:
    """Cancel a job.

    A queued job is cancelled at once. A running one first writes a checkpoint.
    """
    from finetune.cli.terminal import print_json

    job: JobView = client.cancel(job_id)
    print_json(job.to_dict()) if as_json else click.echo(f"{job.id} is {job.state}", err=True)


@click.group()
def keys() -> None:
    """Create, list and revoke API keys for the server.

    From the first key on, the server requires a key for all requests.
    """


def _keys() -> Any:
    from finetune.jobs.database import open_jobs
    from finetune.jobs.keys import KeyStore
    from finetune.storage.workspace import Workspace

    return KeyStore(open_jobs(Workspace.from_environment().root))


@keys.command("create")
@click.argument("owner")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("predict", "jobs"),
    show_default=True,
    help="What the key may do: predict | jobs | metrics | admin; repeatable.",
)
@click.option(
    "--days", type=click.FloatRange(min=0, min_open=True), help="Number of days after which the key expires. Default: never."
)
@json_option
def create_key(owner: str, scopes: tuple[str, ...], days: float | None, as_json: bool) -> None:
    """Create a key for OWNER and print it.

    The key is not stored and cannot be shown again. OWNER is any name; jobs, files and models belong to the owner of the key
    that created them.
    """
    from finetune.cli.terminal import print_json

    secret, key = _keys().create(owner, scopes, lifetime_seconds=None if days is None else days * SECONDS_PER_DAY)
    if as_json:
        print_json({"key": secret, **key.to_dict()})
    else:
        click.echo(secret)
        click.echo(f"key {key.id} of {key.owner}, for {', '.join(sorted(key.scopes))}: keep it, it is not shown again", err=True)


@keys.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """List all keys with owner, scopes and dates."""
    from finetune.cli.follow import show_keys
    from finetune.cli.terminal import print_json

    found = _keys().list()
    print_json({"keys": [key.to_dict() for key in found]}) if as_json else show_keys(found)


@keys.command("revoke")
@click.argument("key_id")
def revoke_key(key_id: str) -> None:
    """Revoke a key permanently.

    KEY_ID is the id in `finetune keys list`, not the key itself.
    """
    _keys().revoke(key_id)
    click.echo(f"key {key_id} is revoked", err=True)
