"""Attempts as jobs of a Ray cluster, for more machines than the worker's own. Needs the extra ``ray``.

Ray chooses the machine, keeps an attempt's cores and GPUs to it, tells how it ended and ends its process group. It is no record:
a cluster that dies costs the attempts that ran on it, and the job database queues them again. Each machine needs this
installation and the workspace under the same paths, because the run's files are how an attempt and its worker speak. Where
MLflow is (``MLFLOW_TRACKING_URI``) is set on the machines: what is submitted can be read in Ray's dashboard. Who may talk to the
cluster is Ray's own matter (``RAY_AUTH_MODE=token``): whoever can submits any command.
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
_ANSWER_SECONDS = 10.0  # Ray's own client would wait for ever
_POLL_SECONDS = 1.0


class RayExecutor:
    """Attempts on a Ray cluster, through the Jobs API at `address`.

    Args:
        stop_seconds: how long Ray lets an attempt write its checkpoint before it kills it. Ray is told when an attempt is
            submitted, so a shorter grace at its end is not given.

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
        """Submit under the id ``<job id>-<fence>``, which Ray takes once: asked again, this finds what is there."""
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = Handle(job_id, f"{job_id}-{fence}")
        self._logs[handle.reference] = log
        given = {**resources.environment(), **environment, STOP_VARIABLE: str(math.ceil(self.stop_seconds))}
        del given["CUDA_VISIBLE_DEVICES"]  # which ones is for Ray to say
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
        """Return None: what a job of a cluster takes is the cluster's to watch."""
        return None

    def cancel(self, handle: Handle, *, grace_seconds: float) -> None:
        with self._failures_named(f"stop {handle.reference}"):
            self._client.stop_job(handle.reference)

    def _is_known(self, handle: Handle) -> bool:
        """Whether Ray has this submission, from a request whose answer was lost."""
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
        said = str(error).strip().partition("\n")[0][:300]
        return ExecutorError(f"Ray at {self.address} cannot be used ({what}): {said}. Is this the address of its dashboard?")


def shell_line(command: Sequence[str], log: Path) -> str:
    """What a machine of the cluster runs: the command itself, in the shell's place, if the workspace is there."""
    folder = shlex.quote(str(log.parent))
    complaint = shlex.quote(f"{log.parent} is not on this machine: the workspace must be on a disk that all machines share")
    return (
        f"test -d {folder} || {{ echo {complaint} >&2; exit {EXIT_BUSY}; }}; "
        f"exec {shlex.join(command)} >>{shlex.quote(str(log))} 2>&1"
    )


def exit_code(status: str, code: int | None, *, began: bool) -> int:
    """How an attempt ended, in a child process's terms: what Ray lost while it ran was killed, what it never began is busy."""
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
    """What Ray's client raises when it is refused, or gets no answer."""
    try:
        from ray.exceptions import RayError
    except ModuleNotFoundError:
        raise MissingExtra(f"Ray is not installed here. Install it with its extra: {install_command('ray')}") from None
    return (RayError, RuntimeError, OSError)
