"""The results as Markdown tables: medians over the repeats, and our probe's time by step against the floor."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]

REFERENCE = "ours-probe-cold"
FLOOR, STEPS = "floor", "ours-probe-steps"
CPU = ", CPU"  # ends the names of CPU seconds


def comparison(runs: Sequence[Run], what: Mapping[str, str]) -> list[str]:
    """One row an entry, in the order of `what`. Columns ``×`` are in our cold probes, of wall and of CPU seconds."""
    reference = _good(runs, REFERENCE)
    columns = ("entry", "what", "seconds", "×", "top1", "NLL", "CPU s", "×", "CPU s of others", "peak GB", "load before", "runs")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, description in what.items():
        chosen = _good(runs, name)
        failed = [run for run in runs if run["entry"] == name and "failed" in run]
        if chosen:
            seconds, cpu_seconds, memory = (_median(chosen, key) for key in ("seconds", "cpu_seconds", "peak_bytes"))
            if name == FLOOR:  # importing and exporting the graph are not part of it
                seconds, cpu_seconds = _floor(runs, "floor"), _floor(runs, "floor, CPU")
            cells = [
                _text(seconds, ".1f"),
                _text(_ratio(seconds, _median(reference, "seconds")), ".2f"),
                _text(_median(chosen, "top1"), ".3f"),
                _text(_median(chosen, "nll"), ".3f"),
                _text(cpu_seconds, ".0f"),
                _text(_ratio(cpu_seconds, _median(reference, "cpu_seconds")), ".2f"),
                _text(_median(chosen, "others_cpu_seconds"), ".0f"),
                _text(_ratio(memory, 1e9), ".2f"),
                _text(max(run["load_average"] for run in chosen), ".1f"),
                str(len(chosen)) + (f", {len(failed)} failed" if failed else ""),
            ]
            lines.append(f"| `{name}` | {description} | {' | '.join(cells)} |")
        elif failed:
            last_words = failed[-1]["failed"].strip().splitlines()[-1]
            lines.append(f"| `{name}` | {description} | failed: {last_words} |")
    return lines


def training_speed(runs: Sequence[Run], names: Iterable[str]) -> list[str]:
    """Images per second of a training epoch, validation left out."""
    lines = ["| entry | what trains | images/s |", "|---|---|---|"]
    for name in names:
        speeds = [run["images_per_second"] for run in _good(runs, name) if "images_per_second" in run]
        for trained in dict.fromkeys(trained for speed in speeds for trained in speed):
            median = statistics.median(speed[trained] for speed in speeds if trained in speed)
            lines.append(f"| `{name}` | {trained} | {median:.1f} |")
    return lines if len(lines) > 2 else []


def breakdown(runs: Sequence[Run]) -> list[str]:
    """Our cold probe, step by step, in seconds and in floors: from image files to an evaluated bundle."""
    measured = _good(runs, STEPS)
    if not measured:
        return []
    floor = _floor(runs, "floor")
    rows = {
        name: statistics.median(run["steps"].get(name, 0.0) for run in measured)
        for name in dict.fromkeys(name for run in measured for name in run["steps"])
    }
    cpu = {name.removesuffix(CPU): rows.pop(name) for name in list(rows) if name.endswith(CPU)}
    rows["leaving the process"] = statistics.median(run["seconds"] - run["steps"]["whole command"] for run in measured)
    for name in (REFERENCE, "ours-probe-warm"):
        if plain := _good(runs, name):
            row = f"*`finetune train` of {name}, without a stopwatch*"
            rows[row] = statistics.median(run["commands"]["train"] for run in plain)
            if of_plain := [run["commands_cpu"]["train"] for run in plain if "commands_cpu" in run]:
                cpu[row] = statistics.median(of_plain)
    if floor is not None:
        rows["*the floor*"] = floor
    if (floor_cpu := _floor(runs, f"floor{CPU}")) is not None:
        cpu["*the floor*"] = floor_cpu
    lines = [f"| step of {STEPS} | seconds | of the floor | CPU s | of the floor |", "|---|---|---|---|---|"]
    return lines + [
        f"| {name} | {taken:.2f} | {_text(_ratio(taken, floor), '.3f')} "
        f"| {_text(cpu.get(name), '.2f')} | {_text(_ratio(cpu.get(name), floor_cpu), '.3f')} |"
        for name, taken in rows.items()
    ]


def _floor(runs: Sequence[Run], key: str) -> float | None:
    floors = [run["steps"][key] for run in _good(runs, FLOOR) if key in run["steps"]]
    return statistics.median(floors) if floors else None


def _good(runs: Sequence[Run], name: str) -> list[Run]:
    return [run for run in runs if run["entry"] == name and "failed" not in run]


def _median(runs: Sequence[Run], key: str) -> float | None:
    values = [run[key] for run in runs if key in run]
    return statistics.median(values) if values else None


def _ratio(value: float | None, unit: float | None) -> float | None:
    return None if value is None or unit is None else value / unit


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
