"""What a finished run came to, and where runs write. Torch-free: also for whoever only reads results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.naming import as_model_name
from finetune.spec import JobSpec
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace


@dataclass(frozen=True)
class Outcome:
    """A finished run, as ``outcome.json`` holds it."""

    run: Path
    method: str
    model: str
    version: str
    bundle: Path
    metrics: Mapping[str, float]
    summary: str
    classes: tuple[str, ...]
    warnings: tuple[str, ...]
    quarantined: int
    mlflow_run_id: str | None
    cross_validation: Mapping[str, Any] | None = None  # as folds.json holds it

    def to_dict(self) -> dict[str, Any]:
        lists = {"classes": list(self.classes), "warnings": list(self.warnings), "metrics": dict(self.metrics)}
        return {**asdict(self), **lists, "run": str(self.run), "bundle": str(self.bundle)}

    @classmethod
    def read(cls, run: RunDir) -> Outcome:
        given = read_json(run.outcome)
        paths = {"run": Path(given["run"]), "bundle": Path(given["bundle"])}
        return cls(**{**given, **paths, "classes": tuple(given["classes"]), "warnings": tuple(given["warnings"])})


def choose_run_dir(spec: JobSpec, workspace: Workspace, given: Path | None = None) -> RunDir:
    """Where a run of `spec` writes: the folder that was given, an unfinished run of the same request, or a new folder."""
    if given is not None:
        return RunDir(given.absolute())
    runs = workspace.runs
    stem = f"{spec.suffix or as_model_name(Path(spec.training_file).absolute().name)}-{spec.method.type}-{spec.digest()[:8]}"
    number = 1
    while (run := RunDir(runs / (stem if number == 1 else f"{stem}-{number}"))).outcome.exists():
        number += 1
    return run
