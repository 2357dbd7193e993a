"""Compare runs that have already finished. Their predictions are paired by the sha256 of the images."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune.data.dataset import Sample
from finetune.data.index import index_dataset
from finetune.data.reading import reading_of
from finetune.data.split import read_recorded_split
from finetune.errors import InvalidInput, NotFound, Problem
from finetune.evaluation import predictions as tables
from finetune.evaluation.compare import DEFAULT_MARGIN, ArmPredictions
from finetune.evaluation.predictions import Predictions
from finetune.naming import dataset_name
from finetune.runs.outcome import Outcome
from finetune.runs.watch import failures_recorded
from finetune.spec import JobSpec, load_spec
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.studies.compare.page import write_comparison_page
from finetune.studies.compare.result import ArmRuns, Comparison, conclude

SPLIT = "test"


def compare_runs(
    runs: Sequence[Path], workspace: Workspace, margin: float = DEFAULT_MARGIN, out: Path | None = None
) -> Comparison:
    """Compare finished runs on the test images that they have in common.

    Runs whose requests differ only in the seed form one arm. An image that is in train or val of one of the runs is left out and
    counted.

    Args:
        margin: largest difference of the headline metric that does not matter.
        out: folder for the page and ``comparison.json``; by default one in the workspace's runs, named by a digest of the runs.

    Raises:
        NotFound: a folder is not that of a finished run.
        InvalidInput: there are fewer than two arms, the runs have different classes, or they have no image in common.
    """
    if len(runs) < 2:
        raise InvalidInput(f"give the folders of at least two finished runs to compare, given {len(runs)}")
    folders = [RunDir(run.absolute()) for run in runs]
    outcomes = [_outcome(run) for run in folders]
    digest = hashlib.sha256("\n".join(sorted(str(run.root) for run in folders)).encode()).hexdigest()[:8]
    folder = RunDir(out.absolute() if out is not None else workspace.runs / f"comparison-{digest}")
    with folder.held(), failures_recorded(folder):
        return _compare(folders, outcomes, folder, margin)


def _compare(folders: Sequence[RunDir], outcomes: Sequence[Outcome], folder: RunDir, margin: float) -> Comparison:
    """Group finished runs into arms, compare them, and write the page and ``comparison.json`` into `folder`."""
    answers = [_test_answers(run) for run in folders]
    kept, left_out = _common_images(folders, answers)
    arms: dict[str, list[int]] = defaultdict(list)
    specs = [load_spec(run.spec) for run in folders]
    for index, spec in enumerate(specs):
        arms[_without_seed(spec)].append(index)
    names = _names([specs[indices[0]] for indices in arms.values()], [folders[indices[0]] for indices in arms.values()])
    compared = [
        ArmRuns(ArmPredictions(name, tuple(_rows(answers[i], kept) for i in indices)), tuple(outcomes[i] for i in indices))
        for name, indices in zip(names, arms.values(), strict=True)
    ]
    found = conclude(
        compared,
        identifier=folder.name,
        folder=folder.root,
        dataset=dataset_name(specs[0].training_file),
        split=SPLIT,
        margin=margin,
        left_out=left_out,
    )
    command = "finetune compare " + " ".join(str(run.root) for run in folders)
    write_comparison_page(found, compared, _samples(specs[0], answers[0]), command)
    write_json(folder.comparison, found.to_dict())
    return found


def _samples(spec: JobSpec, table: Predictions) -> dict[str, Sample]:
    """Return the images that a run was evaluated on, by sha256; empty if its data is no longer there."""
    try:
        dataset = index_dataset(
            spec.training_file, spec.validation_file, spec.test_file, for_training=False, reading=reading_of(spec.data)
        )
    except InvalidInput:
        return {}
    digest_of = dict(zip(table.ids, table.digests(), strict=True))
    return {digest_of[sample.id]: sample for sample in dataset.samples if sample.id in digest_of}


def _outcome(run: RunDir) -> Outcome:
    if not run.root.is_dir():
        raise NotFound(f"{run.root}: no such folder. Give the folders of finished runs, or one folder of labelled images")
    if not run.outcome.exists():
        raise NotFound(
            f"{run.root}: not the folder of a finished run (it has no outcome.json). Give the folders that finetune train "
            f"named, or "
            "one folder of labelled images to train on"
        )
    return Outcome.read(run)


def _test_answers(run: RunDir) -> Predictions:
    path = run.predictions_of(SPLIT)
    if not path.exists():
        raise InvalidInput(
            f"{run.root}: this run was evaluated on no test images, and its weights were chosen on val. Give a test folder or "
            "data.test_fraction when you train, or compare by cross-validation (finetune compare DATA --folds 5)"
        )
    return tables.read(path)


def _common_images(runs: Sequence[RunDir], answers: Sequence[Predictions]) -> tuple[list[str], int]:
    """Find the images that all runs were evaluated on and that are in train or val of none.

    Returns:
        Their sha256, sorted, and the number of common images that were left out because they are in train or val of a run.

    Raises:
        InvalidInput: the runs have different classes or tasks, or there is no such image.
    """
    reference = answers[0]
    problems = [
        Problem(str(run.root), f"classes {', '.join(table.classes[:5])}… of task {table.task}")
        for run, table in zip(runs, answers, strict=True)
        if table.classes != reference.classes or table.task != reference.task
    ]
    if problems:
        raise InvalidInput("runs with other classes cannot be compared", problems)
    shared = set(reference.digests()).intersection(*(table.digests() for table in answers[1:]))
    seen: set[str] = set()
    for run in runs:
        seen |= {row.sha256 for row in read_recorded_split(run.split) if row.split in ("train", "val")}
    kept = sorted(shared - seen)
    if not kept:
        raise InvalidInput(
            f"the runs share no image that none of them has trained or chosen on ({len(shared):,} test images in common). "
            "Train them with the same data and data.split_seed"
        )
    return kept, len(shared & seen)


def _rows(table: Predictions, digests: Sequence[str]) -> Predictions:
    """Return the rows of the images with these digests, in this order, with the digests as ids."""
    row_of = {digest: row for row, digest in reversed(list(enumerate(table.digests())))}
    return replace(table.take(np.array([row_of[digest] for digest in digests])), ids=tuple(digests))


def _without_seed(spec: JobSpec) -> str:
    return spec.model_copy(update={"seed": 0, "suffix": None, "metadata": {}}).digest()


def _names(specs: Sequence[JobSpec], runs: Sequence[RunDir]) -> list[str]:
    """Return short distinct names: the methods; if these are equal, backbone and method; if these are too, the folders."""
    for name in (lambda s: s.method.type, lambda s: f"{s.model.backbone} {s.method.type}"):
        names = [name(spec) for spec in specs]
        if len(set(names)) == len(names):
            return names
    return [run.name for run in runs]
