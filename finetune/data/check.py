"""Read every image file once: its sha256, its size, and whether it decodes. Unreadable files are named and left out. Torch-free.

`scan` reads the bytes and the header of each file. `verify` decodes completely the files whose bytes have never been decoded,
because a truncated photograph has a valid header. If the pixels are needed anyway, the caller decodes (`Decode`), so that no file
is decoded twice. Otherwise JPEGs are decoded at an eighth of their size, which reads every coded byte and so finds the same
errors in a third of the time. Missing pixels are never filled in.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from finetune.bundle.image import DECODER, header_size, image_size
from finetune.data.dataset import BadImage, Dataset, Sample
from finetune.data.files import SourceFile
from finetune.data.parallel import ordered_map
from finetune.data.places.remote import RemoteFile
from finetune.errors import DataError, ImageError, Problem
from finetune.messages import natural_list, plural, printable
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.cores import available_cores

OnBadImage = Literal["quarantine", "fail"]
Resize = Literal["crop", "squash", "letterbox"]

LISTED = 50  # bad files that an error spells out one by one


Decode = Callable[[Sequence[Sample]], Mapping[int, ImageError]]
"""A function that decodes samples and returns the errors of those that cannot be decoded, by position."""


@dataclass(frozen=True)
class Scanned:
    """A dataset whose files have been read, but not decoded."""

    indexed: Dataset  # as it was listed
    dataset: Dataset  # with sha256 and size of every sample; without files whose header cannot be read
    undecoded: tuple[Sample, ...]  # samples whose bytes nobody has decoded yet
    memory: Path | None


def check_images(
    dataset: Dataset,
    *,
    on_bad: OnBadImage = "quarantine",
    max_bad_fraction: float = 0.05,
    may_empty: bool = False,
    progress: ProgressCallback = silent,
    threads: int | None = None,
    memory: Path | None = None,
) -> Dataset:
    """Return the dataset with `sha256` and `size_px` of every sample; unreadable files are moved to `bad`, with reasons.

    The same bytes in two classes, or in two splits, are reported as warnings.

    Args:
        may_empty: accept classes and splits without a readable image.
        memory: a folder that records which bytes decode, and the digests of files by their state (path, size, times). The next
            check reads only files whose state has changed, and decodes only new bytes.

    Raises:
        DataError: a file is unreadable and `on_bad` is "fail"; more than `max_bad_fraction` of the files are; or a class has none
            left.
    """
    scanned = scan(dataset, progress=progress, threads=threads, memory=memory)
    return verify(
        scanned, on_bad=on_bad, max_bad_fraction=max_bad_fraction, may_empty=may_empty, progress=progress, threads=threads
    )


def scan(
    dataset: Dataset, *, progress: ProgressCallback = silent, threads: int | None = None, memory: Path | None = None
) -> Scanned:
    """Read every file for its digest and the size in its header; see `check_images`."""
    threads = threads or _scan_threads(dataset)
    known = _recall(memory)
    good: list[Sample] = []
    bad: list[BadImage] = []
    total = len(dataset.samples)
    read_before = _KnownFiles.recall(memory, dataset.root)
    as_before = [read_before.look_up(sample) for sample in dataset.samples]
    others = [sample for sample, found in zip(dataset.samples, as_before, strict=True) if found is None]
    results = ordered_map(lambda sample: _scan_one(sample, known, read_before), others, threads=threads, ahead=64 * threads)
    for done, before in enumerate(as_before, start=1):
        found = before or next(results)
        good.append(found) if isinstance(found, Sample) else bad.append(found)
        if done % 256 == 0 or done == total:
            progress(Progress("preparing", done, total, "images", message="reading images"))
    read_before.remember()
    scanned = replace(dataset, samples=tuple(good), bad=dataset.bad + tuple(bad))
    return Scanned(dataset, scanned, tuple(sample for sample in good if sample.sha256 not in known), memory)


def verify(
    scanned: Scanned,
    *,
    on_bad: OnBadImage = "quarantine",
    max_bad_fraction: float = 0.05,
    may_empty: bool = False,
    decode: Decode | None = None,
    progress: ProgressCallback = silent,
    threads: int | None = None,
) -> Dataset:
    """Decode the files that have not been decoded before, and leave out those that cannot be decoded; see `check_images`.

    Args:
        decode: decodes the samples instead of this function.
    """
    undecoded = scanned.undecoded
    failed = (decode or partial(_decode_all, progress=progress, threads=threads))(undecoded) if undecoded else {}
    broken = {undecoded[position].id for position in failed}
    _remember(scanned.memory, [sample for sample in undecoded if sample.id not in broken])
    good = tuple(sample for sample in scanned.dataset.samples if sample.id not in broken)
    bad = tuple(BadImage(str(undecoded[position].file), error.message) for position, error in sorted(failed.items()))
    indexed = scanned.indexed
    checked = replace(
        scanned.dataset,
        samples=good,
        bad=_in_order(indexed, scanned.dataset.bad + bad),
        warnings=indexed.warnings + _warnings(indexed, good),
    )
    _check_bad_images(checked, on_bad, max_bad_fraction)
    if not may_empty:
        _refuse_emptied(indexed, checked)
    return checked


@dataclass(frozen=True)
class ImageFacts:
    """Quantiles of the sizes and shapes of a dataset's images."""

    n_images: int
    short_side_px: Mapping[str, float]  # p5, p50, p95 of the shorter side
    elongation: Mapping[str, float]  # p50, p90, p99 of longer / shorter side, 1 is square
    aspect_spread: float  # p95 / p5 of width / height: 1 when all images have one shape


@dataclass(frozen=True)
class ResizeAdvice:
    """The recommended resize mode for a model with a square input, and the reason in one sentence."""

    resize: Resize
    reason: str


def image_facts(samples: Sequence[Sample]) -> ImageFacts:
    """Return the facts about the sizes and shapes of checked samples, which have a `size_px`."""
    sizes = np.array([sample.size_px for sample in samples if sample.size_px], dtype=np.float64).reshape(-1, 2)  # (N, 2) w, h
    if not len(sizes):
        return ImageFacts(0, {"p5": 0.0, "p50": 0.0, "p95": 0.0}, {"p50": 1.0, "p90": 1.0, "p99": 1.0}, 1.0)
    short, long, aspect = sizes.min(axis=1), sizes.max(axis=1), sizes[:, 0] / sizes[:, 1]
    narrow, wide = np.percentile(aspect, [5, 95])
    return ImageFacts(len(sizes), _quantiles(short, 5, 50, 95), _quantiles(long / short, 50, 90, 99), float(wide / narrow))


CROP_UP_TO = 1.6  # elongation at which a centre crop still shows five eighths of the longer side
SQUASH_SPREAD = 1.3  # up to this spread of shapes, squashing distorts all images alike


def advise_resize(facts: ImageFacts) -> ResizeAdvice:
    """Return the resize mode that ``data.resize: auto`` chooses for these images.

    The pretrained weights were trained with a centre crop, so it is kept unless it would remove much of many images. If all
    images have about the same shape, squashing is chosen, because it distorts them all alike; otherwise letterboxing, which keeps
    edges and shapes.
    """
    elongated, spread = facts.elongation["p90"], facts.aspect_spread
    if elongated <= CROP_UP_TO:
        return ResizeAdvice(
            "crop", f"nine in ten images are at most {elongated:.2f} times as long as wide, so a centre crop loses little"
        )
    if spread <= SQUASH_SPREAD:
        return ResizeAdvice(
            "squash",
            f"images are up to {elongated:.2f} times as long as wide, all of nearly one shape, so squashing distorts them alike",
        )
    return ResizeAdvice(
        "letterbox", f"images are up to {elongated:.2f} times as long as wide, in differing shapes: a crop would hide parts"
    )


# ---------------------------------------------------------------------------------------------------------------- internals


_REMOTE_THREADS = 16  # threads that wait for the network need no core


def _scan_threads(dataset: Dataset) -> int:
    waits = any(isinstance(sample.file, RemoteFile) for sample in dataset.samples)
    return max(available_cores(), _REMOTE_THREADS) if waits else available_cores()


def _scan_one(sample: Sample, known: Mapping[str, tuple[int, int]], read_before: _KnownFiles) -> Sample | BadImage:
    """Read one file, in a background thread."""
    key = read_before.key(sample)  # from before the bytes are read: what changes meanwhile has another one
    try:
        data = sample.file.read()
        sha256 = hashlib.sha256(data).hexdigest()
        size_px = known.get(sha256) or header_size(data)
    except ImageError as error:
        return BadImage(str(sample.file), error.message)
    if key is not None:
        read_before.new[key] = (sha256, *size_px)
    return replace(sample, sha256=sha256, size_px=size_px)


@dataclass
class _KnownFiles:
    """Digests and sizes of the files of one dataset that were read before, by their state, which changes with the bytes.

    Args:
        files: state -> sha256, width, height.
        new: what was read in this scan.
    """

    path: Path | None
    files: dict[str, tuple[str, int, int]]
    new: dict[str, tuple[str, int, int]] = field(default_factory=dict)

    @classmethod
    def recall(cls, memory: Path | None, root: str) -> _KnownFiles:
        """Return the known files of the dataset in `root`."""
        if memory is None:
            return cls(None, {})
        path = memory / f"files-{hashlib.sha256(root.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}-{DECODER}.txt"
        if not path.exists():
            return cls(path, {})
        lines = re.findall(r"^([0-9a-f]{32}) ([0-9a-f]{64}) (\d+) (\d+);$", path.read_text("ascii", "replace"), re.MULTILINE)
        return cls(path, {key: (sha256, int(width), int(height)) for key, sha256, width, height in lines})

    def key(self, sample: Sample) -> str | None:
        """Return the key of a file's state; None if the state is not known without reading the file."""
        state = sample.file.state() if self.path is not None and isinstance(sample.file, SourceFile) else None
        if state is None:
            return None
        return hashlib.blake2b(state.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def look_up(self, sample: Sample) -> Sample | None:
        """Return a sample with its digest and size if its file has not changed since it was last read; else None."""
        if not self.files or (key := self.key(sample)) is None or (before := self.files.get(key)) is None:
            return None
        sha256, width, height = before
        return replace(sample, sha256=sha256, size_px=(width, height))

    def remember(self) -> None:
        """Append the files that were read in this scan to the record."""
        if self.path is not None:
            append_note(self.path, "".join(f"{key} {sha} {width} {height};\n" for key, (sha, width, height) in self.new.items()))


def append_note(path: Path, lines: str) -> None:
    """Append lines to a file of notes; if the disk is full, do nothing."""
    if not lines:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="ascii") as stream:
            stream.write(f"\n{lines}")  # the line break ends a line that a killed process left incomplete
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _decode_all(samples: Sequence[Sample], *, progress: ProgressCallback, threads: int | None) -> dict[int, ImageError]:
    """Decode every sample completely, as cheaply as its format allows; return the errors by position."""
    threads = threads or available_cores()
    failed = {}
    for position, error in enumerate(ordered_map(_decode_one, samples, threads=threads, ahead=64 * threads)):
        if error is not None:
            failed[position] = error
        if (position + 1) % 64 == 0 or position + 1 == len(samples):
            progress(Progress("preparing", position + 1, len(samples), "images", message="checking images"))
    return failed


def _decode_one(sample: Sample) -> ImageError | None:
    try:
        image_size(sample.file.read())
    except ImageError as error:
        return error
    return None


def _in_order(indexed: Dataset, bad: Sequence[BadImage]) -> tuple[BadImage, ...]:
    """Return bad images in the order in which they were listed, after those that were refused during listing."""
    position = {str(sample.file): number for number, sample in enumerate(indexed.samples)}
    return tuple(sorted(bad, key=lambda image: position.get(image.where, -1)))


def _notes(memory: Path) -> Path:
    return memory / f"readable-{DECODER}.txt"


def _recall(memory: Path | None) -> dict[str, tuple[int, int]]:
    """Return the sizes of the images that were decoded before, by sha256; skip lines that a killed process left incomplete."""
    if memory is None or not _notes(memory).exists():
        return {}
    lines = re.findall(r"^([0-9a-f]{64}) (\d+) (\d+);$", _notes(memory).read_text("ascii", "replace"), re.MULTILINE)
    return {sha256: (int(width), int(height)) for sha256, width, height in lines}


def _remember(memory: Path | None, samples: Sequence[Sample]) -> None:
    """Record that these samples were decoded, unless the disk is full."""
    sizes = {sample.sha256: sample.size_px for sample in samples if sample.size_px}
    if memory is not None:
        append_note(_notes(memory), "".join(f"{sha256} {width} {height};\n" for sha256, (width, height) in sizes.items()))


def _quantiles(values: np.ndarray, *percents: int) -> dict[str, float]:
    return {f"p{percent}": float(value) for percent, value in zip(percents, np.percentile(values, percents), strict=True)}


def _check_bad_images(dataset: Dataset, on_bad: OnBadImage, max_bad_fraction: float) -> None:
    n_bad, n_files = len(dataset.bad), len(dataset.bad) + len(dataset.samples)
    if n_bad == 0 or (on_bad == "quarantine" and n_bad <= max_bad_fraction * n_files):
        return
    problems = [Problem(printable(image.where), image.reason) for image in dataset.bad[:LISTED]]
    if n_bad > LISTED:
        problems.append(Problem("", f"and {n_bad - LISTED:,} more"))
    n_missing = sum(image.is_missing for image in dataset.bad)
    parts = [(n_missing, "do not exist"), (n_bad - n_missing, "cannot be read")]
    first, *others = [(count, what) for count, what in parts if count]
    counts_text = f"{first[0]:,} of {plural(n_files, 'image')} {first[1]}" + "".join(
        f" and {count:,} {what}" for count, what in others
    )
    count = f"{printable(dataset.root)}: {counts_text}"
    if on_bad == "fail":
        raise DataError(f"{count}, and data.on_bad_image is fail. Repair or remove them, or set it to quarantine.", problems)
    allowed = f"more than data.max_bad_fraction {max_bad_fraction:g} allows"
    raise DataError(f"{count}, {allowed}. Repair or remove them, or allow more.", problems)


def _refuse_emptied(before: Dataset, after: Dataset) -> None:
    """Refuse data in which all images of a training class, or of the whole validation or test set, are unreadable."""
    left = after.counts()
    problems = []
    for split, counts in before.counts().items():
        if split not in left:
            problems.append(Problem(split, f"none of its {plural(sum(counts.values()), 'image')} can be read"))
        elif split in ("train", "all"):
            lost = [name for name, count in counts.items() if count and not left[split][name]]
            problems += [Problem(name, f"none of its {plural(counts[name], 'image')} can be read") for name in lost]
    if problems:
        raise DataError(f"{printable(before.root)}: nothing is left of {natural_list(p.where for p in problems)}", problems)


def _warnings(dataset: Dataset, samples: Sequence[Sample]) -> tuple[str, ...]:
    by_content: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_content[sample.sha256].append(sample)
    repeated = [group for group in by_content.values() if len(group) > 1]
    return (*_conflicts(dataset, repeated), *_leaks(dataset, repeated))


def _conflicts(dataset: Dataset, repeated: Sequence[Sequence[Sample]]) -> list[str]:
    conflicting = [group for group in repeated if len({sample.target for sample in group}) > 1]
    if not conflicting:
        return []
    n_files = sum(len(group) for group in conflicting)
    pairs = Counter(" and ".join(sorted({" + ".join(dataset.label_names(sample)) for sample in group})) for group in conflicting)
    kinds = natural_list(f"{names} ({count:,})" for names, count in pairs.most_common())
    return [
        f"{plural(len(conflicting), 'photograph')} in more than one class ({n_files:,} files with the same bytes): {kinds}; "
        f"for example {_example(dataset, conflicting[0])}. No model can get both right: delete the wrong ones"
    ]


def _leaks(dataset: Dataset, repeated: Sequence[Sequence[Sample]]) -> list[str]:
    warnings = []
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        leaking = [group for group in repeated if {first, second} <= {sample.split for sample in group}]
        if leaking:
            n_files = sum(sample.split == second for group in leaking for sample in group)
            warnings.append(
                f"{plural(n_files, f'{second} file')} with the same bytes as a {first} file, so {second} metrics flatter "
                f"the model: for example {_example(dataset, leaking[0])}"
            )
    return warnings


def _example(dataset: Dataset, group: Sequence[Sample]) -> str:
    return " = ".join(printable(sample.id) for sample in group[:3])
