"""Compute the output of a frozen prefix once for every image and view, and read it from the cache afterwards. Torch-free.

The output of frozen stages for a view of an image never changes. `pooled_features` returns the embeddings that a head is solved
on; `FrozenRows` is the general case of any cut, which `finetune.training.replay` trains on. Images are decoded on all cores while
the network runs, and rows are written to disk as they are computed, by a `finetune.features.engine.Engine`.

The key of a row is a digest of the image's bytes and the view. Its space is a digest of the weights of the prefix, the
preprocessing, the cut, the number format and the engine. Therefore rows are found again if the dataset grows, is split in another
way or another head is trained, and are never used if they would differ.
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

CHECKED_IMAGES = 8  # that an engine is compared with torch on, before any image; the export is compared on more
TIMED_IMAGES = 8  # that the speed is measured on
COPIED_ROWS = 1024  # rows that are copied from the cache at a time
CPU_BATCH = 8  # rows per call of an engine on a CPU
DECODED_AHEAD_BYTES = 256 * 1024**2  # of decoded pixels that may wait for the engine, also while it is being opened


@dataclass(frozen=True)
class Views:
    """The views of an image: number 0 is preprocessed as in evaluation, the others are augmented.

    An augmented view depends only on the augmentation, the image's bytes and the number of the view, so it is the same in every
    dataset.
    """

    preprocess: Preprocess
    augment: Augment | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.count > 1 and self.augment is None:
            raise ValueError("more than one view needs an augmentation")

    def names(self) -> list[bytes]:
        """Return the name of each view in keys. It does not contain the preprocessing, which is part of the space."""
        augmented = self.augment.digest() if self.augment is not None and self.count > 1 else ""
        return [b"as evaluated", *(f"{augmented} {number}".encode() for number in range(1, self.count))]

    def pixels(self, data: bytes, numbers: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Return the views with these numbers of an encoded image, each (h, w, 3) uint8."""
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
    """How features are computed and where they are cached.

    Args:
        threads: None: all cores that this process may use.
        spent: is called with the seconds that computing the used rows takes or, for cached rows, took.
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
    """Return the output of `prefix` for N samples, (N, *row_shape), or (N, K, *row_shape) for K > 1 views.

    Args:
        out: array for the rows, (N * K, *row_shape); by default a new one.

    Raises:
        DataError: some images cannot be decoded; the error names each.
    """
    wanted = FrozenRows(prefix, "float32", samples, views, context)
    wanted.choose_engine()
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
    """Decode samples and cache their pooled features, so that they need not be decoded again.

    If the cache has no room for the features, the samples are only decoded.

    Returns:
        The errors of the samples that cannot be decoded, by position.
    """
    wanted = FrozenRows(prefix, "float32", samples, views, context)
    if not wanted.n_missing:
        return {}
    if wanted.make_room():
        return wanted.compute_readable(None, keep=True)
    return wanted.decode_only()


def engine_folder(prefix: Prefix, preprocess: Preprocess, store: Store) -> Path:
    """Return the folder for the exported graph of a prefix and the result of its comparison; there is one for each input size."""
    return store.folder("engines") / _digest("graph", prefix.digest, str(preprocess.input_size_px), onnx_engine_name())


def rows_of(prefix: Prefix, preprocess: Preprocess, dtype: RowType, engine_name: str, store: Store) -> RowCache:
    """Return the part of the cache for the rows of a prefix, computed by one engine with one preprocessing."""
    space = _digest("rows", DECODER, prefix.digest, preprocess.digest(), dtype, engine_name)
    return RowCache(store, space, prefix.row_shape, dtype)


def find_rows(prefix: Prefix, samples: Sequence[Sample], preprocess: Preprocess, engine_name: str, store: Store) -> Rows:
    """Look up the rows of samples (view 0) that an engine has computed; some may be missing."""
    keys = _row_keys(samples, Views(preprocess).names(), available_cores())
    return rows_of(prefix, preprocess, "float32", engine_name, store).find(keys)


def store_rows(
    rows: NDArray[np.float32],
    prefix: Prefix,
    samples: Sequence[Sample],
    preprocess: Preprocess,
    engine_name: str,
    store: Store,
) -> bool:
    """Cache rows (N, *row_shape) that an engine has computed for samples (view 0); return False if there was no room."""
    keys = _row_keys(samples, Views(preprocess).names(), available_cores())
    cache = rows_of(prefix, preprocess, "float32", engine_name, store)
    missing = cache.find(keys).missing
    if not store.reserve(len(missing) * cache.row_bytes):
        return False
    writer = cache.writer()
    writer.append(keys[missing], rows[missing], Seconds())  # without cost, because no method trains on these rows
    writer.flush()
    return True


class DoesNotFit(Exception):
    """An activation is too large for the number format of its space."""


class FrozenRows:
    """The output of a prefix for K views of N images: finds cached rows and computes missing ones.

    Row ``i * K + k`` is view k of image i.
    """

    def __init__(self, prefix: Prefix, dtype: RowType, samples: Sequence[Sample], views: Views, context: FeatureContext) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.samples, self.views, self.context = samples, views, context
        self._view_names = views.names()
        self.keys = _row_keys(samples, self._view_names, context.cores)  # (N * K, 32)
        self._engine_folder = engine_folder(prefix, views.preprocess, context.store)
        self._engine: Engine | None = None
        self.computed = Seconds()  # that the rows computed by this object took
        self._use_space_of(prefix.expected_engine(context.device, self._engine_folder))

    @property
    def n_missing(self) -> int:
        return len(self.rows.missing)

    def look_up(self) -> None:
        """Look up again which rows are cached."""
        self.rows = self.cache.find(self.keys)

    def choose_engine(self) -> None:
        """Open the engine that computes missing rows. If it is not the expected one, switch to its space of the cache."""
        if self.n_missing and self._engine is None:
            engine = self.prefix.open_engine(
                self._images_to_check(), self.context.device, self._engine_folder, self.context.event
            )
            self._engine = engine
            if engine.name != self.engine_name:
                self._use_space_of(engine.name)

    def make_room(self) -> bool:
        """Delete the least recently used files if the missing rows need their space; return whether the rows fit the cache."""
        return self.context.store.reserve(self.n_missing * self.cache.row_bytes)

    def why_no_room(self) -> str:
        """Return a phrase with the space that the missing rows need and the size limit of the cache."""
        needed, allowed = self.n_missing * self.cache.row_bytes / 1e9, self.context.store.budget_bytes / 1e9
        return f"{needed:,.2f} GB are needed, and the cache in {self.context.store.root} may hold {allowed:,.2f} GB"

    def compute(self, out: NDArray[np.float32] | None, keep: bool) -> None:
        """Compute the missing rows in the order of images; write them into `out` (N * K, *row_shape) and, with `keep`, the cache.

        Raises:
            DataError: some images cannot be decoded; the error names each, after all other rows have been computed.
            TrainingError: the network returns values that are not finite.
            DoesNotFit: an activation is too large for this number format.
            DiskFull: the rows cannot be cached, and there is no `out`; with `out`, an event is sent instead.
        """
        failed = self.compute_readable(out, keep)
        if failed:
            problems = [Problem(str(self.samples[index].file), error.message) for index, error in failed.items()]
            raise DataError(f"{len(problems):,} of {len(self.samples):,} images cannot be decoded", problems)

    def compute_readable(self, out: NDArray[np.float32] | None, keep: bool) -> dict[int, ImageError]:
        """Do the same as `compute`, but return the errors of images that cannot be decoded, by position, instead of raising."""
        failed: dict[int, ImageError] = {}
        meter = _Meter(self.context.progress, self.n_missing, "images" if self.views.count == 1 else "views")
        with contextlib.ExitStack() as stack:
            decoded = self._decoded_chunks(stack)
            store = stack.enter_context(self._storing(keep, required=out is None))
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
        """Only decode the images of the missing rows; return the errors of those that cannot be decoded, by position."""
        failed: dict[int, ImageError] = {}
        meter = _Meter(self.context.progress, self.n_missing, "images")
        with contextlib.ExitStack() as stack:
            for chunk in self._start_decoding(stack):
                failed |= chunk.failed
                meter.advance(len(chunk.images) + len(chunk.failed))
        return failed

    def _decoded_chunks(self, stack: contextlib.ExitStack) -> Iterator[_Decoded]:
        """Decode the missing rows in background threads, which begin while the engine is being opened."""
        expected = self.engine_name
        chunks = self._start_decoding(stack)
        first = next(chunks, None)
        self.choose_engine()
        if self.engine_name != expected:  # it has another space, in which other rows may be missing
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
        """Run the engine on decoded chunks, several at a time if it is concurrent.

        Returns:
            For each chunk: the chunk, its rows (None if no image could be decoded), and the seconds that the engine took.
        """
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
        """Measure on a few images how fast the missing rows can be computed, decoding included; None if none is missing."""
        self.choose_engine()
        engine = self._engine
        if engine is None or not self.n_missing:
            return None
        tasks = next(iter(self._tasks(TIMED_IMAGES)))
        started = time.perf_counter()
        images = self._decode(tasks).images
        decode_seconds = (time.perf_counter() - started) / max(len(images), 1)
        images = images[: engine.batch_size]
        engine.run(images)  # the first run allocates memory, so it is not timed
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
        """Return images (n, h, w, 3) from evenly spaced positions of the dataset, without those that cannot be decoded."""
        images = []
        for index in np.unique(np.linspace(0, len(self.samples) - 1, CHECKED_IMAGES).astype(int)):
            with contextlib.suppress(ImageError):
                images.append(self.views.preprocess.load(self.samples[index].file.read()))
        return np.stack(images) if images else np.zeros((1, *self.views.preprocess.input_size_px, 3), np.uint8)

    def _tasks(self, n_rows: int) -> Iterator[list[_Task]]:
        """Yield the missing rows in chunks of about `n_rows`; all views of an image are in one chunk, so that it is read once."""
        images, numbers = np.divmod(self.rows.missing, self.views.count)
        starts = np.append(np.flatnonzero(np.diff(images, prepend=-1)), len(images))  # of each image, and the end
        per_chunk = max(1, n_rows // self.views.count)
        for first in range(0, len(starts) - 1, per_chunk):
            bounds = starts[first : first + per_chunk + 1].tolist()
            yield [_Task(int(images[a]), tuple(numbers[a:b].tolist())) for a, b in itertools.pairwise(bounds)]

    def _decode(self, tasks: Sequence[_Task]) -> _Decoded:
        """Decode the requested views of some images. Runs in a background thread."""
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
            # The key is that of the decoded bytes, in case the file has changed since its digest was computed.
            keys.append(_image_keys(hashlib.sha256(data).digest(), self._view_names)[list(task.views)])
        if not images:
            nothing = np.empty(0, np.int64), np.empty((0, KEY_BYTES), np.uint8), np.empty(0, np.uint8)
            return _Decoded(*nothing, failed, thread_clock() - began, time.perf_counter())
        found = np.array(positions), np.concatenate(keys), np.stack(images)
        return _Decoded(*found, failed, thread_clock() - began, time.perf_counter())

    @contextlib.contextmanager
    def _storing(self, keep: bool, required: bool) -> Iterator[Callable[[NDArray[np.uint8], NDArray[np.float32], Seconds], None]]:
        """Yield a function that caches rows under keys; all of them are written when the block ends, also if it raises.

        Args:
            keep: False: the function does nothing.
            required: raise `DiskFull` instead of sending an event.
        """
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
    """The missing views of one image."""

    image: int
    views: tuple[int, ...]


@dataclass(frozen=True)
class _Decoded:
    """The decoded images of some missing rows."""

    positions: NDArray[np.int64]  # (B,) rows
    keys: NDArray[np.uint8]  # (B, 32)
    images: NDArray[np.uint8]  # (B, h, w, 3)
    failed: Mapping[int, ImageError]  # positions of images that cannot be decoded
    seconds: Seconds  # that decoding took in its thread
    decoded_at: float  # `time.perf_counter` when decoding ended


class _Meter:
    """Reports to a progress callback how many rows have been computed, and how fast."""

    def __init__(self, progress: ProgressCallback, total: int, unit: str) -> None:
        self._progress, self._total, self._unit = progress, total, unit
        self._done, self._began_at = 0, time.perf_counter()

    def advance(self, count: int) -> None:
        self._done += count
        rate = self._done / max(time.perf_counter() - self._began_at, 1e-9)
        self._progress(Progress("features", self._done, self._total, self._unit, {"images_per_second": rate}))


def _row_keys(samples: Sequence[Sample], view_names: Sequence[bytes], threads: int) -> NDArray[np.uint8]:
    """Return the keys (N * K, 32) of all rows. Files whose sha256 is not known are read.

    Raises:
        DataError: some files cannot be read; the error names each.
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
