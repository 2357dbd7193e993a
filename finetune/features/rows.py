"""The frozen prefix, computed once: its output for every image and view, read from the cache where it was computed before.

A frozen stage's output for one view of an image never changes. `pooled_features` gives the embeddings that a head is solved on;
`FrozenRows` is the general case, any cut, which `finetune.training.replay` trains on. Decoding runs beside the network, on all
cores; rows stream to disk as they come. Torch-free: what computes the rows is behind `finetune.features.engine.Prefix`.

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
from dataclasses import dataclass
from pathlib import Path
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
from finetune.features.cache import KEY_BYTES, RowCache, Rows, ShardWriter
from finetune.features.engine import Engine, Prefix, onnx_engine_name
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.cores import available_cores
from finetune.runtime.device import Device
from finetune.runtime.seconds import Seconds, thread_clock
from finetune.storage.store import Store

RowType = Literal["float16", "float32"]

CHECKED_IMAGES = 16  # on which an engine must agree with torch
TIMED_IMAGES = 8  # from which speed is estimated
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
    """Where and with what features are computed; by default on all cores of this process, without telling anybody.

    Args:
        spent: told what computing the rows that are used takes, also where they were found and took that in an earlier run.
    """

    store: Store
    device: Device = "cpu"
    threads: int | None = None
    progress: ProgressCallback = silent
    event: EventCallback = ignore_event
    spent: Callable[[Seconds], None] = lambda _: None

    @property
    def cores(self) -> int:
        return self.threads or available_cores()


def pooled_features(
    prefix: Prefix,
    samples: Sequence[Sample],
    views: Views,
    context: FeatureContext,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return what `prefix` makes of samples, (N, *row_shape); of K > 1 views of each, (N, K, *row_shape).

    Args:
        out: where the rows are written, (N * K, *row_shape); by default a new array.

    Raises:
        DataError: images that cannot be decoded, each named.
    """
    wanted = FrozenRows(prefix, "float32", samples, views, context)
    wanted.settle_engine()
    features = np.empty((len(wanted.keys), *prefix.row_shape), np.float32) if out is None else out
    stored = np.flatnonzero(wanted.rows.shard_of >= 0)
    for start in range(0, len(stored), COPIED_ROWS):
        positions = stored[start : start + COPIED_ROWS]
        features[positions] = wanted.rows.take(positions)
        wanted.rows.release()
    if wanted.n_missing:
        keep = wanted.make_room()
        if not keep:
            context.event(CacheFull(f"the features are not kept for later runs: {wanted.why_no_room()}"))
        wanted.compute(features, keep)
    context.spent(wanted.rows.seconds + wanted.computed)
    return features if views.count == 1 else features.reshape(len(samples), views.count, *prefix.row_shape)


def decode_into_features(
    prefix: Prefix, views: Views, context: FeatureContext, samples: Sequence[Sample]
) -> dict[int, ImageError]:
    """Decode samples and keep their pooled features, so that whoever asks for these later decodes nothing.

    Returns:
        The samples that cannot be decoded, by position. Where the cache has no room, samples are only decoded.
    """
    wanted = FrozenRows(prefix, "float32", samples, views, context)
    if not wanted.n_missing:
        return {}
    if wanted.make_room():
        return wanted.compute_readable(None, keep=True)
    return wanted.decode_only()


def engine_folder(prefix: Prefix, preprocess: Preprocess, store: Store) -> Path:
    """Return the folder that holds the exported graph of a prefix and the verdict on it; a graph takes images of one size."""
    return store.folder("engines") / _digest("graph", prefix.digest, str(preprocess.input_size_px), onnx_engine_name())


def rows_of(prefix: Prefix, preprocess: Preprocess, dtype: RowType, engine_name: str, store: Store) -> RowCache:
    """Return the space of a cache that holds what one engine makes of images that are framed in one way."""
    space = _digest("rows", DECODER, prefix.digest, preprocess.digest(), dtype, engine_name)
    return RowCache(store, space, prefix.row_shape, dtype)


def find_rows(prefix: Prefix, samples: Sequence[Sample], preprocess: Preprocess, engine_name: str, store: Store) -> Rows:
    """Return what one engine has made of samples as evaluated, as far as that is stored."""
    keys = _row_keys(samples, Views(preprocess).names(), available_cores())
    return rows_of(prefix, preprocess, "float32", engine_name, store).find(keys)


def keep_rows(
    rows: NDArray[np.float32],
    prefix: Prefix,
    samples: Sequence[Sample],
    preprocess: Preprocess,
    engine_name: str,
    store: Store,
) -> bool:
    """Store what one engine has made of samples as evaluated; return whether there was room."""
    keys = _row_keys(samples, Views(preprocess).names(), available_cores())
    cache = rows_of(prefix, preprocess, "float32", engine_name, store)
    missing = cache.find(keys).missing
    if not store.reserve(len(missing) * cache.row_bytes):
        return False
    writer = cache.writer()
    writer.append(keys[missing], rows[missing], Seconds())  # no features that a method would have to compute
    writer.flush()
    return True


class DoesNotFit(Exception):
    """An activation that is too large for the number format it should be kept in."""


class FrozenRows:
    """The output of a prefix for every view of every image: where the rows are, and how the missing ones are computed.

    Row ``i * K + k`` is view k of image i.
    """

    def __init__(self, prefix: Prefix, dtype: RowType, samples: Sequence[Sample], views: Views, context: FeatureContext) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.samples, self.views, self.context = samples, views, context
        self._view_names = views.names()
        self.keys = _row_keys(samples, self._view_names, context.cores)  # (N * K, 32)
        self._engine_folder = engine_folder(prefix, views.preprocess, context.store)
        self._engine: Engine | None = None
        self.computed = Seconds()  # what the rows that were computed here took
        self._use_space_of(prefix.expected_engine(context.device, self._engine_folder))

    @property
    def n_missing(self) -> int:
        return len(self.rows.missing)

    def look_up(self) -> None:
        """Look up which rows the cache holds by now."""
        self.rows = self.cache.find(self.keys)

    def settle_engine(self) -> None:
        """Open the engine that will compute missing rows; it may be another than expected, with other rows in the cache."""
        if self.n_missing and self._engine is None:
            engine = self.prefix.open_engine(
                self._images_to_check(), self.context.device, self._engine_folder, self.context.event
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
            ready_at = before = time.perf_counter()
            for chunk, rows, running in self._run_chunks(decoded, stack):
                failed |= chunk.failed
                now = time.perf_counter()
                ahead = chunk.seconds.wall / self.context.cores if chunk.decoded_at < ready_at else 0.0
                seconds = Seconds(now - before + ahead, chunk.seconds.cpu + running.cpu)
                before = now
                self.computed += seconds
                if rows is not None:
                    self._check_range(rows)
                    if out is not None:
                        out[chunk.positions] = rows
                    store(chunk.keys, rows, seconds)
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
    ) -> Iterator[tuple[_Decoded, NDArray[np.float32] | None, Seconds]]:
        """Run the engine on decoded chunks, on several cores at once where it computes on one; the seconds are the engine's."""
        engine, cores = self._engine, self.context.cores

        def run(chunk: _Decoded) -> tuple[_Decoded, NDArray[np.float32] | None, Seconds]:
            assert engine is not None, "an engine is opened when rows are missing"
            began = thread_clock()
            rows = engine.run(chunk.images) if len(chunk.images) else None
            return chunk, rows, (thread_clock() - began) * engine.cores

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
            raise TrainingError(f"{self.prefix.backbone} gives values that are not finite: check its weights file")
        if largest > np.finfo(self.dtype).max:
            raise DoesNotFit

    def _use_space_of(self, engine_name: str) -> None:
        self.engine_name = engine_name
        self.cache = rows_of(self.prefix, self.views.preprocess, self.dtype, engine_name, self.context.store)
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
        began = thread_clock()
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
            nothing = np.empty(0, np.int64), np.empty((0, KEY_BYTES), np.uint8), np.empty(0, np.uint8)
            return _Decoded(*nothing, failed, thread_clock() - began, time.perf_counter())
        found = np.array(positions), np.concatenate(keys), np.stack(images)
        return _Decoded(*found, failed, thread_clock() - began, time.perf_counter())

    @contextlib.contextmanager
    def _keeping(self, keep: bool, required: bool) -> Iterator[Callable[[NDArray[np.uint8], NDArray[np.float32], Seconds], None]]:
        """Yield a function that stores rows under keys; after the block, however it ends, they are in the cache."""
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
            yield lambda keys, rows, seconds: attempt(lambda open_writer: open_writer.append(keys, rows, seconds))
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
    seconds: Seconds  # that decoding took in its thread
    decoded_at: float  # as `time.perf_counter` tells the time


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
