"""Carry out a depth study: train every network from scratch on the same images, then write one page with figures and sentences.

Every child is an ordinary run that can be resumed and opened by itself; a study that was killed resumes where it stopped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.dataset import Dataset, Sample
from finetune.errors import InvalidInput
from finetune.evaluation.diagnose import RunRecords
from finetune.events import StudyConcluded
from finetune.naming import dataset_name, model_name
from finetune.progress import ProgressCallback, silent
from finetune.report.depth_page import render_depth
from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.runs.prepare import read_and_build, split_for
from finetune.runs.shared import Shared
from finetune.runs.watch import Stopwatch, failures_recorded, recorded
from finetune.storage.files import json_text, read_json, write_atomic, write_json
from finetune.storage.rundir import RunDir
from finetune.studies.carry_out import carry_out
from finetune.studies.depth.request import DepthRequest, Network
from finetune.studies.depth.result import DepthStudy, headline, network_results, shortcut_gains
from finetune.studies.study import Child, record_kept, run_children

SAMPLE_SIZE = 512  # training images that every network predicts at the end
RESULT = "depth.json"


@dataclass(frozen=True)
class GrowingDepth:
    """The study of networks of increasing depth: all networks of one depth, then those of the next."""

    request: DepthRequest
    split: Dataset
    left_out: tuple[Sample, ...]

    kind = "depth"

    @property
    def n_children(self) -> int:
        return len(self.request.networks)

    def next_children(self, finished: Mapping[str, Outcome]) -> Sequence[Child]:
        for depth in self.request.depths:
            networks = [network for network in self.request.networks if network.depth == depth]
            waiting = [self._child(network) for network in networks if network.name not in finished]
            if waiting:
                return waiting
        return []

    def _child(self, network: Network) -> Child:
        return Child(
            name=network.name,
            title=network.name,
            spec=self.request.job(network, len(self.split.of("train"))),
            options=RunOptions(goal="judged", judged=("val",), sample_size=SAMPLE_SIZE),
            split=self.split,
            left_out=self.left_out,
        )


def study_depth(
    request: DepthRequest, shared: Shared, progress: ProgressCallback = silent, run_dir: Path | None = None
) -> DepthStudy:
    """Train the networks, and write ``depth.json`` and ``report.html``; resume an earlier call that was interrupted.

    Raises:
        InvalidInput: the data cannot be used.
        FinetuneError: a run failed; the error is also written to ``error.json`` in the study's folder.
        KeyboardInterrupt: the study was asked to stop.
    """
    run = RunDir(run_dir.absolute()) if run_dir is not None else _folder_for(request, shared)
    with run.held(), failures_recorded(run):
        stopwatch = Stopwatch(run)
        progress = recorded(progress, run, stopwatch)
        text = json_text(request.to_dict(), indent=2) + "\n"
        write_atomic(run.request, lambda stream: stream.write(text.encode()))
        first = request.job(request.networks[0], request.n_images)
        dataset, _ = read_and_build(first, shared, progress)
        split, left_out = limited(split_for(first, dataset, run), request.n_images)
        study = GrowingDepth(request, split, left_out)
        run_children(study, run, shared, progress, carry_out)
        done = run.root / RESULT
        cost = read_json(done)["cost"] if done.exists() else stopwatch.read()
        found = _conclude(run, request, dataset.name, split, cost)
        record_kept(run, min(found.networks, key=lambda one: (one.val_error, one.network.depth)).network.name)
        run.record(StudyConcluded(headline(found), request.networks[-1].name))
        html = render_depth(found.to_dict(), request.command)
        write_atomic(found.report, lambda stream: stream.write(html.encode("utf-8", "replace")))
        write_json(done, found.to_dict())
        return found


def limited(split: Dataset, n_images: int) -> tuple[Dataset, tuple[Sample, ...]]:
    """Limit a split to `n_images` training images and half as many val images, the same share of each class.

    Which images are kept depends on their bytes only. Test images are not needed, because nothing is chosen on val.

    Returns:
        The limited dataset, and the samples that are left out.

    Raises:
        InvalidInput: the split has no train or no val images.
    """
    kept: set[str] = set()
    for name, most in (("train", n_images), ("val", n_images // 2)):
        of_split = split.of(name)
        if not of_split:
            raise InvalidInput(f"a depth study needs {name} images")
        by_class: dict[int, list[Sample]] = defaultdict(list)
        for sample in of_split:
            by_class[sample.labels[0]].append(sample)
        for samples in by_class.values():
            share = max(1, len(samples) * most // len(of_split)) if len(of_split) > most else len(samples)
            kept |= {sample.id for sample in sorted(samples, key=lambda one: (one.sha256, one.id))[:share]}
    chosen = tuple(sample for sample in split.samples if sample.id in kept)
    left_out = tuple(sample for sample in split.samples if sample.id not in kept)
    return replace(split, samples=chosen), left_out


def _conclude(run: RunDir, request: DepthRequest, dataset: str, split: Dataset, cost: Mapping[str, float]) -> DepthStudy:
    """Return the result of the study from the finished runs in its folder."""
    children = {network: run.child(network.name) for network in request.networks}
    records = {network: RunRecords.read(child.root) for network, child in children.items()}
    seconds = {network: Outcome.read(child).cost["train_seconds"] for network, child in children.items()}
    return DepthStudy(
        id=run.root.name,
        folder=run.root,
        request=request,
        dataset=dataset,
        n_train=len(split.of("train")),
        n_val=len(split.of("val")),
        n_epochs=max(one.recipe["phases"][0]["n_epochs"] for one in records.values()),
        networks=network_results(request, records, seconds),
        shortcuts=shortcut_gains(request, records),
        cost=cost,
    )


def _folder_for(request: DepthRequest, shared: Shared) -> RunDir:
    name = model_name(None, dataset_name(request.data))
    return RunDir(shared.workspace.runs / f"{name}-depth-{request.digest()[:8]}")
