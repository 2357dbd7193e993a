"""The protocol of a study, and the function that runs its children.

The folder of a study contains ``study.json`` and, under ``runs/<name>``, the folder of each child, which is a run or a study
itself. A child that has an outcome is not run again, so a study that was killed resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from finetune.data.dataset import Dataset, Sample
from finetune.data.split import write_split
from finetune.events import ChildFinished
from finetune.progress import Progress, ProgressCallback
from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.runs.shared import Shared
from finetune.spec import JobSpec
from finetune.storage.files import read_json, write_atomic, write_json
from finetune.storage.rundir import RunDir


@dataclass(frozen=True)
class Child:
    """A run that a study asks for.

    Args:
        name: of its folder.
        title: its name in progress and reports.
        split: the dataset with the split of this run; None: the split of the study.
        left_out: samples of the data that `split` does not contain.
    """

    name: str
    title: str
    spec: JobSpec
    options: RunOptions
    split: Dataset | None = None
    left_out: tuple[Sample, ...] = ()


class Study(Protocol):
    """The order of child runs and the rule that ends them."""

    @property
    def kind(self) -> str:
        """The kind of study in ``study.json``: folds, auto, refit, comparison, depth."""
        ...

    @property
    def n_children(self) -> int | None:
        """The largest possible number of children; None if it is not known in advance."""
        ...

    def next_children(self, finished: Mapping[str, Outcome]) -> Sequence[Child]:
        """Return the children to run next, given the outcomes of those that have finished; an empty sequence ends the study.

        The result depends only on the outcomes, so a resumed study continues with the same children. Children that are returned
        together do not depend on each other.
        """
        ...


class RunChild(Protocol):
    """A function that carries out a child, which is a run or a study itself, and returns its outcome."""

    def __call__(
        self, spec: JobSpec, run: RunDir, shared: Shared, progress: ProgressCallback, options: RunOptions
    ) -> Outcome: ...


def run_children(
    study: Study, run: RunDir, shared: Shared, progress: ProgressCallback, run_child: RunChild
) -> dict[str, Outcome]:
    """Run the children that `study` asks for until it asks for no more; return their outcomes by name."""
    _begin(study, run)
    finished = _finished(run)
    while children := study.next_children(finished):
        _show_number(len(finished), study.n_children, progress)
        for child, outcome in _outcomes(children, run, shared, progress, run_child):
            finished[child.name] = outcome
            _note_child(run, child.name)
            run.record(ChildFinished(f"{child.title}: {outcome.summary}", child.name, outcome.metrics))
            _show_number(len(finished), study.n_children, progress)
    return finished


def _outcomes(
    children: Sequence[Child], run: RunDir, shared: Shared, progress: ProgressCallback, run_child: RunChild
) -> Iterator[tuple[Child, Outcome]]:
    """Run children that do not depend on each other, in parallel if there are several and `shared.slots` is set."""
    if shared.slots is None or len(children) < 2:
        for child in children:
            folder = prepare_child(run, child)
            yield child, run_child(child.spec, folder, shared, titled(progress, child.title), child.options)
        return
    from finetune.studies.side_by_side import run_side_by_side

    prepared = [(child.title, child.spec, prepare_child(run, child)) for child in children]
    for number, outcome in run_side_by_side(prepared, shared.slots, shared.workspace, progress):
        yield children[number], outcome


def prepare_child(run: RunDir, child: Child) -> RunDir:
    """Create the folder of a child, with its split and its options; return it."""
    folder = run.child(child.name).create()
    if not folder.split.exists():
        if child.split is not None:
            write_split(folder.split, child.split, child.left_out)
        else:
            data = run.split.read_bytes()
            write_atomic(folder.split, lambda stream: stream.write(data))
    child.options.write(folder)
    return folder


def record_kept(run: RunDir, name: str) -> None:
    """Record in ``study.json`` which child the study keeps."""
    write_json(run.study, {**read_json(run.study), "kept": name})


def titled(progress: ProgressCallback, title: str) -> ProgressCallback:
    """Return a callback that calls `progress` with the child's title before each message."""

    def update(given: Progress) -> None:
        progress(replace(given, message=f"{title}: {given.message or given.phase}"))

    return update


def _show_number(n_finished: int, n_children: int | None, progress: ProgressCallback) -> None:
    if n_children is not None:
        progress(Progress("runs", n_finished, n_children, "runs"))


def _begin(study: Study, run: RunDir) -> None:
    if not run.study.exists():
        write_json(run.study, {"kind": study.kind, "children": [], "kept": None})


def _note_child(run: RunDir, name: str) -> None:
    """Append a finished child to the list in ``study.json``."""
    record = read_json(run.study)
    write_json(run.study, {**record, "children": [*record["children"], name]})


def _finished(run: RunDir) -> dict[str, Outcome]:
    """Return the outcomes of the children that have finished, in the order in which they finished."""
    return {name: Outcome.read(run.child(name)) for name in read_json(run.study)["children"]}
