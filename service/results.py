"""Results for clients: metrics and reports of finished runs, and bundles as tar archives."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastapi.responses import HTMLResponse

from finetune.bundle.manifest import MANIFEST, Manifest
from finetune.bundle.registry import ModelVersion
from finetune.errors import NotFound
from finetune.jobs.kinds import COMPARISON, TRAINING
from finetune.storage.files import found_in, modified_ns
from finetune.storage.rundir import RunDir

# A report is one file with its style and figures in it, and without scripts.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox"
)
Format = Literal["csv", "npz", "parquet"]
MEDIA_TYPES: Mapping[Format, str] = {
    "csv": "text/csv; charset=utf-8",
    "npz": "application/octet-stream",
    "parquet": "application/vnd.apache.parquet",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
TABLE_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {name.partition(";")[0]: _BINARY for name in MEDIA_TYPES.values()}}
}
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 512


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no file or it has no valid object."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def run_of(runs: Path, version: ModelVersion) -> RunDir | None:
    """Return the run that made a registered version, also within a comparison; None if its folder no longer exists."""
    outcomes = (*found_in(runs, "*/outcome.json"), *found_in(runs, "*/runs/*/outcome.json"))
    for outcome in sorted(outcomes, key=lambda path: modified_ns(path) or 0, reverse=True):
        found = read_object(outcome)
        if (found.get("model"), found.get("version")) == (version.name, version.version):
            return RunDir(outcome.parent)
    return None


def link_of_run(runs: Path, folder: Path) -> str | None:
    """Return the URL path of the job, or of the comparison's run, whose folder this is; None for any other folder."""
    match folder.relative_to(runs).parts if folder.is_relative_to(runs) else ():
        case (name,) if name.startswith(f"{TRAINING.prefix}-"):
            return f"{TRAINING.path}/{name}"
        case (name, "runs", child) if name.startswith(f"{COMPARISON.prefix}-"):
            return f"{COMPARISON.path}/{name}/runs/{child}"
    return None


def report_answer(run: RunDir, within: Callable[[str], str]) -> HTMLResponse:
    """Return the report in a run's folder as a self-contained page.

    Args:
        within: removes local paths from the text.

    Raises:
        NotFound: the run has no report.
    """
    try:
        page = run.report.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise NotFound(f"{run.name} has no report") from None
    return HTMLResponse(within(page), headers={"Content-Security-Policy": REPORT_POLICY})


def resolved_hyperparameters(run: RunDir) -> dict[str, Any]:
    """Return the hyperparameters that a run is carried out with; empty before it has resolved them.

    Those of training by steps are null if the run takes none, unless they were given. ``l2`` is missing until the run has
    chosen it.
    """
    resolved = read_object(run.resolved)
    recipe = resolved.get("recipe")
    if not isinstance(recipe, dict):
        return {}
    found = {key: value for key, value in recipe.items() if key not in ("phases", "sources", "ema_half_life_steps", "l2")}
    half_life = recipe.get("ema_half_life_steps")
    found |= {"ema": half_life is not None, "ema_half_life_steps": half_life}
    l2, outcome = recipe.get("l2"), read_object(run.outcome)
    if l2 is not None or outcome:
        found["l2"] = l2 if l2 is not None else (outcome.get("choices") or {}).get("l2")
    spec = resolved.get("spec") or {}
    asked = spec.get("hyperparameters") or {}
    refit = asked.get("refit", "auto")
    found["refit"] = spec.get("data", {}).get("folds") is not None if refit == "auto" else refit
    return found | _of_steps([phase for phase in recipe["phases"] if phase["n_epochs"]], asked)


_OF_STEPS = (
    *("n_epochs", "batch_size", "train_size_px", "learning_rate", "learning_rate_multiplier", "weight_decay", "label_smoothing"),
    *("warmup_fraction", "early_stopping_epochs", "ema", "ema_half_life_steps", "steps_per_epoch", "clip_norm"),
)


def _of_steps(phases: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that determine the phases which take steps; the topmost stage has the learning rate as given."""
    if not phases:
        return {key: None if asked.get(key, "auto") == "auto" else asked[key] for key in _OF_STEPS}
    multiplier, rate = asked.get("learning_rate_multiplier", "auto"), asked.get("learning_rate", "auto")
    multiplier = 1.0 if multiplier == "auto" else multiplier
    peak = max(max(phase["stage_lr"].values(), default=phase["head_lr"]) for phase in phases)
    return {
        "n_epochs": sum(phase["n_epochs"] for phase in phases),
        "learning_rate": peak / multiplier if rate == "auto" else rate,
        "learning_rate_multiplier": multiplier,
        "warmup_fraction": phases[0]["warmup_fraction"],
    }


def evaluated_splits(run: RunDir | None) -> dict[str, Any]:
    """Return the evaluation of each split: metrics with n and intervals, classes, confusion matrix."""
    splits = {} if run is None else read_object(run.evaluation).get("splits", {})
    return splits if isinstance(splits, dict) else {}


def bundle_archive(version: ModelVersion, manifest: Manifest) -> tuple[Iterator[bytes], int]:
    """Return a bundle as the chunks of a tar file, and its size in bytes."""
    members = [(name, version.path / name) for name in (*manifest.files, MANIFEST)]
    heads = [_head(f"{version.name}-{version.version}/{name}", path) for name, path in members]
    total = sum(len(head) + _padded(path.stat().st_size) for head, (_, path) in zip(heads, members, strict=True))
    return _pieces(heads, [path for _, path in members]), total + 2 * _BLOCK_BYTES


def _pieces(heads: list[bytes], paths: list[Path]) -> Iterator[bytes]:
    for head, path in zip(heads, paths, strict=True):
        yield head
        size = 0
        with open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
                yield chunk
        yield bytes(_padded(size) - size)
    yield bytes(2 * _BLOCK_BYTES)


def _head(name: str, path: Path) -> bytes:
    info = tarfile.TarInfo(name)
    found = path.stat()
    info.size, info.mtime, info.mode = found.st_size, int(found.st_mtime), 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


def _padded(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
