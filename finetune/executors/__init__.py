"""Where processes run that may take long: on this machine, or on a Ray cluster.

An executor starts a command as a process group of its own, says how it ended, and ends it. It knows neither jobs nor studies: the
worker runs the attempts at its jobs on one, and a study the runs that may go on side by side.
"""

from __future__ import annotations

from finetune.executors.executor import Executor, Handle, Resources

__all__ = ["EXECUTORS", "Executor", "Handle", "Resources", "open_executor"]

EXECUTORS = ("local", "ray")


def open_executor(name: str, *, ray_address: str | None = None, stop_seconds: float = 20.0) -> Executor:
    """Return the executor `name`, one of `EXECUTORS`.

    Args:
        ray_address: of the cluster's dashboard.
        stop_seconds: how long a process may take to end by itself when it is asked to.

    Raises:
        MissingExtra: Ray is not installed.
        ExecutorError: no cluster answers at the address.
    """
    if name == "ray":
        from finetune.executors.ray_cluster import DEFAULT_ADDRESS, RayExecutor

        return RayExecutor(ray_address or DEFAULT_ADDRESS, stop_seconds)
    from finetune.executors.local import LocalExecutor

    return LocalExecutor()
