"""System metrics during a run: CPU, memory, disk, network and GPU, under MLflow's own names."""

from __future__ import annotations

import time
from typing import Any

EVERY_SECONDS = 10.0


class SystemSampler:
    """Samples the system metrics at most every `EVERY_SECONDS`."""

    def __init__(self) -> None:
        self._monitors: list[Any] | None = None
        self._due = 0.0

    def sample(self) -> dict[str, float]:
        """Return the metrics since the last sample; empty if that was less than `EVERY_SECONDS` ago."""
        if time.monotonic() < self._due:
            return {}
        self._due = time.monotonic() + EVERY_SECONDS
        if self._monitors is None:
            from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

            self._monitors = [CPUMonitor(), *_gpu_monitors()]
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        return values


def _gpu_monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    try:
        return [GPUMonitor()]
    except (ImportError, RuntimeError):  # no driver library, or no card
        return []
