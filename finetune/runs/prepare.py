"""Everything before training: read the data, build the network, split, resolve. `finetune check` ends here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

from finetune.data.check import scan, verify
from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.data.manifest import keep, require
from finetune.data.reading import reading_of
from finetune.data.split import read_split, recorded_sides, split_dataset, write_split
from finetune.errors import DataError, InvalidInput, Problem
from finetune.features.rows import FeatureContext, Views, decode_into_features
from finetune.model.classifier import Classifier
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runs.build import Built, Network, Shared, build, build_classifier, seeded_backbone, trace_network
from finetune.runs.options import RunOptions
from finetune.runs.resolve import Resolved, resolve, resolve_compute, resolve_resize, resolve_task
from finetune.runtime.cores import available_cores
from finetune.spec import JobSpec
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.train.choices import Choices
from finetune.train.machine import resolve_device


def prepare(
    spec: JobSpec,
    shared: Shared,
    progress: ProgressCallback = silent,
    run: RunDir | None = None,
    options: RunOptions | None = None,
) -> Built:
    """Read, split and resolve; build the network. The files are read in a thread of their own meanwhile.

    Args:
        run: where the split is written, or read back if the run was interrupted or its study has drawn the split.

    Raises:
        InvalidInput: what is wrong with the data and what with the model, in one error; else what is wrong with the files.
        ExportError: the backbone could be trained, but not served.
    """
    compute = resolve_compute(spec, resolve_device(spec.compute.device), available_cores())
    dataset, network = read_and_build(spec, shared, progress)
    dataset = split_for(spec, dataset, run)
    checked_on = dataset.of("val") or dataset.of("train")
    if options is not None and options.decided_by is not None:
        dataset = with_val_as_train(dataset)
    earlier, choices = _decisions(run, options or RunOptions())
    resolved = resolve(spec, dataset, network.facts, compute, earlier, choices.l2 if choices else None)
    return build(resolved, dataset, network.copy(), checked_on)


def read_and_build(spec: JobSpec, shared: Shared, progress: ProgressCallback = silent) -> tuple[Dataset, Network]:
    """Return the checked dataset, not split yet, and the untrained network; each once in a process.

    The files are read in a thread of their own, while the network is built and traced here. Where the method needs the pooled
    features of all images, they are computed in the same pass that checks the files, so that each is decoded once.
    """
    data_key, network_key = _data_key(spec), _network_key(spec)
    if data_key in shared.datasets and network_key in shared.networks:
        return shared.datasets[data_key], shared.networks[network_key]
    indexed = _index(spec, shared.store)
    known = shared.networks.get(network_key)
    network = _Awaited(known) if known else _Awaited()
    with _reading(spec, indexed, shared, network, progress) as reading:
        if known is None:
            classifier = build_classifier(spec, len(indexed.classes))
            network.built.set_result(classifier)
            known = shared.networks[network_key] = trace_network(classifier, resolve_task(spec), shared.workspace)
            network.traced.set_result(known)
        shared.datasets[data_key] = _of_a_revision(spec, reading.result(), shared)
    return shared.datasets[data_key], known


def _of_a_revision(spec: JobSpec, dataset: Dataset, shared: Shared) -> Dataset:
    """Return checked data with its revision, which is kept; refuse it where the request names another one."""
    if spec.data.revision is not None:
        require(dataset, spec.data.revision, shared.workspace.datasets)
    keep(shared.workspace.datasets, dataset)
    return replace(dataset, revision=dataset.digest)


class _Awaited:
    """A network that another thread builds and traces."""

    def __init__(self, known: Network | None = None) -> None:
        self.built: Future[Classifier] = Future()
        self.traced: Future[Network] = Future()
        if known is not None:
            self.built.set_result(known.classifier)
            self.traced.set_result(known)

    def give_up(self) -> None:
        """Let nobody wait for it any longer."""
        for future in (self.built, self.traced):
            if not future.done():
                future.set_exception(CancelledError())


def decisions_of(run: RunDir) -> tuple[Resolved, Choices]:
    """Return what a finished run resolved and chose."""
    return Resolved.from_dict(read_json(run.resolved)), Choices.from_dict(read_json(run.outcome)["choices"])


def _decisions(run: RunDir | None, options: RunOptions) -> tuple[Resolved | None, Choices | None]:
    if run is None or options.decided_by is None:
        return None, None
    return decisions_of(RunDir((run.root / options.decided_by).resolve()))


_OF_THE_SPLIT = {"val_fraction", "test_fraction", "split_seed", "split_file", "folds", "resize"}


def _data_key(spec: JobSpec) -> str:
    """Return what decides which files are read and which of them are left out."""
    parts = (spec.training_file, spec.validation_file, spec.test_file, spec.data.model_dump_json(exclude=_OF_THE_SPLIT))
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _network_key(spec: JobSpec) -> str:
    parts = (spec.model.model_dump_json(), spec.seed, _data_key(spec))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def split_for(spec: JobSpec, dataset: Dataset, run: RunDir | None) -> Dataset:
    """Return the dataset divided as `run` says that it was, else as `spec` asks, which is then written into `run`."""
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
    """Return the dataset with its val images as training images, in the order that the samples have."""
    samples = (replace(sample, split="test" if sample.split == "test" else "train") for sample in dataset.samples)
    return replace(dataset, samples=tuple(samples))


def _index(spec: JobSpec, store: Store) -> Dataset:
    """List the samples; where that fails, the error also tells what is wrong with the model."""
    try:
        dataset = index_dataset(spec.training_file, spec.validation_file, spec.test_file, reading=reading_of(spec.data, store))
        _refuse_what_is_not_learnt(spec, dataset)
        return dataset
    except InvalidInput as of_data:
        try:
            seeded_backbone(spec)
        except InvalidInput as of_model:
            problems = [found for error in (of_data, of_model) for found in (Problem("", error.message), *error.problems)]
            raise InvalidInput("two things are wrong with this request", problems) from of_data
        raise


def _refuse_what_is_not_learnt(spec: JobSpec, dataset: Dataset) -> None:
    """Refuse what data may say and no task of this release acts on: better an error than to ignore it."""
    several = next((sample for sample in dataset.samples if not isinstance(sample.target, int)), None)
    if several is not None:
        names = ", ".join(dataset.label_names(several)) or "none"
        raise DataError(
            f"{dataset.root}: images have several labels, or none ({several.id}: {names}), and this release learns exactly one "
            "for each image"
        )
    if spec.data.weight_column is not None:
        raise DataError("data.weight_column: weights are read, but nothing is trained with them yet; leave it out")


@contextmanager
def _reading(
    spec: JobSpec, indexed: Dataset, shared: Shared, network: _Awaited, progress: ProgressCallback
) -> Iterator[Future[Dataset]]:
    """Check the images in a thread of its own; where the block ends by an exception, it is given up soon."""
    given_up = Event()

    def report(update: Progress) -> None:
        if given_up.is_set():
            raise CancelledError
        progress(update)

    with ThreadPoolExecutor(1, "reading") as pool:
        try:
            yield pool.submit(_read, spec, indexed, shared, network, report)
        except BaseException:
            given_up.set()
            network.give_up()
            raise


def _read(spec: JobSpec, indexed: Dataset, shared: Shared, network: _Awaited, progress: ProgressCallback) -> Dataset:
    """Read, decode and judge the files."""
    scanned = scan(indexed, progress=progress, memory=shared.store.folder("notes"))
    decode = None
    if needs_features(spec) and resolve_device(spec.compute.device) == "cpu":
        classifier = network.built.result()
        preprocess = classifier.backbone.preprocess
        resize = resolve_resize(spec, scanned.dataset, preprocess).resize
        views = Views(replace(preprocess, resize=resize))
        context = FeatureContext(
            shared.store,
            threads=resolve_compute(spec, "cpu", available_cores()).threads,
            graph=lambda: network.traced.result().filled(),
            progress=progress,
        )
        decode = partial(decode_into_features, classifier, views, context)
    return verify(
        scanned, on_bad=spec.data.on_bad_image, max_bad_fraction=spec.data.max_bad_fraction, decode=decode, progress=progress
    )


def needs_features(spec: JobSpec) -> bool:
    """Return whether a request begins with the head solved on the frozen features of all images."""
    return getattr(spec.method, "warm_head", True)
