"""Examine the data of a request, as `finetune check` does after the plan. Earlier results for the same data are reused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.bundle.preprocess import Preprocess
from finetune.data.check import check_images
from finetune.data.dataset import Dataset
from finetune.data.index import IndexRefused
from finetune.doctor.examine import VERSION, examine, without_accepted
from finetune.doctor.finding import LISTED, Examination
from finetune.doctor.page import write_page
from finetune.doctor.prescribe import accepted_in, acknowledge, reopen, write_manifest
from finetune.errors import DataError, Problem
from finetune.features.engine import Prefix
from finetune.features.rows import FeatureContext, Views, pooled_features
from finetune.messages import printable
from finetune.progress import ProgressCallback, silent
from finetune.runs.prepare import framing, read_and_build, split_for
from finetune.runs.shared import Shared
from finetune.spec import JobSpec
from finetune.storage.files import read_json, write_json


@dataclass(frozen=True)
class Examined:
    """An examination, with the dataset and the preprocessing that it was made with and the files that were written."""

    examination: Examination
    dataset: Dataset
    preprocess: Preprocess
    page: Path | None = None
    manifest: Path | None = None
    changes: tuple[int, int, int] = (0, 0, 0)  # images that the manifest leaves out, groups, suggests another label for

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values, with the paths of the page and the manifest."""
        paths = {name: None if path is None else str(path) for name, path in (("page", self.page), ("manifest", self.manifest))}
        return {**self.examination.to_dict(LISTED), **paths}


def examine_request(
    spec: JobSpec,
    shared: Shared,
    progress: ProgressCallback = silent,
    *,
    accept: Sequence[str] = (),
    reopened: Sequence[str] = (),
    page: Path | None = None,
    fix: Path | None = None,
    command: str = "finetune check",
) -> Examined:
    """Examine the data of a request; write the page and, if `fix` is given, a manifest with corrections.

    Args:
        accept: kinds or keys of findings to acknowledge; see `finetune.doctor.prescribe.acknowledge`.
        reopened: kinds or keys of acknowledged findings that are to be reported again.
        page: path of the page; by default in the workspace, one for each data revision and settings.
        fix: path of the manifest.
        command: that the page shows for repeating the examination.

    Raises:
        DataError: the file `fix` already exists, and may contain the user's own corrections.
    """
    if fix is not None and fix.exists():
        raise DataError(f"{printable(fix)}: exists, and may contain your own corrections; give another file, or remove this one")
    dataset, network = read_and_build(spec, shared, progress)
    given_splits = any(sample.split is not None for sample in dataset.samples)
    dataset = split_for(spec, dataset, None)
    preprocess = framing(spec, dataset, network.facts.preprocess)
    identity = _identity(dataset, network.prefix, preprocess)
    whole = _examined(identity, dataset, network.prefix, preprocess, shared, progress)
    accepted_file = shared.workspace.datasets / "acknowledged.txt"
    if reopened:
        reopen(accepted_file, whole, reopened)
    if accept:
        acknowledge(accepted_file, whole, accept)
    accepted = accepted_in(accepted_file)
    examination = replace(whole, findings=tuple(without_accepted(finding, accepted) for finding in whole.findings))
    examination = replace(examination, findings=tuple(one for one in examination.findings if one.count > 0 or one.acknowledged))
    page = page or shared.workspace.datasets / f"{examination.revision[:12]}-{identity[:8]}.html"
    write_page(page, examination, dataset, preprocess, command)
    changes = (0, 0, 0)
    if fix is not None:
        changes = write_manifest(fix, dataset, examination, given_splits=given_splits)
    return Examined(examination, dataset, preprocess, page, fix, changes)


def _identity(dataset: Dataset, prefix: Prefix, preprocess: Preprocess) -> str:
    """Return the sha256 of everything that the findings depend on: the data, its split, the features, the preprocessing."""
    ids = hashlib.sha256("\n".join(sample.id for sample in dataset.samples).encode("utf-8", "surrogatepass")).hexdigest()
    parts = (VERSION, dataset.revision, dataset.digest, ids, prefix.digest, preprocess.digest(), repr(dataset.bad))
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _examined(
    identity: str, dataset: Dataset, prefix: Prefix, preprocess: Preprocess, shared: Shared, progress: ProgressCallback
) -> Examination:
    """Return all findings, acknowledged ones included; read them from the cache if nothing has changed since they were made."""
    notes = shared.store.folder("notes")
    kept = notes / f"examined-{identity[:24]}.json"
    if kept.exists():
        return Examination.from_dict(read_json(kept))
    context = FeatureContext(shared.store, progress=progress)
    embeddings = pooled_features(prefix, dataset.samples, Views(preprocess), context)
    found = examine(dataset, embeddings, backbone=prefix.backbone, memory=notes, progress=progress)
    write_json(kept, found.to_dict())
    return found


@contextmanager
def data_problems(shared: Shared, progress: ProgressCallback) -> Iterator[None]:
    """Add the unreadable files to the error of a block in which data is refused for its layout, to report all problems at once.

    Raises:
        DataError: the original error with all problems of the data.
    """
    try:
        yield
    except IndexRefused as error:
        notes = shared.store.folder("notes")
        checked = check_images(error.listed, max_bad_fraction=1.0, may_empty=True, progress=progress, memory=notes)
        known = {problem.where for problem in error.problems}
        bad = [Problem(printable(one.where), one.reason) for one in checked.bad if one.where not in known]
        raise DataError(error.message, [*error.problems, *bad]) from None
