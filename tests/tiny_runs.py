"""Whole runs from a request to an outcome, small enough for unit tests: striped pictures and a timm test architecture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from folders import path_of
from onnx import numpy_helper
from tiny_training import write_images

from finetune.progress import ProgressCallback, silent
from finetune.runs.outcome import Outcome
from finetune.runs.shared import Shared
from finetune.spec import JobSpec, parse_spec
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.studies.carry_out import carry_out

TINY: Mapping[str, Any] = {
    "model": {"backbone": "test_efficientnet", "weights": "none", "input_size_px": 64},
    "compute": {"device": "cpu", "precision": "float32", "threads": 1},
}


def write_stripes(folder: Path, count: int) -> Path:
    """Class folders ``class0`` to ``class2`` of `count` striped pictures altogether."""
    for sample in write_images(folder / "all", count):
        target = folder / "stripes" / f"class{sample.target}"
        target.mkdir(parents=True, exist_ok=True)
        path_of(sample).rename(target / path_of(sample).name)
    return folder / "stripes"


def tiny_spec(pictures: Path, **given: Any) -> JobSpec:
    return parse_spec({"training_file": str(pictures), **TINY, **given})


def workspace_at(home: Path) -> Workspace:
    """A workspace in `home` that shares its traced networks with all others of this test session."""
    return Workspace.at(home, Path(os.environ["FINETUNE_CACHE"]) / "networks")


def shared_at(home: Path) -> Shared:
    """What runs in `home` share: traced networks with all others of this test session, recorded networks only with each other."""
    shared = Shared.of(workspace_at(home))
    return replace(shared, recorded=shared.store)


def carry_out_at(home: Path, spec: JobSpec, run: RunDir, progress: ProgressCallback = silent) -> Outcome:
    """Do what `spec` asks for, as a process of its own would."""
    return carry_out(spec, run, shared_at(home), progress)


def weights_of(bundle: Path) -> str:
    """sha256 of the exported weights."""
    digest = hashlib.sha256()
    for tensor in sorted(onnx.load(str(bundle / "model.onnx")).graph.initializer, key=lambda one: one.name):
        digest.update(tensor.name.encode() + numpy_helper.to_array(tensor).tobytes())
    return digest.hexdigest()
