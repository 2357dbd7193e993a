"""The parts of a diagnosis: findings with their evidence, checks that passed, and checks that could not be made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from finetune.evaluation.diagnose.records import RunRecords

Severity = Literal["problem", "note"]
SURE, LIKELY = 0.9, 0.7  # confidence from which a finding is called sure, or likely


@dataclass(frozen=True)
class Evidence:
    """One figure that supports a finding, and its expected value in a healthy run."""

    what: str
    value: str
    expected: str = ""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run.

    Args:
        code: stable, for programs.
        severity: a problem lowers quality or falsifies a metric; a note does neither, but the user should know it.
        confidence: 0.5 if the evidence just reaches its threshold, approaching 1 the further it exceeds it; see `confidence`.
        caused_by: the code of another finding that explains this one.
    """

    code: str
    title: str
    severity: Severity
    confidence: float
    sentence: str
    evidence: tuple[Evidence, ...]
    advice: tuple[str, ...]
    source: str
    caused_by: str | None = None

    @property
    def certainty(self) -> str:
        """The confidence as a word: sure, likely or possible."""
        return "sure" if self.confidence >= SURE else "likely" if self.confidence >= LIKELY else "possible"


@dataclass(frozen=True)
class Clear:
    """A check that found nothing; `figure` is the measured value as text, if there is one."""

    code: str
    title: str
    figure: str = ""


@dataclass(frozen=True)
class NotChecked:
    """A check that could not be made, and why."""

    code: str
    title: str
    reason: str


CheckOutcome = Finding | Clear | NotChecked


class Check(Protocol):
    """A test for one thing that may be wrong with a run. Stateless: a pure function of the records."""

    @property
    def code(self) -> str:
        """The code of its findings, and the name of its module."""
        ...

    @property
    def title(self) -> str:
        """The name of the finding, for display."""
        ...

    @property
    def explains(self) -> frozenset[str]:
        """Codes of the findings that this one causes if both are made."""
        ...

    def check(self, records: RunRecords) -> CheckOutcome:
        """Return the finding, or that the check passed, or why it could not be made."""
        ...


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """The result of all checks on one run: ``diagnosis.json``, the same document on the command line and over HTTP.

    `findings` are sorted by importance: problems before notes, causes before their consequences, higher confidence first.
    """

    run: str
    against: str | None
    findings: tuple[Finding, ...]
    clear: tuple[Clear, ...]
    not_checked: tuple[NotChecked, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are problems, not notes."""
        return tuple(finding for finding in self.findings if finding.severity == "problem")

    @property
    def sentence(self) -> str:
        """The whole diagnosis in one sentence."""
        causes = [finding for finding in self.problems if finding.caused_by is None]
        n_looked_at = len(self.clear) + len(self.findings)
        if not causes:
            return f"nothing is wrong with this run, as far as its records tell ({n_looked_at} checks made)"
        first, more = causes[0], len(self.problems) - 1
        rest = "" if not more else f"; {more} more finding{'s' if more > 1 else ''}"
        return f"{first.title.lower()} ({first.certainty}): {first.sentence}{rest}"

    def finding(self, code: str) -> Finding | None:
        """Return the finding with this code, or None if it was not made."""
        return next((finding for finding in self.findings if finding.code == code), None)

    def __repr__(self) -> str:
        return f"<diagnosis of {self.run}: {self.sentence}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``diagnosis.json``."""
        return {
            "object": "diagnosis",
            "schema_version": 1,
            "run": self.run,
            "against": self.against,
            "sentence": self.sentence,
            "findings": [
                {
                    **asdict(finding),
                    "certainty": finding.certainty,
                    "evidence": [asdict(evidence) for evidence in finding.evidence],
                    "advice": list(finding.advice),
                }
                for finding in self.findings
            ],
            "clear": [asdict(one) for one in self.clear],
            "not_checked": [asdict(one) for one in self.not_checked],
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Diagnosis:
        """Return the diagnosis that `to_dict` was called on. Accepts lists in place of tuples, as JSON holds them."""
        return cls(
            run=given["run"],
            against=given["against"],
            findings=tuple(_finding(one) for one in given["findings"]),
            clear=tuple(Clear(**one) for one in given["clear"]),
            not_checked=tuple(NotChecked(**one) for one in given["not_checked"]),
        )


def _finding(given: Mapping[str, Any]) -> Finding:
    values = {key: value for key, value in given.items() if key != "certainty"}
    evidence = tuple(Evidence(**one) for one in given["evidence"])
    return Finding(**{**values, "evidence": evidence, "advice": tuple(given["advice"])})


def confidence(strength: float) -> float:
    """Return the confidence of evidence that is `strength` times its threshold: 0.5 for 1, 0.9 for 9, at most 0.99."""
    if math.isinf(strength):
        return 0.99 if strength > 0 else 0.0
    return round(min(max(strength, 0.0) / (1.0 + max(strength, 0.0)), 0.99), 2)


def in_order(findings: Sequence[Finding], causes: Mapping[str, frozenset[str]]) -> tuple[Finding, ...]:
    """Return the findings with `caused_by` set, problems first, causes before their consequences.

    Args:
        causes: code -> codes of the findings that it explains.
    """
    present = [finding.code for finding in findings]
    named = [replace(one, caused_by=next((code for code in present if one.code in causes[code]), None)) for one in findings]
    return tuple(sorted(named, key=lambda one: (one.severity != "problem", one.caused_by is not None, -one.confidence)))
