"""Run all examinations of a dataset, and return the findings, most severe first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.data.check import advise_resize, image_facts
from finetune.data.dataset import Dataset, Sample, targets_of
from finetune.doctor.classes import class_findings
from finetune.doctor.examined_data import ExaminedData
from finetune.doctor.finding import Case, Examination, Finding, Fix, Severity, case_key
from finetune.doctor.label_findings import label_findings
from finetune.doctor.looks import Look, look_at_all
from finetune.features.duplicates import Pair, clusters, near_duplicates, same_bytes
from finetune.messages import natural_list, plural
from finetune.progress import ProgressCallback, silent
from finetune.tasks import task_of

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
    data = ExaminedData(dataset, embeddings)
    findings = list(_Examining(data, memory, progress).findings())
    findings.sort(key=lambda finding: (_ORDER[finding.severity], -finding.count))
    return Examination(
        revision=dataset.revision or dataset.digest,
        n_images=len(dataset.samples),
        classes=dataset.classes,
        findings=tuple(findings),
        backbone=backbone,
        confidence=data.confidence,
        seconds=data.seconds,
    )


def without_accepted(finding: Finding, accepted: frozenset[str]) -> Finding:
    """Return a finding without the cases that the user has acknowledged, given by their keys."""
    left = tuple(case for case in finding.cases if case.key not in accepted)
    done = len(finding.cases) - len(left)
    return replace(finding, cases=left, count=finding.count - done, acknowledged=done)


@dataclass
class _Examining:
    data: ExaminedData
    memory: Path | None
    progress: ProgressCallback

    @property
    def dataset(self) -> Dataset:
        return self.data.dataset

    @property
    def samples(self) -> Sequence[Sample]:
        return self.data.samples

    def findings(self) -> Iterator[Finding]:
        with self.data.timed("looks"):
            looks = look_at_all(self.samples, memory=self.memory, progress=self.progress)
        with self.data.timed("near duplicates"):
            near = near_duplicates(self.samples, self.data.embeddings, self.progress)
        yield from self._unreadable()
        yield from self._copies(same_bytes(self.samples), near)
        yield from label_findings(task_of(targets_of(self.samples)).name)(self.data, looks)
        yield from class_findings(self.dataset)
        yield from self._pictures(looks)
        yield from self._framing()

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
                    self.data.case(
                        "conflicting_labels", group, said=" / ".join(sorted({self.data.label_text(one) for one in group}))
                    )
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
                tuple(self.data.case("leaks", group, said=_sides(self.samples, group)) for group in across),
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
                tuple(self.data.case("duplicates", group) for group in exact),
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
                            self.data.case("near_duplicates", group, _surest(group, scores), _sizes(self.samples, group))
                            for group in alike
                        ),
                        key=lambda case: -case.score,
                    )
                ),
                "group",
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
            cases = tuple(self.data.case(kind, [position]) for _, position in sorted(found))
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
