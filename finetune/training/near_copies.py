"""Find near duplicates of validation and test images among the training images, in every job that computes the features of both.

Candidates are the pairs of ``neighbours.csv``: each held-out image with its nearest training image. The likeliest of them are
compared pixel by pixel, as `finetune check` does, up to a limit that keeps the cost at a few percent of computing the features.
Scores are kept, so later runs on the same images compare nothing.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.bundle.image import DECODER
from finetune.data.check import append_note
from finetune.data.dataset import Dataset, Sample
from finetune.evaluation.evaluate import POOLED
from finetune.events import DataWarning
from finetune.features.duplicates import compare_pictures
from finetune.messages import natural_list, plural, printable
from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store

LEAST_SCORE = 0.945  # higher than for `finetune check`, as figures depend on it; measured: similar handwritten digits have 0.94
LARGEST_RATIO = 0.9  # of the distances to the nearest and the fifth nearest training image; measured: copies are below 0.8
MOST_COMPARED_SHARE = 0.15  # pairs that are compared at most, as a share of all images
MOST_COMPARED = 100  # pairs that are always allowed
SHOWN = 3
_IMAGES_OF = {"val": "val image", "test": "test image", POOLED: "held-out image"}
_VERSION = 1  # of `finetune.features.alignment`: scores of another one are not read


def record_near_copies(run: RunDir, dataset: Dataset, store: Store, *, threads: int | None = None) -> None:
    """Compare the likeliest pairs of a run; write the copies into the run folder, and record them as an event."""
    if run.near_copies.exists():
        return
    candidates = _candidates(run)
    most = max(MOST_COMPARED, round(MOST_COMPARED_SHARE * len(dataset.samples)))
    sample_of = {sample.id: sample for sample in dataset.samples}
    # Files with the same bytes are noted when the data is checked.
    likely = [pair for one, other in candidates if (pair := (sample_of[one], sample_of[other]))[0].sha256 != pair[1].sha256]
    pairs = likely[:most]
    copies = [
        {"split": one.split, "file": one.id, "copy_of": other.id, "score": round(score, 4)}
        for (one, other), score in zip(pairs, _scores(pairs, store, threads), strict=True)
        if score >= LEAST_SCORE
    ]
    write_json(run.near_copies, {"candidates": len(likely), "compared": len(pairs), "copies": copies})
    for sentence in near_copies_sentence(run):
        run.record(DataWarning(sentence))


def pool_near_copies(run: RunDir, kept: Sequence[RunDir]) -> None:
    """Write the copies that the folds of a cross-validation found among their test images into the study's folder, as `POOLED`.

    Args:
        run: the folder of the study.
        kept: of each fold the run whose model was tested.
    """
    if run.near_copies.exists():
        return
    found = [read_json(fold.near_copies) for fold in kept if fold.near_copies.exists()]
    copies = [{**copy, "split": POOLED} for one in found for copy in one["copies"] if copy["split"] == "test"]
    counts = {name: sum(one[name] for one in found) for name in ("candidates", "compared")}
    write_json(run.near_copies, {**counts, "copies": copies})
    for sentence in near_copies_sentence(run):
        run.record(DataWarning(sentence))


def near_copies_in(run: RunDir) -> dict[str, frozenset[str]]:
    """Return by split the ids of held-out images with a near duplicate among the training images of the run, or of their fold."""
    found: dict[str, set[str]] = defaultdict(set)
    for copy in read_json(run.near_copies)["copies"] if run.near_copies.exists() else ():
        found[copy["split"]].add(copy["file"])
    return {split: frozenset(ids) for split, ids in found.items()}


def near_copies_sentence(run: RunDir) -> tuple[str, ...]:
    """Return in at most one sentence which held-out images of a run are near duplicates of training images."""
    if not run.near_copies.exists():
        return ()
    found = read_json(run.near_copies)
    copies: Sequence[Mapping[str, str]] = found["copies"]
    if not copies:
        return ()
    counts = {split: sum(one["split"] == split for one in copies) for split in _IMAGES_OF}
    n_images = natural_list([plural(count, _IMAGES_OF[split]) for split, count in counts.items() if count])
    shown = "; ".join(f"{printable(one['file'])} is {printable(one['copy_of'])}" for one in copies[:SHOWN])
    more = f"; and {len(copies) - SHOWN:,} more in {run.near_copies.parent.name}/{run.near_copies.name}" * (len(copies) > SHOWN)
    only = ""
    if found["compared"] < found["candidates"]:
        only = f". Of {found['candidates']:,} likely pairs {found['compared']:,} were compared"
    return (
        f"Near duplicates of training images: {n_images} ({shown}{more}), so figures with them are too high{only}. "
        "finetune check DATA --fix corrected.csv writes groups that keep copies on one side of a split, and training on the same "
        "data with --set data.manifest=corrected.csv uses them",
    )


def _candidates(run: RunDir) -> list[tuple[str, str]]:
    """Return the ids of held-out images that may be copies and of their nearest training images, the likeliest first."""
    if not run.neighbours.exists():
        return []
    text = run.neighbours.read_bytes().decode("utf-8", "surrogateescape")
    rows = [(float(row["ratio"]), row["path"], row["nearest"]) for row in csv.DictReader(io.StringIO(text, newline=""))]
    return [(held_out, nearest) for ratio, held_out, nearest in sorted(rows) if ratio <= LARGEST_RATIO]


def _scores(pairs: Sequence[tuple[Sample, Sample]], store: Store, threads: int | None) -> list[float]:
    """Return the score of each pair, computed now or by an earlier run."""
    notes = store.folder("notes") / f"copies-{_VERSION}-{DECODER}.txt"
    known = _recall(notes)
    new = list({_key(*pair): pair for pair in pairs if _key(*pair) not in known}.values())
    samples = [sample for pair in new for sample in pair]
    positions = [(2 * number, 2 * number + 1) for number in range(len(new))]
    scores = compare_pictures(samples, positions, threads=threads)
    found = {_key(*pair): score for pair, score in zip(new, scores, strict=True)}
    append_note(notes, "".join(f"{one} {other} {score:.6f};\n" for (one, other), score in found.items()))
    return [(known | found)[_key(one, other)] for one, other in pairs]


def _key(one: Sample, other: Sample) -> tuple[str, str]:
    first, second = sorted((one.sha256, other.sha256))
    return first, second


def _recall(notes: Path) -> dict[tuple[str, str], float]:
    """Return the known scores by the digests of both images; lines that a killed process left incomplete are skipped."""
    if not notes.exists():
        return {}
    lines = re.findall(r"^([0-9a-f]{64}) ([0-9a-f]{64}) (-?[\d.]+);$", notes.read_text("ascii", "replace"), re.MULTILINE)
    return {(one, other): float(score) for one, other, score in lines}
