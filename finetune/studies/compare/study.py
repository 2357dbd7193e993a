"""Compare methods as a study: train every arm with every seed on one split, then compute statistics, verdict and page.

Every child is an ordinary run that can be resumed and opened by itself. The runs share the cache, so features that several arms
have in common are computed once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from finetune.comparison_spec import Arm, ComparisonSpec
from finetune.data.places.opening import check_present
from finetune.errors import InvalidInput
from finetune.evaluation import predictions as tables
from finetune.evaluation.compare import ArmPredictions, compare_pairs
from finetune.evaluation.predictions import Predictions
from finetune.events import StudyConcluded
from finetune.naming import dataset_name, model_name
from finetune.progress import ProgressCallback, silent
from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.runs.prepare import read_and_build, split_for
from finetune.runs.shared import Shared
from finetune.runs.watch import Stopwatch, failures_recorded, recorded
from finetune.storage.files import json_text, read_json, write_atomic, write_json
from finetune.storage.rundir import RunDir
from finetune.studies.carry_out import carry_out
from finetune.studies.compare.page import write_comparison_page
from finetune.studies.compare.result import ArmRuns, Comparison, conclude
from finetune.studies.study import Child, record_kept, run_children

STOPS_AT = 0.05  # with a budget, an arm is not run again after losing with a smaller p value, adjusted for the number of pairs


@dataclass(frozen=True)
class ArmsTimesSeeds:
    """The study of a comparison: all arms with the first seed, then all with the second, and so on.

    With a budget of seconds, an arm is run again only if no other arm is significantly better and if a run as long as its last
    one still fits into the budget.
    """

    spec: ComparisonSpec
    run: RunDir
    split: str

    kind = "comparison"

    @property
    def n_children(self) -> int:
        return len(self.spec.arms) * self.spec.settings.seeds

    def next_children(self, finished: Mapping[str, Outcome]) -> Sequence[Child]:
        for number in range(self.spec.settings.seeds):
            waiting = [arm for arm in self.spec.arms if arm.run_name(number) not in finished]
            possible = [arm for arm in waiting if not self.given_up(arm, finished)]
            if possible:
                return (
                    [self._child(possible[0], number)]
                    if self.spec.settings.budget_seconds
                    else [self._child(arm, number) for arm in possible]
                )
        return []

    def given_up(self, arm: Arm, finished: Mapping[str, Outcome]) -> str:
        """Return why an arm is not run again; an empty string if it may be."""
        budget = self.spec.settings.budget_seconds
        own = [outcome for name, outcome in finished.items() if name.startswith(f"{arm.slug}-seed")]
        if budget is None or not finished:
            return ""
        spent = sum(outcome.cost["wall_seconds"] for outcome in finished.values())
        if not own:
            return f"the budget of {budget:,.0f} s was spent before it could begin" if spent >= budget else ""
        stopped = f"stopped after {len(own)} of {self.spec.settings.seeds} seeds"
        if spent + own[-1].cost["wall_seconds"] > budget:
            return f"{stopped}: another would exceed the budget of {budget:,.0f} s"
        if winner := self._beaten_by(arm, finished):
            return f"{stopped}: {winner} is significantly better already"
        return ""

    def arm_runs(self, finished: Mapping[str, Outcome]) -> list[ArmRuns]:
        """Return the finished runs of every arm that has any; `note` says why an arm has fewer runs than requested."""
        found = []
        for arm in self.spec.arms:
            names = self._finished_of(arm, finished)
            if names:
                note = self.given_up(arm, finished) if len(names) < self.spec.settings.seeds else ""
                found.append(ArmRuns(self._predictions(arm, names), tuple(finished[name] for name in names), note))
        return found

    def _beaten_by(self, arm: Arm, finished: Mapping[str, Outcome]) -> str:
        names = [(other, self._finished_of(other, finished)) for other in self.spec.arms]
        arms = [self._predictions(other, found) for other, found in names if found]
        if len(arms) < 2:
            return ""
        for pair in compare_pairs(arms, self.spec.settings.margin):
            if arm.name in (pair.a, pair.b) and pair.winner not in (None, arm.name) and pair.p_adjusted < STOPS_AT:
                return str(pair.winner)
        return ""

    def _finished_of(self, arm: Arm, finished: Mapping[str, Outcome]) -> list[str]:
        """Return the names of an arm's finished runs, in the order of the seeds."""
        names = (arm.run_name(number) for number in range(self.spec.settings.seeds))
        return [name for name in names if name in finished]

    def _predictions(self, arm: Arm, names: Sequence[str]) -> ArmPredictions:
        return arm_predictions(arm.name, [self.run.child(name) for name in names], self.split)

    def _child(self, arm: Arm, number: int) -> Child:
        return Child(
            name=arm.run_name(number),
            title=f"{arm.name}, seed {number + 1} of {self.spec.settings.seeds}",
            spec=arm.spec.model_copy(update={"seed": arm.spec.seed + number}),
            # The first run of each arm is exported to measure size and latency; the chosen run is exported at the end if needed.
            options=RunOptions(goal="exported" if number == 0 else "judged"),
        )


def arm_predictions(name: str, runs: Sequence[RunDir], split: str) -> ArmPredictions:
    """Return the predictions of an arm's runs on `split`; for ``cv`` with the fold of each image."""
    found = tuple(tables.read(run.predictions_of(split)) for run in runs)
    if split != "cv":
        return ArmPredictions(name, found)
    return ArmPredictions(name, found, *_folds_of(runs[0], found[0]))


def _folds_of(run: RunDir, pooled: Predictions) -> tuple[tuple[int, ...], int]:
    """Return the fold of each row of pooled predictions, and the mean number of training images of a fold."""
    folds = Outcome.read(run).cross_validation
    assert folds is not None, "predictions of the split cv are a cross-validation's"
    sizes = [(fold["fold"], fold["n_test"], fold["n_train"]) for fold in folds["folds"]]
    numbers = np.repeat([fold for fold, _, _ in sizes], [n_test for _, n_test, _ in sizes])
    assert len(numbers) == len(pooled)
    return tuple(numbers.tolist()), round(sum(n_train for _, _, n_train in sizes) / len(sizes))


def compare(
    spec: ComparisonSpec,
    shared: Shared,
    progress: ProgressCallback = silent,
    run_dir: Path | None = None,
    begun: Callable[[RunDir], object] = lambda run: None,
) -> Comparison:
    """Train every arm with every seed, compare them on the same images, and register the best run of the chosen arm if requested.

    If an earlier call with the same request (or with the same `run_dir`) was interrupted, it is resumed.

    Args:
        begun: is called with the folder of the comparison before anything is done in it.

    Raises:
        InvalidInput: there are no test images to compare on.
        FinetuneError: a run failed; the error is also written to ``error.json`` in the comparison's folder.
        KeyboardInterrupt: the comparison was asked to stop.
    """
    if run_dir is None:
        check_present(spec.job.training_file, spec.job.validation_file, spec.job.test_file)
    run = RunDir(run_dir.absolute()) if run_dir is not None else _folder_for(spec, shared)
    begun(run)
    with run.held(), failures_recorded(run):
        if run.comparison.exists():
            return Comparison.from_dict(read_json(run.comparison))
        stopwatch = Stopwatch(run)
        progress = recorded(progress, run, stopwatch)
        text = json_text(spec.to_dict(), indent=2) + "\n"
        write_atomic(run.request, lambda stream: stream.write(text.encode()))
        dataset, _ = read_and_build(spec.job, shared, progress)
        split = split_for(spec.job, dataset, run)
        split_name = "cv" if spec.job.data.folds is not None else "test"
        if split_name == "test" and not split.of("test"):
            raise InvalidInput(
                "a comparison needs images that no run has trained or chosen on: give data.test_fraction or a test folder, or "
                "compare with --folds"
            )
        study = ArmsTimesSeeds(spec, run, split_name)
        outcomes = run_children(study, run, shared, progress, carry_out)
        arms = study.arm_runs(outcomes)
        found = conclude(
            arms,
            identifier=run.root.name,
            folder=run.root,
            dataset=dataset.name,
            split=split_name,
            margin=spec.settings.margin,
        )
        chosen = best_run(found)
        record_kept(run, chosen.name)
        run.record(StudyConcluded(found.verdict.sentence, chosen.name))
        registered = _register(spec, chosen, outcomes, shared, progress) if spec.settings.register_chosen else None
        found = dataclasses.replace(found, registered=registered, cost=stopwatch.read())
        write_comparison_page(found, arms, {sample.id: sample for sample in split.samples}, _command(spec))
        write_json(run.comparison, found.to_dict())
        return found


def best_run(found: Comparison) -> RunDir:
    """Return the run of the chosen arm with the highest headline metric on val, so that the test metrics stay unbiased."""
    runs = found.arm(found.verdict.choose).runs
    key = f"val/{found.headline}"
    return RunDir(max(runs, key=lambda run: Outcome.read(RunDir(run)).metrics.get(key, 0.0)))


def _register(
    spec: ComparisonSpec, chosen: RunDir, outcomes: Mapping[str, Outcome], shared: Shared, progress: ProgressCallback
) -> str:
    arm, number = next(
        (arm, number) for arm in spec.arms for number in range(spec.settings.seeds) if arm.run_name(number) == chosen.root.name
    )
    of_run = arm.spec.model_copy(update={"seed": arm.spec.seed + number})
    outcome = carry_out(of_run, chosen, shared, progress, RunOptions(goal="registered"))
    return f"{outcome.model}@{outcome.version}"


def _command(spec: ComparisonSpec) -> str:
    """Return the command and the request file that repeat the comparison."""
    return "finetune compare request.yaml   # with\n" + yaml.safe_dump(
        spec.job.model_dump(mode="json", exclude_defaults=True) | spec.settings.model_dump(mode="json", exclude_defaults=True),
        sort_keys=False,
        allow_unicode=True,
    )


def finished_before(run: RunDir) -> RunDir | None:
    """Return the finished comparison of the same request that precedes `run` in the workspace; None if there is none."""
    stem, dash, number = run.root.name.rpartition("-")
    if not re.search(r"-comparison-[0-9a-f]{8}$", stem) or not number.isdigit() or int(number) < 2:
        return None
    earlier = RunDir(run.root.with_name(stem if number == "2" else f"{stem}{dash}{int(number) - 1}"))
    return earlier if earlier.comparison.exists() else None


def _folder_for(spec: ComparisonSpec, shared: Shared) -> RunDir:
    """Return the folder of an unfinished comparison of the same request, or a new one."""
    name = model_name(spec.job.suffix, dataset_name(spec.job.training_file))
    stem = f"{name}-comparison-{spec.digest()[:8]}"
    number = 1
    while (run := RunDir(shared.workspace.runs / (stem if number == 1 else f"{stem}-{number}"))).comparison.exists():
        number += 1
    return run
