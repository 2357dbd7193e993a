"""Carry out everything that comes before training: read the data, find or build the network, split, resolve.

This is all that `finetune check` does. Torch is imported only if a network has to be built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from finetune.bundle.preprocess import Preprocess
from finetune.data.augment import Augment, build_augment
from finetune.data.check import Scanned, check_images, scan, verify
from finetune.data.corrections import corrected
from finetune.data.dataset import Dataset, Sample
from finetune.data.files import state_of
from finetune.data.index import index_dataset
from finetune.data.manifest import keep, require
from finetune.data.reading import reading_of
from finetune.data.split import read_split, recorded_sides, refuse_impossible_folds, split_dataset, write_split
from finetune.errors import DataError, ImageError, InvalidInput, Problem
from finetune.features.rows import FeatureContext, Views, decode_into_features
from finetune.messages import printable
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runs.known import KnownNetwork, find_known, network_key
from finetune.runs.network import Network
from finetune.runs.options import RunOptions
from finetune.runs.resolve import Resolved, resolve, resolve_compute, resolve_resize, resolve_task
from finetune.runs.shared import Shared
from finetune.runtime.collector import importing
from finetune.runtime.cores import available_cores
from finetune.spec import JobSpec
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.tasks import Task, task_named
from finetune.training.choices import Choices
from finetune.training.compute import resolve_device

if TYPE_CHECKING:
    from finetune.runs.build import BuiltNetwork


@dataclass(frozen=True)
class Prepared:
    """A resolved request with its data, read and split, and the network that training starts from."""

    resolved: Resolved
    dataset: Dataset
    checked_on: tuple[Sample, ...]  # that the export is compared on: val, also if the run trains on it; without val, train
    network: Network

    @property
    def task(self) -> Task:
        return task_named(self.resolved.task)


def augment_of(resolved: Resolved, store: Store) -> Augment:
    """Return the augmentation of a run's training images."""
    asked = resolved.spec.augmentation
    return build_augment(asked.policy, asked.transforms, resolved.preprocess, store.folder("notes"))


def prepare(
    spec: JobSpec,
    shared: Shared,
    progress: ProgressCallback = silent,
    run: RunDir | None = None,
    options: RunOptions | None = None,
) -> Prepared:
    """Read and split the data and resolve the request; find or build the network while another thread reads the files.

    Args:
        run: the folder that the split is written to. If it already contains a split, because the run was interrupted or its study
            has made the split, that one is used.

    Raises:
        InvalidInput: the data or the model cannot be used; if both, one error names both. Or some files cannot be used.
        ExportError: the backbone cannot be exported, although it could be trained.
    """
    options = options or RunOptions()
    compute = resolve_compute(spec, resolve_device(spec.compute.device), available_cores())
    dataset, network = read_and_build(spec, shared, progress)
    dataset = split_for(spec, dataset, run)
    checked_on = dataset.of("val") or dataset.of("train")
    if options.decided_by is not None:
        dataset = with_val_as_train(dataset)
    earlier, choices = _decisions(run, options)
    resolved = resolve(spec, dataset, network.facts, compute, earlier, choices.l2 if choices else None)
    return Prepared(resolved, dataset, checked_on, network)


def read_and_build(spec: JobSpec, shared: Shared, progress: ProgressCallback = silent) -> tuple[Dataset, Network]:
    """Return the checked dataset, not split yet, and the untrained network. Both are kept for later runs of this process.

    Another thread reads the files while this thread builds and traces the network. If the method needs the pooled features of all
    images, they are computed in the same pass that checks the files, so that each file is decoded once. If the request is only
    for a solved head, and an earlier run of this user has recorded the network, no network is built.
    """
    data_key = _data_key(spec)
    if data_key in shared.datasets:
        dataset = shared.datasets[data_key]
        network = _network_in_memory(spec, dataset, shared) or _network_on_disk(spec, dataset, shared)
        network = network or built_network(spec, dataset, shared)
        network.try_export()
        return dataset, network
    indexed = _index(spec, shared)
    with _reading(spec, indexed, shared, progress) as reading:
        network = _network_in_memory(spec, indexed, shared) or _network_on_disk(spec, indexed, shared)
        network = network or built_network(spec, indexed, shared)
        reading.network.set_result(network)
        network.try_export()
        shared.datasets[data_key] = _with_revision(spec, reading.dataset.result(), shared)
    return shared.datasets[data_key], network


def _with_revision(spec: JobSpec, dataset: Dataset, shared: Shared) -> Dataset:
    """Apply the corrections of the request's manifest, record the dataset's revision, and return the dataset with it.

    Raises:
        DataError: the manifest cannot be applied, or the request names another revision.
    """
    if spec.data.manifest is not None:
        dataset = corrected(dataset, Path(spec.data.manifest))
    if spec.data.revision is not None:
        require(dataset, spec.data.revision, shared.workspace.datasets)
    keep(shared.workspace.datasets, dataset)
    return replace(dataset, revision=dataset.digest)


def built_network(spec: JobSpec, dataset: Dataset, shared: Shared) -> BuiltNetwork:
    """Return the torch network for the task and classes of a dataset; build it if this process has not done so yet.

    Raises:
        InvalidInput: the backbone, its weights or the head does not exist under the name in the request.
    """
    with importing("torch"):
        from finetune.runs.build import BuiltNetwork, build_network

    key = _key_in_memory(spec, dataset, shared)
    network = shared.networks.get(key)
    if not isinstance(network, BuiltNetwork):
        network = shared.networks[key] = build_network(spec, resolve_task(spec, dataset).name, len(dataset.classes), shared)
    return network


def decisions_of(run: RunDir) -> tuple[Resolved, Choices]:
    """Return the resolved values of a finished run, and what it chose on its validation images."""
    return Resolved.from_dict(read_json(run.resolved)), Choices.from_dict(read_json(run.outcome)["choices"])


def _decisions(run: RunDir | None, options: RunOptions) -> tuple[Resolved | None, Choices | None]:
    if run is None or options.decided_by is None:
        return None, None
    return decisions_of(RunDir((run.root / options.decided_by).resolve()))


_FIELDS_WITHOUT_EFFECT_ON_FILES = {
    *("val_fraction", "test_fraction", "split_seed", "split_file", "folds", "resize", "class_weights", "logit_adjustment"),
}


def _data_key(spec: JobSpec) -> str:
    """Return the digest of everything in a request that determines which files are read and which samples are left out."""
    manifest = state_of(Path(spec.data.manifest)) if spec.data.manifest is not None else None
    data = spec.data.model_dump_json(exclude=_FIELDS_WITHOUT_EFFECT_ON_FILES)
    parts = (spec.training_file, spec.validation_file, spec.test_file, data, manifest)
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def split_for(spec: JobSpec, dataset: Dataset, run: RunDir | None) -> Dataset:
    """Return the dataset with the split that is in the folder of `run`; else split it as `spec` requests, and write the split."""
    if run is not None and run.split.exists():
        return read_split(run.split, dataset)
    data = spec.data
    split = split_dataset(
        dataset,
        val_fraction=data.val_fraction,
        test_fraction=data.held_out_fraction,
        seed=data.split_seed,
        recorded=recorded_sides(Path(data.split_file)) if data.split_file is not None else None,
    )
    if run is not None:
        write_split(run.split, split)
    return split


def with_val_as_train(dataset: Dataset) -> Dataset:
    """Return the dataset with its val images as training images, in the order of its samples."""
    samples = (replace(sample, split="test" if sample.split == "test" else "train") for sample in dataset.samples)
    return replace(dataset, samples=tuple(samples))


def _index(spec: JobSpec, shared: Shared) -> Dataset:
    """List the samples without reading the files.

    Raises:
        InvalidInput: the data cannot be used. If the model cannot be used either, the error names both problems.
    """
    try:
        dataset = index_dataset(
            spec.training_file, spec.validation_file, spec.test_file, reading=reading_of(spec.data, shared.store)
        )
        if not dataset.samples:  # every file that a table names is missing: there are no classes to build a network for
            check_images(dataset, max_bad_fraction=spec.data.max_bad_fraction)
        _refuse_unlearnable(spec, dataset)
        if spec.data.folds is not None and spec.data.manifest is None:  # corrections may add images to a class
            refuse_impossible_folds(dataset, spec.data.folds)
        return dataset
    except InvalidInput as of_data:
        from finetune.runs.build import seeded_backbone

        try:
            seeded_backbone(spec, shared)
        except InvalidInput as of_model:
            problems = [found for error in (of_data, of_model) for found in (Problem("", error.message), *error.problems)]
            raise InvalidInput("two things are wrong with this request", problems) from of_data
        raise


def _refuse_unlearnable(spec: JobSpec, dataset: Dataset) -> None:
    """Refuse losses and labels that the task cannot learn from.

    Raises:
        DataError: the task does not have the loss, or an image does not have exactly one label in a multiclass task.
    """
    task = resolve_task(spec, dataset)
    if spec.hyperparameters.loss not in ("auto", *task.losses):
        known = ", ".join(task.losses)
        raise DataError(
            f"hyperparameters.loss: {spec.hyperparameters.loss} is not a loss of the task {task.name}, which the labels of "
            f"{printable(dataset.root)} ask for; it has {known}"
        )
    odd = next((sample for sample in dataset.samples if not task.can_train_on(sample.target)), None)
    if odd is not None:
        names = ", ".join(dataset.label_names(odd)) or "none"
        raise DataError(
            f"{printable(dataset.root)}: task {task.name} learns exactly one label for each image, and images have several, or "
            f"none ({printable(odd.id)}: {names}). Set task: multilabel, or leave it out"
        )


# ---------------------------------------------------------------------------------------------- networks of earlier runs


def _network_in_memory(spec: JobSpec, dataset: Dataset, shared: Shared) -> Network | None:
    """Return the network that an earlier run in this process built or loaded, if it is sufficient for this request."""
    found = shared.networks.get(_key_in_memory(spec, dataset, shared))
    return None if isinstance(found, KnownNetwork) and not _only_solves(spec) else found


def _network_on_disk(spec: JobSpec, dataset: Dataset, shared: Shared) -> Network | None:
    """Return the network that an earlier run recorded, if the request is only for a solved head."""
    if not _only_solves(spec):
        return None
    known = find_known(
        network_key(spec, resolve_task(spec, dataset).name, shared.workspace.models), shared.recorded, shared.store
    )
    if known is not None:
        shared.networks[_key_in_memory(spec, dataset, shared)] = known
    return known


def _key_in_memory(spec: JobSpec, dataset: Dataset, shared: Shared) -> str:
    """Return the key of a network of this process, which may have been built with a head for the classes of a dataset."""
    return f"{network_key(spec, resolve_task(spec, dataset).name, shared.workspace.models)} {len(dataset.classes)}"


def _only_solves(spec: JobSpec) -> bool:
    """Return whether a request is for nothing but a solved head, computed on a CPU."""
    return spec.method.type == "linear_probe" and resolve_device(spec.compute.device) == "cpu"


def framing(spec: JobSpec, dataset: Dataset, preprocess: Preprocess) -> Preprocess:
    """Return the preprocessing of a request: that of the pretrained weights, with the resize mode resolved for the dataset."""
    return replace(preprocess, resize=resolve_resize(spec, dataset, preprocess).resize)


# --------------------------------------------------------------------------------------------------------------- reading files


@dataclass(frozen=True)
class _Reading:
    """Results that the reading thread and the calling thread pass to each other.

    Args:
        dataset: the checked dataset, from the reading thread.
        network: set by the caller, who finds or builds it; the reading thread waits for it before it computes features.
    """

    dataset: Future[Dataset]
    network: Future[Network]


@contextmanager
def _reading(spec: JobSpec, indexed: Dataset, shared: Shared, progress: ProgressCallback) -> Iterator[_Reading]:
    """Check the images in another thread during the block. If the block raises, the thread stops at its next progress report."""
    given_up = Event()
    network: Future[Network] = Future()

    def report(update: Progress) -> None:
        if given_up.is_set():
            raise CancelledError
        progress(update)

    with ThreadPoolExecutor(1, "reading") as pool:
        try:
            scanned = pool.submit(scan, indexed, progress=report, memory=shared.store.folder("notes"))
            dataset = pool.submit(_verify, spec, scanned, network, shared, report)
            yield _Reading(dataset, network)
        except BaseException:
            given_up.set()
            if not network.done():
                network.set_exception(CancelledError())
            raise


def _verify(
    spec: JobSpec, scanning: Future[Scanned], building: Future[Network], shared: Shared, progress: ProgressCallback
) -> Dataset:
    """Decode the files that have never been decoded. In the same pass compute their features, if the request needs them."""
    scanned = scanning.result()

    def decode(samples: Sequence[Sample]) -> Mapping[int, ImageError]:
        network = building.result()
        threads = resolve_compute(spec, "cpu", available_cores()).threads
        context = FeatureContext(shared.store, threads=threads, progress=progress)
        views = Views(framing(spec, scanned.dataset, network.facts.preprocess))
        return decode_into_features(network.prefix, views, context, samples)

    return verify(
        scanned,
        on_bad=spec.data.on_bad_image,
        max_bad_fraction=spec.data.max_bad_fraction,
        decode=decode if needs_features(spec) and resolve_device(spec.compute.device) == "cpu" else None,
        progress=progress,
    )


def needs_features(spec: JobSpec) -> bool:
    """Return whether the method starts with a head that is solved on the frozen features of all images."""
    return getattr(spec.method, "warm_head", True)
