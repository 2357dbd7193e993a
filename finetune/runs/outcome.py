"""The result of a finished run or study, ``outcome.json``. A run that has this file is complete. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir


@dataclass(frozen=True)
class Outcome:
    """The result of a finished run or study."""

    run: Path
    method: str  # of the request
    carried_out: str  # the method that the model was trained with; differs from `method` if that is auto
    goal: str  # judged, exported or registered
    metrics: Mapping[str, float]
    cost: Mapping[str, float]
    summary: str
    classes: tuple[str, ...]
    n_train: int  # images that the weights were fitted on
    warnings: tuple[str, ...]
    quarantined: int
    choices: Mapping[str, Any] = field(default_factory=dict)  # see `finetune.training.choices.Choices`
    frozen: Mapping[str, Any] = field(default_factory=dict)
    bundle: Path | None = None
    model: str | None = None
    version: str | None = None
    cross_validation: Mapping[str, Any] | None = None  # from `CrossValidation.to_dict`

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``outcome.json``."""
        values = {**asdict(self), "classes": list(self.classes), "warnings": list(self.warnings)}
        return {**values, "run": str(self.run), "bundle": None if self.bundle is None else str(self.bundle)}

    def write(self, run: RunDir) -> None:
        """Write ``outcome.json``; a run that has one is complete."""
        write_json(run.outcome, self.to_dict())

    @classmethod
    def read(cls, run: RunDir) -> Outcome:
        """Read ``outcome.json``."""
        given = read_json(run.outcome)
        bundle = given["bundle"]
        paths = {"run": Path(given["run"]), "bundle": None if bundle is None else Path(bundle)}
        return cls(**{**given, **paths, "classes": tuple(given["classes"]), "warnings": tuple(given["warnings"])})
