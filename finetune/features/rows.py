"""The frozen prefix, computed once: its output for every image and view, read from the cache where it was computed before.

A frozen stage's output for one view of an image never changes. `pooled_features` gives the embeddings that a head is solved on;
`FrozenRows` is the general case, any cut, which `finetune.train.replay` trains on; `plan_prefix` says beforehand what either will
cost. Decoding runs beside the network, on all cores; rows stream to disk as they come.

A row's key holds the image's bytes and the view; its space holds the prefix's weights, the preprocessing, the cut, the number
format and the engine. So rows are found again when the dataset grows, is split otherwise or trains another head, and never when
they would differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.image import DECODER, decode_image
from finetune.bundle.preprocess import Preprocess
from finetune.data.augment import Augment
from finetune.data.dataset import Sample
from finetune.data.parallel import ordered_map
from finetune.errors import DataError, DiskFull, ImageError, Problem, TrainingError
from finetune.events import CacheFull, EventCallback, ignore_event
from finetune.features.cache import KEY_BYTES, RowCache, ShardWriter
from finetune.features.prefix import (
    Engine,
    GraphSource,
    PixelPrefix,
    activation_shape,
    onnx_engine_name,
    open_engine,
    prefix_digest,
    refused,
    torch_engine_name,
)
from finetune.model.classifier import Classifier
from finetune.model.cut import why_not_cut
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.cores import available_cores
from finetune.runtime.device import Device
from finetune.storage.store import Store

RowType = Literal["float16", "float32"]

CHECKED_IMAGES = 16  # on which an engine must agree with torch
TIMED_IMAGES = 8  # from which `plan_prefix` estimates
COPIED_ROWS = 1024  # at a time out of the cache
CPU_BATCH = 8  # rows a call of an engine on a CPU
DECODED_AHEAD_BYTES = 128 * 1024**2  # of pixels that wait for the engine, which may still be under construction


@dataclass(frozen=True)
class Views:
    """Which views of an image are computed: number 0 is the one that evaluation sees, the others are augmented.

    An augmented view is a function of the image's bytes and its number alone, so that it is found again in any dataset.
    """

    preprocess: Preprocess
    augment: Augment | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.count > 1 and self.augment is None:
            raise ValueError("more than one view needs an augmentation")

    def names(self) -> list[bytes]:
        """Return what tells the views apart in keys; the preprocessing is in the space."""
        augmented = self.augment.digest() if self.augment is not None and self.count > 1 else ""
        return [b"as evaluated", *(f"{augmented} {number}".encode() for number in range(1, self.count))]

    def pixels(self, data: bytes, numbers: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Return the views with these numbers of one image file, each (h, w, 3)."""
        views = [self.preprocess.load(data) for number in numbers if number == 0]
        augmented = [number for number in numbers if number > 0]
        if augmented and self.augment is not None:
            rgb = decode_image(data, short_side_px=self.augment.decode_short_side_px)
            image_sha256 = hashlib.sha256(data).digest()
            views += [self.augment(rgb, _view_seed(image_sha256, number)) for number in augmented]
        return views


def _view_seed(image_sha256: bytes, number: int) -> int:
    return int.from_bytes(hashlib.sha256(image_sha256 + number.to_bytes(8, "little")).digest()[:8], "little")


@dataclass(frozen=True)
class FeatureContext:
    """Where and with what features are computed; by default on all cores of this process, without telling anybody."""

    store: Store
    device: Device = "cpu"
    threads: int | None = None
    graph: GraphSource | None = None  # where the classifier has been exported already
    progress: ProgressCallback = silent
    event: EventCallback = ignore_event

    @property
    def cores(self) -> int:
        return self.threads or available_cores()


def pooled_features(
    classifier: Classifier, samples: Sequence[Sample], views: Views, context: FeatureContext
) -> NDArray[np.float32]:
    """Return the embeddings that the head gets: (N, D), or (N, K, D) for K > 1 views.

    Raises:
        DataError: images that cannot be decoded, each named.
    """
    wanted = FrozenRows(classifier, len(classifier.backbone.stages), "float32", samples, views, context)
    wanted.settle_engine()
    features = np.empty((len(wanted.keys), *wanted.shape), np.float32)
    stored = np.flatnonzero(wanted.rows.shard_of >= 0)
    for start in range(0, len(stored), COPIED_ROWS):
        positions = stored[start : start + COPIED_ROWS]
        features[positions] = wanted.rows.take(positions)
    if wanted.n_missing:
        keep = wanted.make_room()
        if not keep:
            context.event(CacheFull(f"the features are not kept for later runs: {wanted.why_no_room()}"))
        wanted.compute(features, keep)
    return features if views.count == 1 else features.reshape(len(samples), views.count, -1)


def decode_into_features(
    classifier: Classifier, views: Views, context: FeatureContext, samples: Sequence[Sample]
) -> dict[int, ImageError]:
    """Decode samples and keep their pooled features, so that whoever asks for these later decodes nothing.

    Returns:
        The samples that cannot be decoded, by position. Where the cache has no room, samples are only decoded.
    """
    wanted = FrozenRows(classifier, len(classifier.backbone.stages), "float32", samples, views, context)
    if not wanted.n_missing:
        return {}
    if wanted.make_room():
        return wanted.compute_readable(None, keep=True)
    return wanted.decode_only()


@dataclass(frozen=True)
class PrefixPlan:
    """What will be computed once and kept, and what that costs: a line of ``finetune check``."""

    stage: int | None  # the cut is before this stage; None: nothing is kept
    after: str  # the last frozen stage, by name
    row_shape: tuple[int, ...]
    dtype: RowType
    views: int  # per training image; fewer than asked for where the disk has no room for all
    n_rows: int
    n_missing: int  # rows not in the cache yet
    n_bytes: int  # of all rows
    seconds: float | None  # to compute what is missing; None where it was not measured
    rows_per_second: float | None
    engine: str
    reason: str

    def __str__(self) -> str:
        if self.stage is None:
            return f"nothing is computed once: {self.reason}"
        text = f"frozen up to {self.after}: {self.n_rows:,} rows of {self.dtype} {self.row_shape}, {self.n_bytes / 1e6:,.1f} MB"
        if not self.n_missing:
            return f"{text}, all in the cache"
        text += f", {self.n_missing:,} to compute with {self.engine}"
        if self.seconds is None or self.rows_per_second is None:
            return text
        return f"{text}, about {self.seconds:,.0f} s at {self.rows_per_second:,.0f} images/s"


def plan_prefix(
    classifier: Classifier,
    first_trainable: int,
    train: Sequence[Sample],
    val: Sequence[Sample],
    views: Views,
    context: FeatureContext,
    *,
    measure: bool = True,
) -> PrefixPlan:
    """Choose the cut and say what it costs.

    The deepest cut at or below the first trainable stage wins, for what lies between runs again in every epoch. Where its rows
    do not fit the cache, a smaller activation further down is taken, then fewer views.

    Args:
        first_trainable: its stage index; the number of stages when only the head trains.
        measure: time a few images, through the engine that will be used (it is exported for that, and kept).
    """
    stages = classifier.backbone.stages
    dtype: RowType = "float32" if first_trainable == len(stages) else "float16"
    at_or_below = range(first_trainable, 0, -1)
    cuts = [stage for stage in at_or_below if not why_not_cut(classifier.backbone, stage)]
    for count in _halvings(views.count):
        for stage in cuts:
            of_train = FrozenRows(classifier, stage, dtype, train, replace(views, count=count), context)
            if len(of_train.keys) * of_train.cache.row_bytes > context.store.budget_bytes:
                continue
            rate = of_train.rows_per_second() if measure else None
            of_val = FrozenRows(classifier, stage, dtype, val, replace(views, count=1), context)
            n_missing, n_rows = of_train.n_missing + of_val.n_missing, len(of_train.keys) + len(of_val.keys)
            return PrefixPlan(
                stage=stage,
                after=stages[stage - 1].name,
                row_shape=of_train.shape,
                dtype=dtype,
                views=count,
                n_rows=n_rows,
                n_missing=n_missing,
                n_bytes=n_rows * of_train.cache.row_bytes,
                seconds=0.0 if not n_missing else n_missing / rate if rate else None,
                rows_per_second=rate,
                engine=of_train.engine_name,
                reason="" if count == views.count else f"{views.count} views do not fit the cache",
            )
    if not at_or_below:
        reason = "the first stage trains"
    else:
        reason = "no cut fits into the cache" if cuts else why_not_cut(classifier.backbone, first_trainable)
    return PrefixPlan(None, "", (), dtype, views.count, 0, 0, 0, None, None, "", reason)


def _halvings(count: int) -> list[int]:
    return [count] if count == 1 else [count, *_halvings(count // 2)]


class DoesNotFit(Exception):
    """An activation that is too large for the number format it should be kept in."""


class FrozenRows:
    """The output of a prefix for every view of every image: where the rows are, and how the missing ones are computed.

    Row ``i * K + k`` is view k of image i.
    """

    def __init__(
        self, classifier: Classifier, stage: int, dtype: RowType, samples: Sequence[Sample], views: Views, context: FeatureContext
    ) -> None:
        self.classifier, self.stage, self.dtype = classifier, stage, dtype
        self.samples, self.views, self.context = samples, views, context
        self.shape = activation_shape(classifier, stage)
        self._view_names = views.names()
        self.keys = _row_keys(samples, self._view_names, context.cores)  # (N * K, 32)
        self._prefix = prefix_digest(classifier, stage)
        size = str(views.preprocess.input_size_px)  # a graph takes images of one size
        self._graph_store = context.store.folder("engines") / _digest("graph", self._prefix, size, onnx_engine_name())
        self._engine: Engine | None = None
        usable = context.device == "cpu" and refused(self._graph_store) is None
        self._use_space_of(onnx_engine_name() if usable else torch_engine_name(context.device, autocast=True))

    @property
    def n_missing(self) -> int:
        return len(self.rows.missing)

    def look_up(self) -> None:
        """Look up which rows the cache holds by now."""
        self.rows = self.cache.find(self.keys)

    def settle_engine(self) -> None:
        """Open the engine that will compute missing rows; it may be another than expected, with other rows in the cache."""
        if self.n_missing and self._engine is None:
            module = PixelPrefix(self.classifier, self.stage)
            graph = self.context.graph if self.stage == len(self.classifier.backbone.stages) else None
            engine = open_engine(
                module, self._images_to_check(), self.context.device, self._graph_store, graph, self.context.event
            )
            self._engine = engine
            if engine.name != self.engine_name:
                self._use_space_of(engine.name)

    def make_room(self) -> bool:
        """Return whether the missing rows fit the cache; what was used least recently is deleted for them."""
        return self.context.store.reserve(self.n_missing * self.cache.row_bytes)

    def why_no_room(self) -> str:
        needed, allowed = self.n_missing * self.cache.row_bytes / 1e9, self.context.store.budget_bytes / 1e9
        return f"{needed:,.2f} GB are needed, and the cache in {self.context.store.root} may hold {allowed:,.2f} GB"

    def compute(self, out: NDArray[np.float32] | None, keep: bool) -> None:
        """Compute the missing rows, in the order of images, into `out` (N * K, *shape) and, with `keep`, into the cache.

        Raises:
            DataError: images that cannot be decoded, each named; all others are computed and kept first.
            TrainingError: the network gives values that are not finite.
            DoesNotFit: an activation is too large for this number format.
            DiskFull: without `out`, rows that cannot be kept are of no use; with it, an event tells.
        """
        failed = self.compute_readable(out, keep)
        if failed:
            problems = [Problem(str(self.samples[index].file), error.message) for index, error in failed.items()]
            raise DataError(f"{len(problems):,} of {len(self.samples):,} images cannot be decoded", problems)

    def compute_readable(self, out: NDArray[np.float32] | None, keep: bool) -> dict[int, ImageError]:
        """Do what `compute` does, but return the images that cannot be decoded, by position, instead of raising."""
        failed: dict[int, ImageError] = {}
        meter = _Meter(self.context.progress, self.n_missing, "images" if self.views.count == 1 else "views")
        with contextlib.ExitStack() as stack:
            decoded = self._decoded_chunks(stack)
            store = stack.enter_context(self._keeping(keep, required=out is None))
            for chunk, rows in self._run_chunks(decoded, stack):
                failed |= chunk.failed
                if rows is not None:
                    self._check_range(rows)
                    if out is not None:
                        out[chunk.positions] = rows
                    store(chunk.keys, rows)
                meter.advance(len(chunk.images) + len(chunk.failed))
        return failed

    def decode_only(self) -> dict[int, ImageError]:
        """Decode the images of the missing rows and compute nothing; return those that cannot be decoded."""
        failed: dict[int, ImageError] = {}
        meter = _Meter(self.context.progress, self.n_missing, "images")
        with contextlib.ExitStack() as stack:
            for chunk in self._start_decoding(stack):
                failed |= chunk.failed
                meter.advance(len(chunk.images) + len(chunk.failed))
        return failed

    def _decoded_chunks(self, stack: contextlib.ExitStack) -> Iterator[_Decoded]:
        """Decode the missing rows in background threads, which work ahead while the engine is being opened."""
        expected = self.engine_name
        chunks = self._start_decoding(stack)
        first = next(chunks, None)
        self.settle_engine()
        if self.engine_name != expected:  # its rows are kept elsewhere, where others may be missing
            return self._start_decoding(stack)
        return iter(()) if first is None else itertools.chain([first], chunks)

    def _start_decoding(self, stack: contextlib.ExitStack) -> Iterator[_Decoded]:
        height, width = self.views.preprocess.input_size_px
        n_rows = CPU_BATCH if self._engine is None else self._engine.batch_size
        ahead = max(2 * self.context.cores, DECODED_AHEAD_BYTES // (n_rows * height * width * 3))
        tasks = list(self._tasks(n_rows))
        chunks = ordered_map(self._decode, tasks, threads=self.context.cores, ahead=ahead)
        return stack.enter_context(contextlib.closing(chunks))

    def _run_chunks(
        self, decoded: Iterator[_Decoded], stack: contextlib.ExitStack
    ) -> Iterator[tuple[_Decoded, NDArray[np.float32] | None]]:
        """Run the engine on decoded chunks, on several cores at once where it computes on one."""
        engine, cores = self._engine, self.context.cores

        def run(chunk: _Decoded) -> tuple[_Decoded, NDArray[np.float32] | None]:
            assert engine is not None, "an engine is opened when rows are missing"
            return chunk, engine.run(chunk.images) if len(chunk.images) else None

        if engine is None or not engine.concurrent:
            return map(run, decoded)
        return stack.enter_context(contextlib.closing(ordered_map(run, decoded, threads=cores, ahead=2 * cores)))

    def rows_per_second(self) -> float | None:
        """Measure how fast the missing rows will be computed, on a few of them; decoding and network share all cores."""
        self.settle_engine()
        engine = self._engine
        if engine is None or not self.n_missing:
            return None
        tasks = next(iter(self._tasks(TIMED_IMAGES)))
        started = time.perf_counter()
        images = self._decode(tasks).images
        decode_seconds = (time.perf_counter() - started) / max(len(images), 1)
        images = images[: engine.batch_size]
        engine.run(images)  # the first run reserves memory
        started = time.perf_counter()
        engine.run(images)
        run_seconds = (time.perf_counter() - started) / max(len(images), 1)
        cores = self.context.cores
        return cores / (decode_seconds + run_seconds) if engine.concurrent else 1 / max(decode_seconds / cores, run_seconds)

    def _check_range(self, rows: NDArray[np.float32]) -> None:
        largest = np.abs(rows).max()
        if not np.isfinite(largest):
            raise TrainingError(f"{self.classifier.backbone.name} gives values that are not finite: check its weights file")
        if largest > np.finfo(self.dtype).max:
            raise DoesNotFit

    def _use_space_of(self, engine_name: str) -> None:
        self.engine_name = engine_name
        space = _digest("rows", DECODER, self._prefix, self.views.preprocess.digest(), self.dtype, engine_name)
        self.cache = RowCache(self.context.store, space, self.shape, self.dtype)
        self.look_up()

    def _images_to_check(self) -> NDArray[np.uint8]:
        """Return a few images from all over the dataset, (n, h, w, 3); those that do not decode are reported later."""
        images = []
        for index in np.unique(np.linspace(0, len(self.samples) - 1, CHECKED_IMAGES).astype(int)):
            with contextlib.suppress(ImageError):
                images.append(self.views.preprocess.load(self.samples[index].file.read()))
        return np.stack(images) if images else np.zeros((1, *self.views.preprocess.input_size_px, 3), np.uint8)

    def _tasks(self, n_rows: int) -> Iterator[list[_Task]]:
        """Yield the missing rows, about `n_rows` at a time, all views of an image together so that it is read once."""
        images, numbers = np.divmod(self.rows.missing, self.views.count)
        starts = np.append(np.flatnonzero(np.diff(images, prepend=-1)), len(images))  # of each image, and the end
        per_chunk = max(1, n_rows // self.views.count)
        for first in range(0, len(starts) - 1, per_chunk):
            bounds = starts[first : first + per_chunk + 1].tolist()
            yield [_Task(int(images[a]), tuple(numbers[a:b].tolist())) for a, b in itertools.pairwise(bounds)]

    def _decode(self, tasks: Sequence[_Task]) -> _Decoded:
        """Decode the views of some images; runs in a background thread."""
        positions: list[int] = []
        keys: list[NDArray[np.uint8]] = []
        images: list[NDArray[np.uint8]] = []
        failed: dict[int, ImageError] = {}
        for task in tasks:
            try:
                data = self.samples[task.image].file.read()
                images += self.views.pixels(data, task.views)
            except ImageError as error:
                failed[task.image] = error
                continue
            positions += [task.image * self.views.count + view for view in task.views]
            # Under the key of the bytes that were decoded, should the file have changed since it was looked up.
            keys.append(_image_keys(hashlib.sha256(data).digest(), self._view_names)[list(task.views)])
        if not images:
            return _Decoded(np.empty(0, np.int64), np.empty((0, KEY_BYTES), np.uint8), np.empty(0, np.uint8), failed)
        return _Decoded(np.array(positions), np.concatenate(keys), np.stack(images), failed)

    @contextlib.contextmanager
    def _keeping(self, keep: bool, required: bool) -> Iterator[Callable[[NDArray[np.uint8], NDArray[np.float32]], None]]:
        """Yield a function that stores rows under keys; what it was given is in the cache after the block, however that ends."""
        writer = self.cache.writer() if keep else None

        def attempt(action: Callable[[ShardWriter], None]) -> None:
            nonlocal writer
            try:
                if writer is not None:
                    action(writer)
            except DiskFull as error:
                writer = None
                if required:
                    raise
                self.context.event(CacheFull(f"the features are not kept for later runs: {error.message}"))

        try:
            yield lambda keys, rows: attempt(lambda open_writer: open_writer.append(keys, rows))
        finally:
            attempt(lambda open_writer: open_writer.flush())


@dataclass(frozen=True)
class _Task:
    """Views of one image that are missing."""

    image: int
    views: tuple[int, ...]


@dataclass(frozen=True)
class _Decoded:
    positions: NDArray[np.int64]  # (B,) rows
    keys: NDArray[np.uint8]  # (B, 32)
    images: NDArray[np.uint8]  # (B, h, w, 3)
    failed: Mapping[int, ImageError]  # positions of images that cannot be decoded


class _Meter:
    """Tells a progress callback how many rows there are, and how fast they come."""

    def __init__(self, progress: ProgressCallback, total: int, unit: str) -> None:
        self._progress, self._total, self._unit = progress, total, unit
        self._done, self._began_at = 0, time.perf_counter()

    def advance(self, count: int) -> None:
        self._done += count
        rate = self._done / max(time.perf_counter() - self._began_at, 1e-9)
        self._progress(Progress("features", self._done, self._total, self._unit, {"images_per_second": rate}))


def _row_keys(samples: Sequence[Sample], view_names: Sequence[bytes], threads: int) -> NDArray[np.uint8]:
    """Return the keys of all rows, (N * K, 32); files whose sha256 is not known yet are read for it.

    Raises:
        DataError: files that cannot be read, each named.
    """
    problems: list[Problem] = []

    def digest(sample: Sample) -> bytes:
        try:
            return bytes.fromhex(sample.sha256) if sample.sha256 else hashlib.sha256(sample.file.read()).digest()
        except ImageError as error:
            problems.append(Problem(str(sample.file), error.message))
            return b""

    if all(sample.sha256 for sample in samples):
        digests = [digest(sample) for sample in samples]
    else:
        digests = list(ordered_map(digest, samples, threads=threads, ahead=64 * threads))
    if problems:
        raise DataError(f"{len(problems):,} of {len(samples):,} files cannot be read", problems)
    if not samples:
        return np.empty((0, KEY_BYTES), np.uint8)
    return np.concatenate([_image_keys(digest, view_names) for digest in digests])


def _image_keys(image_sha256: bytes, view_names: Sequence[bytes]) -> NDArray[np.uint8]:
    """Return the keys of all views of one image, (K, 32)."""
    digests = b"".join(hashlib.sha256(image_sha256 + name).digest() for name in view_names)
    return np.frombuffer(digests, np.uint8).reshape(-1, KEY_BYTES)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
