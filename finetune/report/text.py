"""Format values for pages: nested settings as key paths, values as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.messages import byte_size, duration

SHOWN_CLASSES = 40  # in one figure or table, worst first

_COSTS = {
    "wall_seconds": "this run in all",
    "train_seconds": "training, without cached features",
    "train_cpu_seconds": "training, without cached features, CPU time",
    "feature_seconds": "of which computing frozen features",
    "feature_cpu_seconds": "of which computing frozen features, CPU time",
    "cpu_seconds": "this run in all, CPU time",
    "peak_memory_bytes": "peak memory",
    "trainable_parameters": "trained parameters",
    "total_parameters": "all parameters",
    "bundle_bytes": "the bundle on disk",
    "latency_seconds": "one prediction on one core",
}


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key path, value) for every value of a nested mapping."""
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_text(value: Any) -> str:
    """Return a value as text; a dash for None."""
    if value is None or value == {} or value == [] or value == ():
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def cost_text(name: str, value: float | None) -> str:
    """Return a cost as text in the unit that its name ends in."""
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return byte_size(value)
    return duration(value) if name.endswith("_seconds") else value_text(value)


def cost_label(name: str) -> str:
    """Return the display name of a cost."""
    return _COSTS.get(name, name)
