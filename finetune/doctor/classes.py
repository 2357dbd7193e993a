"""Find problems in the sizes and names of classes, without reading images: small, missing, unequal, or equal in meaning."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from finetune.data.dataset import Dataset, targets_of
from finetune.data.separators import forgotten_separator, how_to_separate
from finetune.doctor.finding import Case, Finding, case_key
from finetune.messages import natural_list, plural, plural_of
from finetune.metrics.imbalance import are_unequal
from finetune.tasks import task_of

FEW_IMAGES = 20  # of a class; with fewer, its metrics are very uncertain


def class_findings(dataset: Dataset) -> Iterator[Finding]:
    """Yield the findings about the classes of a dataset that is split."""
    counts = dataset.counts()
    totals = Counter[str]()
    for of_split in counts.values():
        totals.update(of_split)
    yield from _combined(totals)
    yield from _alike(totals)
    noun = task_of(targets_of(dataset.samples)).noun
    yield from _small(totals, noun)
    yield from _missing(counts, noun)
    yield from _unequal(totals, noun)


def class_warnings(dataset: Dataset) -> tuple[str, ...]:
    """Return a sentence for each finding that needs no pixels and is not part of the other checks of every job."""
    reported_kinds = ("combined_labels", "alike_names", "small_classes", "imbalance")
    return tuple(f"{one.title}: {one.evidence} {one.advice}" for one in class_findings(dataset) if one.kind in reported_kinds)


def _combined(totals: Mapping[str, int]) -> Iterator[Finding]:
    """Find class names that look like several labels in one cell of a table."""
    found = forgotten_separator(totals)
    if found is None:
        return
    separator, combined = found
    n_parts = len({part.strip() for name in totals for part in name.split(separator)} - {""})
    shown = natural_list([repr(name) for name in combined], 4)
    yield Finding(
        "combined_labels",
        "doubt",
        "Classes that look like several labels each",
        len(combined),
        f"{len(combined):,} of {plural(len(totals), 'class')} ({shown}) look like combinations of {plural(n_parts, 'label')}, "
        f"separated by {separator!r}.",
        f"If they are, {how_to_separate(separator)} reads each as several labels of one image, from a table.",
        tuple(
            Case((), 1.0, f"{name}: {plural(totals[name], 'image')}", key=case_key("combined_labels", [name]))
            for name in combined
        ),
    )


def _alike(totals: Mapping[str, int]) -> Iterator[Finding]:
    """Find class names that differ only in spaces, hyphens or compatible characters. Names that differ in case are refused."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in totals:
        groups[_spelling(name)].append(name)
    cases = [sorted(names, key=lambda name: (-totals[name], name)) for names in groups.values() if len(names) > 1]
    if cases:
        shown_names = [" and ".join(f"{name!r} ({totals[name]:,})" for name in names) for names in cases]
        yield Finding(
            "alike_names",
            "doubt",
            "Classes that differ in spelling alone",
            len(cases),
            f"{natural_list(shown_names)} differ only in spaces and hyphens, or in forms of the same letters.",
            "If they mean the same, give them one name (in the table or the folders, or in the manifest's column of labels).",
            tuple(
                Case((), 1.0, text, names[0], case_key("alike_names", names))
                for names, text in zip(cases, shown_names, strict=True)
            ),
        )


def _spelling(name: str) -> str:
    """Return a key that is equal for names which readers would take for the same."""
    return re.sub(r"[\s_\-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def _small(totals: Mapping[str, int], noun: str) -> Iterator[Finding]:
    small = {name: count for name, count in totals.items() if count < FEW_IMAGES}
    if small:
        shown_names = natural_list([f"{name} ({count})" for name, count in sorted(small.items(), key=lambda pair: pair[1])], 10)
        yield Finding(
            "small_classes",
            "doubt",
            f"{plural_of(noun).capitalize()} with few images",
            len(small),
            f"{shown_names}: figures of {plural_of(noun)} with fewer than {FEW_IMAGES} images say little.",
            f"Add images, or merge {plural_of(noun)}.",
            tuple(
                Case((), 1.0, f"{name}: {plural(count, 'image')}", key=case_key("small_classes", [name]))
                for name, count in small.items()
            ),
        )


def _missing(counts: Mapping[str, Mapping[str, int]], noun: str) -> Iterator[Finding]:
    missing = [(split, name) for split, of in counts.items() for name, count in of.items() if not count and split != "all"]
    if missing:
        yield Finding(
            "missing_in_split",
            "problem",
            f"{plural_of(noun).capitalize()} that a split cannot measure",
            len(missing),
            natural_list([f"{name} has no {split} image" for split, name in missing], 8) + ".",
            f"Add images of these {plural_of(noun)}, or draw the split anew.",
            tuple(
                Case((), 1.0, f"{name}: none in {split}", key=case_key("missing_in_split", [split, name]))
                for split, name in missing
            ),
        )


def _unequal(totals: Counter[str], noun: str) -> Iterator[Finding]:
    if not are_unequal(totals.values()):
        return
    most, least = totals.most_common(1)[0], min(totals.items(), key=lambda pair: pair[1])
    yield Finding(
        "imbalance",
        "note",
        f"{plural_of(noun).capitalize()} of very different size",
        1,
        f"{most[0]} has {most[1]:,} images, {least[0]} {least[1]:,}. Figures over all images hardly depend on small "
        f"{plural_of(noun)}: read the mean over {plural_of(noun)} (macro) first.",
        f"Add images of the small {plural_of(noun)}, or set data.class_weights: balanced or data.logit_adjustment: 1.",
        (
            Case(
                (),
                most[1] / max(least[1], 1),
                f"{most[0]} {most[1]:,}, {least[0]} {least[1]:,}",
                key=case_key("imbalance", []),
            ),
        ),
    )
