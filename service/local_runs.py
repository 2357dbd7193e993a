"""Runs and comparisons that were made on the command line: folders of the workspace that belong to no job of the queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.jobs.kinds import KINDS
from finetune.storage.files import found_in, modified_ns
from finetune.storage.rundir import RunDir
from service.results import read_object


@dataclass(frozen=True)
class LocalRun:
    """One finished run or comparison, with the JSON object of its result file."""

    folder: RunDir
    kind: Literal["training", "comparison"]
    finished_at: int  # Unix seconds
    result: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name


def local_runs(runs: Path) -> list[LocalRun]:
    """Return the finished runs and comparisons in a workspace's folder of runs that no job made, newest first."""
    of_jobs = tuple(f"{kind.prefix}-" for kind in KINDS.values())
    found: dict[str, LocalRun] = {}
    results: tuple[tuple[Literal["training", "comparison"], str], ...] = (
        ("training", "outcome.json"), ("comparison", "comparison.json"),
    )  # fmt: skip
    for kind, name in results:
        for path in found_in(runs, f"*/{name}"):
            changed_ns, result = modified_ns(path), read_object(path)
            if changed_ns is None or not result or path.parent.name.startswith(of_jobs):
                continue
            found[path.parent.name] = LocalRun(RunDir(path.parent), kind, changed_ns // 1_000_000_000, result)
    return sorted(found.values(), key=lambda run: (-run.finished_at, run.name))
