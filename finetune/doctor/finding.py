"""The types for findings of an examination: a kind of fault, the images with it, the evidence, and what to do."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from finetune.messages import plural

Severity = Literal["problem", "doubt", "note"]
"""A problem makes metrics or models wrong; a doubt should be looked at; a note is only information."""
Fix = Literal["leave_out", "group", "relabel", "none"]
"""What the corrected manifest does. `leave_out` and `group` are applied automatically; `relabel` only suggests a label."""

LISTED = 200  # cases of a finding that JSON for people and programs names; `count` says how many there are


@dataclass(frozen=True)
class Case:
    """One image, or images that belong together, with the fault.

    Args:
        ids: of the samples.
        score: certainty; larger is more certain.
        said: a short description of what was found.
        suggested: another label that is more probable, or None.
    """

    ids: tuple[str, ...]
    score: float = 1.0
    said: str = ""
    suggested: str | None = None
    key: str = ""  # hash of the kind and of the images' bytes, which is equal for the same case in another copy of the data


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Args:
        kind: a name that is stable between releases, such as ``near_duplicates``.
        count: number of cases.
        evidence: what was measured, as a sentence.
        advice: what to do.
        cases: the most certain first.
    """

    kind: str
    severity: Severity
    title: str
    count: int
    evidence: str
    advice: str
    cases: tuple[Case, ...] = ()
    fix: Fix = "none"
    acknowledged: int = 0  # cases that a person has looked at and accepted; they are not among `cases`

    def to_dict(self, most: int | None = None) -> dict[str, Any]:
        """Return the finding as JSON values, with at most `most` of its cases."""
        return asdict(replace(self, cases=self.cases[:most]))


@dataclass(frozen=True)
class Examination:
    """All findings about one revision of a dataset, most severe first."""

    revision: str
    n_images: int
    classes: tuple[str, ...]
    findings: tuple[Finding, ...]
    backbone: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    confidence: tuple[float, ...] = ()  # in the label of each sample, in their order, by a head that has not seen it

    def to_dict(self, most: int | None = None) -> dict[str, Any]:
        """Return all findings as JSON values, with at most `most` cases of each."""
        values = asdict(replace(self, findings=(), confidence=self.confidence if most is None else ()))
        return {**values, "findings": [finding.to_dict(most) for finding in self.findings]}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Examination:
        """Return the inverse of `to_dict`, also for values that were read from JSON."""
        findings = []
        for one in given["findings"]:
            cases = tuple(Case(**{**case, "ids": tuple(case["ids"])}) for case in one["cases"])
            findings.append(Finding(**{**one, "cases": cases}))
        tuples = {"classes": tuple(given["classes"]), "findings": tuple(findings), "confidence": tuple(given["confidence"])}
        return cls(**{**given, **tuples})

    @property
    def summary(self) -> str:
        """The numbers of findings as a sentence."""
        counts = Counter[str](one.severity for one in self.findings if one.count)
        said = [plural(counts[name], name) for name in get_args(Severity) if counts[name]]
        return f"Found in {plural(self.n_images, 'image')}: {', '.join(said) or 'nothing'}."

    def of(self, *kinds: str) -> Finding | None:
        """Return the first finding of one of these kinds, if there is one."""
        return next((finding for finding in self.findings if finding.kind in kinds), None)


_IN_WARNINGS = {
    "conflicting_labels": r"in more than one class \(",
    "leaks": r"with the same bytes as a",
    "missing_in_split": r"^(val|test): no images of",
}  # patterns of the warnings of `finetune.data` with the same meaning


def not_in(examination: Examination, warnings: Sequence[str]) -> list[str]:
    """Return the warnings about data that no finding of the examination repeats."""
    patterns = [
        re.escape(f"{one.title}:") if one.kind not in _IN_WARNINGS else _IN_WARNINGS[one.kind] for one in examination.findings
    ]
    return [warning for warning in warnings if not any(re.search(pattern, warning) for pattern in patterns)]


def case_key(kind: str, digests: Sequence[str]) -> str:
    """Return the key of a case: 12 hexadecimal digits over its kind and the sha256 of its images."""
    return hashlib.sha256(" ".join([kind, *sorted(digests)]).encode()).hexdigest()[:12]
