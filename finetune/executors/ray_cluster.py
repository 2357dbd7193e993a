"""Run attempts as jobs of a Ray cluster, on other machines than the worker's own. Needs the extra ``ray``.

Ray chooses the machine, reserves the cores and GPUs, reports how an attempt ended and stops its process group. The state of jobs
is kept in the job database and not in Ray: if the cluster is lost, its attempts are lost too, and their jobs are queued again.
Every machine needs this installation and the workspace under the same paths, because an attempt and its worker communicate
through the files of the run. Set ``MLFLOW_TRACKING_URI`` on the machines themselves: environment variables that are submitted
with a job can be read in Ray's dashboard. Access to the cluster is controlled by Ray (``RAY_AUTH_MODE=token``); whoever has it
can run any command.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from finetune.distribution import install_command
from finetune.errors import ExecutorError, MissingExtra
from finetune.executors.executor import EXIT_BUSY, Handle, Resources

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"  # between Ray's SIGTERM and its SIGKILL
_ANSWER_SECONDS = 10.0  # Ray's client has no timeout of its own
_POLL_SECONDS = 1.0


class RayExecutor:
    """An executor on a Ray cluster, through the Jobs API at `address`.

    Args:
        stop_seconds: seconds that Ray gives an attempt to write its checkpoint before it kills it. Ray accepts this only when a
            job is submitted, so the `grace_seconds` of `cancel` have no effect.

    Raises:
        MissingExtra: Ray is not installed.
        ExecutorError: no cluster answers at `address`.
    """

    def __init__(self, address: str, stop_seconds: float) -> None:
        self.address = address
        self.stop_seconds = stop_seconds
        self._polled_at: dict[str, float] = {}  # by `Handle.reference`, monotonic seconds
        self._logs: dict[str, Path] = {}
        self._ray_errors = _ray_errors()
        with self._failures_named("connect"):
            self._client = _client(address)

    def start(
        self,
        job_id: str,
        command: Sequence[str],
        *,
        fence: int,
        environment: Mapping[str, str],
        log: Path,
        resources: Resources,
    ) -> Handle:
        """Submit the command under the id ``<job id>-<fence>``.

        Ray accepts an id only once. If it already has this submission, because the reply to an earlier request was lost, return
        the handle of that one.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = Handle(job_id, f"{job_id}-{fence}")
        self._logs[handle.reference] = log
        given = {**resources.environment(), **environment, STOP_VARIABLE: str(math.ceil(self.stop_seconds))}
        del given["CUDA_VISIBLE_DEVICES"]  # Ray chooses the devices and sets it
        try:
            self._client.submit_job(
                submission_id=handle.reference,
                entrypoint=shell_line(command, log),
                runtime_env={"env_vars": given},
                entrypoint_num_cpus=resources.threads,
                entrypoint_num_gpus=len(resources.gpus),
            )
        except self._ray_errors as error:
            if not self._is_known(handle):
                raise self._failure(f"submit {handle.reference}", error) from error
        return handle

    def poll(self, handle: Handle) -> int | None:
        if time.monotonic() - self._polled_at.get(handle.reference, -math.inf) < _POLL_SECONDS:
            return None
        with self._failures_named(f"ask for {handle.reference}"):
            job = self._client.get_job_info(handle.reference)
        self._polled_at[handle.reference] = time.monotonic()
        if not job.status.is_terminal():
            return None
        self._polled_at.pop(handle.reference)
        with open(self._logs.pop(handle.reference), "a", encoding="utf-8") as log:
            log.write(f"Ray: {job.message}\n")
        return exit_code(job.status.value, job.driver_exit_code, began=job.driver_node_id is not None)

    def memory_bytes(self, handle: Handle) -> int | None:
        """Return None: watching the memory of its jobs is left to the cluster."""
        return None

    def cancel(self, handle: Handle, *, grace_seconds: float) -> None:
        with self._failures_named(f"stop {handle.reference}"):
            self._client.stop_job(handle.reference)

    def _is_known(self, handle: Handle) -> bool:
        """Return whether Ray already has this submission."""
        try:
            self._client.get_job_info(handle.reference)
        except self._ray_errors:
            return False
        return True

    @contextmanager
    def _failures_named(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._ray_errors as error:
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: Exception) -> ExecutorError:
        first_line = str(error).strip().partition("\n")[0][:300]
        return ExecutorError(
            f"Ray at {self.address} cannot be used ({what}): {first_line}. Is this the address of its dashboard?"
        )


def shell_line(command: Sequence[str], log: Path) -> str:
    """Return the shell command that a machine of the cluster runs.

    It exits with `EXIT_BUSY` if the workspace is not on that machine; else the shell is replaced by `command` (exec).
    """
    folder = shlex.quote(str(log.parent))
    complaint = shlex.quote(f"{log.parent} is not on this machine: the workspace must be on a disk that all machines share")
    return (
        f"test -d {folder} || {{ echo {complaint} >&2; exit {EXIT_BUSY}; }}; "
        f"exec {shlex.join(command)} >>{shlex.quote(str(log))} 2>&1"
    )


def exit_code(status: str, code: int | None, *, began: bool) -> int:
    """Translate the final status of a Ray job into an exit code as `Executor.poll` returns it.

    A job that Ray lost while it ran counts as killed; one that Ray never began counts as busy, so that it is tried again.

    Args:
        code: exit code of the job's process, if Ray knows it.
        began: whether Ray had started the job on a machine.
    """
    if status == "SUCCEEDED":
        return os.EX_OK
    if status == "STOPPED":
        return -signal.SIGTERM
    if code is not None:
        return code
    return -signal.SIGKILL if began else EXIT_BUSY


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    client._do_request = partial(client._do_request, timeout=_ANSWER_SECONDS)
    return client


def _ray_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that Ray's client raises when a request is refused or not answered.

    Raises:
        MissingExtra: Ray is not installed.
    """
    try:
        from ray.exceptions import RayError
    except ModuleNotFoundError:
        raise MissingExtra(f"Ray is not installed here. Install it with its extra: {install_command('ray')}") from None
    return (RayError, RuntimeError, OSError)
