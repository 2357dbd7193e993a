"""Run all examinations of a dataset, and return the findings, most severe first."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.data.check import advise_resize, image_facts
from finetune.data.dataset import Dataset, Sample, targets_of
from finetune.doctor.classes import class_findings
from finetune.doctor.finding import Case, Examination, Finding, Fix, Severity, case_key
from finetune.doctor.labels import doubt_label_sets, doubt_labels
from finetune.doctor.looks import Look, look_at_all
from finetune.doctor.modes import classes_that_are_two
from finetune.doctor.shortcuts import find_shortcuts
from finetune.features.duplicates import Pair, clusters, near_duplicates, same_bytes
from finetune.messages import natural_list, plural
from finetune.progress import ProgressCallback, silent
from finetune.tasks import task_of
from finetune.training.label_doubts import label_changes, with_changes

VERSION = 11  # of what is found: examinations of another one are not read
_ORDER: Mapping[Severity, int] = {"problem": 0, "doubt": 1, "note": 2}

_DARK, _BRIGHT, _TINY_PX = 32.0, 224.0, 32
_BLURRED_SHARPNESS = 0.008  # of pictures that are 128 px on their longer side


def examine(
    dataset: Dataset,
    embeddings: NDArray[np.float32],
    *,
    backbone: str,
    memory: Path | None = None,
    progress: ProgressCallback = silent,
) -> Examination:
    """Examine a checked dataset that is split.

    Args:
        embeddings: (N, D), one row for each sample.
        memory: a folder in which facts about images are cached for the next examination.
    """
    work = _Examining(dataset, embeddings, memory, progress)
    findings = list(work.findings())
    findings.sort(key=lambda finding: (_ORDER[finding.severity], -finding.count))
    return Examination(
        revision=dataset.revision or dataset.digest,
        n_images=len(dataset.samples),
        classes=dataset.classes,
        findings=tuple(findings),
        backbone=backbone,
        confidence=work.confidence,
        seconds=work.seconds,
    )


def without_accepted(finding: Finding, accepted: frozenset[str]) -> Finding:
    """Return a finding without the cases that the user has acknowledged, given by their keys."""
    left = tuple(case for case in finding.cases if case.key not in accepted)
    done = len(finding.cases) - len(left)
    return replace(finding, cases=left, count=finding.count - done, acknowledged=done)


@dataclass
class _Examining:
    dataset: Dataset
    embeddings: NDArray[np.float32]
    memory: Path | None
    progress: ProgressCallback
    seconds: dict[str, float] = field(default_factory=dict)
    confidence: tuple[float, ...] = ()

    def findings(self) -> Iterator[Finding]:
        with self._timed("looks"):
            looks = look_at_all(self.samples, memory=self.memory, progress=self.progress)
        with self._timed("near duplicates"):
            near = near_duplicates(self.samples, self.embeddings, self.progress)
        exclusive = task_of(targets_of(self.samples)).exclusive
        yield from self._unreadable()
        yield from self._copies(same_bytes(self.samples), near)
        with self._timed("labels"):
            yield from self._labels() if exclusive else self._label_sets()
        if exclusive:
            with self._timed("shortcuts"):
                yield from self._shortcuts(looks)
            with self._timed("groups"):
                yield from self._groups()
        yield from class_findings(self.dataset)
        yield from self._pictures(looks)
        yield from self._framing()

    @property
    def samples(self) -> Sequence[Sample]:
        return self.dataset.samples

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = round(time.perf_counter() - started, 3)

    def _case(
        self, kind: str, positions: Sequence[int], score: float = 1.0, said: str = "", suggested: str | None = None
    ) -> Case:
        ids = tuple(self.samples[one].id for one in positions)
        return Case(ids, score, said, suggested, case_key(kind, [self.samples[one].sha256 for one in positions]))

    def _label(self, position: int) -> str:
        return " + ".join(self.dataset.label_names(self.samples[position]))

    # ------------------------------------------------------------------------------------------------------------ files

    def _unreadable(self) -> Iterator[Finding]:
        n_files = len(self.dataset.bad) + len(self.samples)
        missing = [one for one in self.dataset.bad if one.is_missing]
        if missing:
            cases = tuple(Case((one.where,), 1.0, one.reason, key=case_key("missing_files", [one.where])) for one in missing)
            yield Finding(
                "missing_files",
                "problem",
                "Files that are named and do not exist",
                len(missing),
                f"{plural(len(missing), 'row')} of {n_files:,} name no file that exists; they are left out.",
                "Put the files where the table says, correct the table, or delete the rows.",
                cases,
            )
        bad = [one for one in self.dataset.bad if not one.is_missing]
        if bad:
            cases = tuple(Case((one.where,), 1.0, one.reason, key=case_key("unreadable", [one.where])) for one in bad)
            yield Finding(
                "unreadable",
                "problem",
                "Files that cannot be read",
                len(bad),
                f"{plural(len(bad), 'file')} of {n_files:,} cannot be decoded; they are left out.",
                "Copy them again from where they came from, or delete them.",
                cases,
            )

    # ----------------------------------------------------------------------------------------------------------- copies

    def _copies(self, same: Sequence[Sequence[int]], near: Sequence[Pair]) -> Iterator[Finding]:
        scores = {frozenset((pair.first, pair.second)): pair.score for pair in near}
        groups = clusters(len(self.samples), [*same, *((pair.first, pair.second) for pair in near)])
        conflicting = [group for group in groups if len({self.samples[one].target for one in group}) > 1]
        if conflicting:
            yield Finding(
                "conflicting_labels",
                "problem",
                "The same picture under different labels",
                len(conflicting),
                f"In more than one class: {plural(len(conflicting), 'picture')}. No model can get all of them right.",
                "Decide which label is right, and remove the others or correct them in the manifest.",
                tuple(
                    self._case("conflicting_labels", group, said=" / ".join(sorted({self._label(one) for one in group})))
                    for group in conflicting
                ),
            )
        across = [group for group in groups if len({self.samples[one].split for one in group}) > 1]
        if across:
            n_test = sum(self.samples[one].split in ("val", "test") for group in across for one in group)
            yield Finding(
                "leaks",
                "problem",
                "The same picture on both sides of the split",
                len(across),
                f"In the training data too: {plural(n_test, 'validation or test image')}. Figures flatter the model.",
                "Give copies one group (the manifest does), so that they are drawn together; of splits of your own, the manifest "
                "leaves out the copies in the training data.",
                tuple(self._case("leaks", group, said=_sides(self.samples, group)) for group in across),
                "group",
            )
        exact = [group for group in same if len({self.samples[one].target for one in group}) == 1]
        if exact:
            extra = sum(len(group) - 1 for group in exact)
            yield Finding(
                "duplicates",
                "note",
                "Files with the same bytes",
                len(exact),
                f"{plural(extra, 'file')} more than there are pictures. They count twice in training.",
                "Leave one of each.",
                tuple(self._case("duplicates", group) for group in exact),
                "leave_out",
            )
        alike = [group for group in groups if len({self.samples[one].sha256 for one in group}) > 1]
        if alike:
            yield Finding(
                "near_duplicates",
                "doubt",
                "The same picture in different files",
                len(alike),
                "Re-encoded, resized, cropped, mirrored or framed copies: near in the embedding, and of the same fine structure "
                "when they are laid over each other.",
                "Give them one group (the manifest does), so that they are never on two sides of a split.",
                tuple(
                    sorted(
                        (
                            self._case("near_duplicates", group, _surest(group, scores), _sizes(self.samples, group))
                            for group in alike
                        ),
                        key=lambda case: -case.score,
                    )
                ),
                "group",
            )

    # ----------------------------------------------------------------------------------------------------------- labels

    def _labels(self) -> Iterator[Finding]:
        doubts = doubt_labels(self.samples, self.embeddings, len(self.dataset.classes))
        if doubts is None:
            return
        self.confidence = tuple(round(float(one), 6) for one in doubts.confidence)
        if doubts.why_none:
            yield Finding(
                "labels_not_judged",
                "note",
                "Labels could not be judged",
                1,
                f"A linear head on the features of this backbone {doubts.why_none}, so it says nothing about single labels.",
                "Examine the images with pretrained weights, or with a backbone that suits them.",
            )
        if not doubts.doubted:
            return
        classes = self.dataset.classes
        yield Finding(
            "label_errors",
            "doubt",
            "Labels that are probably wrong",
            len(doubts.doubted),
            f"Of {plural(len(self.samples), 'label')}, {len(doubts.doubted):,} are doubted by a linear head on frozen features "
            "that has not seen the image. A doubt is no proof: look at the first ones.",
            "Correct the label in the manifest, or acknowledge the case.",
            tuple(
                self._case(
                    "label_errors",
                    [one],
                    round(1 - float(doubts.confidence[one]), 4),
                    f"labelled {self._label(one)} ({doubts.confidence[one]:.1%} likely)",
                    classes[doubts.suggested[one]],
                )
                for one in doubts.doubted
            ),
            "relabel",
        )

    def _label_sets(self) -> Iterator[Finding]:
        """Yield the doubts of labels in data with any number of labels per image."""
        doubts = doubt_label_sets(self.samples, self.embeddings, len(self.dataset.classes))
        if doubts is None:
            return
        self.confidence = tuple(round(float(one), 6) for one in doubts.confidence)
        if not doubts.doubted:
            return
        n_labels = sum(len(one.wrong) + len(one.missing) for one in doubts.doubted)
        yield Finding(
            "label_errors",
            "doubt",
            "Labels that are probably wrong",
            len(doubts.doubted),
            f"Of {plural(len(self.samples), 'image')}, {len(doubts.doubted):,} have labels ({n_labels:,} in all) that are "
            "doubted by linear heads on frozen features without the image. A doubt is no proof: look at the first ones.",
            "Correct the labels in the manifest, or acknowledge the case.",
            tuple(
                self._case(
                    "label_errors",
                    [one.row],
                    round(1 - one.own_score, 4),
                    f"labelled {self._label(one.row) or 'with nothing'}; {label_changes(self.dataset, one.wrong, one.missing)}",
                    self.dataset.label_text(with_changes(self.samples[one.row], one.wrong, one.missing)),
                )
                for one in doubts.doubted
            ),
        )

    def _groups(self) -> Iterator[Finding]:
        labels = np.array([sample.labels[0] for sample in self.samples], np.int64)
        found = classes_that_are_two(self.embeddings, labels)
        if found:
            names = natural_list([self.dataset.classes[one.label] for one in found])
            yield Finding(
                "two_groups",
                "doubt",
                "Classes that may be two",
                len(found),
                f"{names}: the images fall into two groups that lie farther apart than different images of one kind do here.",
                "Look at the most typical images of each group. Where they are different things, give them different labels.",
                tuple(
                    self._case(
                        "two_groups",
                        [*one.first, *one.second],
                        round(one.apart, 2),
                        f"{self.dataset.classes[one.label]}: {1 - one.share:.0%} like the first {len(one.first)}, "
                        f"{one.share:.0%} like the others; {one.apart:.1f} standard deviations apart",
                    )
                    for one in found
                ),
            )

    def _shortcuts(self, looks: Mapping[str, Look]) -> Iterator[Finding]:
        found = find_shortcuts(self.samples, looks, len(self.dataset.classes))
        if not found:
            return
        classes, chance = self.dataset.classes, 1 / len(self.dataset.classes)
        cases = []
        for one in found:
            told = natural_list([f"{classes[label]} ({share:.0%})" for label, share in one.given_away], 5)
            said = f"{one.fact} alone gives away {told}; right for {one.accuracy:.0%} of a class's images, by chance {chance:.0%}"
            cases.append(Case((), one.given_away[0][1], said, key=case_key("shortcuts", [one.fact, *classes])))
        yield Finding(
            "shortcuts",
            "problem",
            "The label can be told without looking at the picture",
            len(cases),
            f"{natural_list([one.fact for one in found])}: a model may learn this instead of what the pictures show, and fail on "
            "pictures from elsewhere.",
            "Collect every class in the same way, or bring the files to one size, format and compression; test on pictures from "
            "another source.",
            tuple(cases),
        )

    # --------------------------------------------------------------------------------------------------------- pictures

    def _pictures(self, looks: Mapping[str, Look]) -> Iterator[Finding]:
        yield from self._those(
            looks, "blank", "Pictures of nothing", lambda sample, look: look.is_blank,
            lambda look: look.contrast, "Almost no contrast", "Look at them, and leave out what shows nothing.", "leave_out",
        )  # fmt: skip
        yield from self._those(
            looks, "dark", "Very dark pictures", lambda sample, look: not look.is_blank and look.brightest < _DARK,
            lambda look: look.brightest, "Black in nineteen of twenty pixels", "Leave out what nobody could recognise.",
        )  # fmt: skip
        yield from self._those(
            looks, "bright", "Very bright pictures",
            lambda sample, look: look.darkest > _BRIGHT and not look.is_blank,
            lambda look: -look.darkest, "White in nineteen of twenty pixels", "Leave out what nobody could recognise.",
        )  # fmt: skip
        yield from self._those(
            looks, "blurred", "Blurred pictures",
            lambda sample, look: not look.is_blank
            and look.sharpness < _BLURRED_SHARPNESS
            and min(sample.size_px or (0,)) >= 2 * _TINY_PX,
            lambda look: look.sharpness, "No fine structure even at 128 pixels", "Leave out what nobody could recognise.",
        )  # fmt: skip
        yield from self._those(
            looks, "tiny", "Very small pictures", lambda sample, look: min(sample.size_px or (_TINY_PX,)) < _TINY_PX,
            lambda look: look.n_bytes, f"Less than {_TINY_PX} pixels wide or high", "Look for larger originals.",
        )  # fmt: skip
        turned = [sample for sample in self.samples if sample.sha256 in looks and looks[sample.sha256].orientation != 1]
        formats = Counter(f"{look.format} ({look.mode})" if look.mode else look.format for look in looks.values())
        animated = sum(look.animated for look in looks.values())
        if len(formats) > 1 or turned or animated:
            said = natural_list([f"{count:,} {name}" for name, count in formats.most_common()], 6)
            upright = f" Stored turned, shown upright: {plural(len(turned), 'file')}." if turned else ""
            moving = f" Animated, of which only the first frame is used: {plural(animated, 'file')}." if animated else ""
            yield Finding(
                "formats", "note", "Formats", len(formats), f"{said}.{upright}{moving}", "Nothing: all of them are read."
            )

    def _those(
        self,
        looks: Mapping[str, Look],
        kind: str,
        title: str,
        has_it: Callable[[Sample, Look], bool],
        how: Callable[[Look], float],
        said: str,
        advice: str,
        fix: Fix = "none",
    ) -> Iterator[Finding]:
        found = [
            (how(look), position)
            for position, sample in enumerate(self.samples)
            if (look := looks.get(sample.sha256)) is not None and has_it(sample, look)
        ]
        if found:
            cases = tuple(self._case(kind, [position]) for _, position in sorted(found))
            yield Finding(kind, "doubt", title, len(found), f"{said}: {plural(len(found), 'picture')}.", advice, cases, fix)

    def _framing(self) -> Iterator[Finding]:
        advice = advise_resize(image_facts(self.samples))
        if advice.resize != "crop":
            yield Finding(
                "framing",
                "note",
                "How pictures are brought to the model's square",
                1,
                f"{advice.reason[0].upper()}{advice.reason[1:]}; so data.resize: auto means {advice.resize}.",
                "Look at the pictures under 'What the model sees'.",
            )


def _surest(group: Sequence[int], scores: Mapping[frozenset[int], float]) -> float:
    return max((score for pair, score in scores.items() if pair <= set(group)), default=1.0)


def _sizes(samples: Sequence[Sample], group: Iterable[int]) -> str:
    sizes = dict.fromkeys(f"{size[0]} × {size[1]}" for one in group if (size := samples[one].size_px))
    return "one size" if len(sizes) == 1 else " and ".join(list(sizes)[:3])


def _sides(samples: Sequence[Sample], group: Sequence[int]) -> str:
    sides = Counter(samples[one].split or "" for one in group)
    return ", ".join(f"{count} in {side}" for side, count in sorted(sides.items()))
