"""Run long commands as separate processes, on this machine or on a Ray cluster.

An executor starts a command in its own process group, reports its exit code, and stops it on request. Workers use an executor for
the attempts at their jobs, studies for runs that are carried out in parallel. Executors do not depend on either.
"""

from __future__ import annotations

from finetune.executors.executor import Executor, Handle, Resources

__all__ = ["EXECUTORS", "Executor", "Handle", "Resources", "open_executor"]

EXECUTORS = ("local", "ray")


def open_executor(name: str, *, ray_address: str | None = None, stop_seconds: float = 20.0) -> Executor:
    """Return the executor `name`, one of `EXECUTORS`.

    Args:
        ray_address: address of the cluster's dashboard.
        stop_seconds: seconds between the request to stop (SIGTERM) and the kill (SIGKILL). Only Ray needs to know it in advance.

    Raises:
        MissingExtra: Ray is not installed.
        ExecutorError: no cluster answers at the address.
    """
    if name == "ray":
        from finetune.executors.ray_cluster import DEFAULT_ADDRESS, RayExecutor

        return RayExecutor(ray_address or DEFAULT_ADDRESS, stop_seconds)
    from finetune.executors.local import LocalExecutor

    return LocalExecutor()
