"""Print a diagnosis in a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from rich.markup import escape

from finetune.evaluation.diagnose import Diagnosis, Finding
from finetune.messages import plural
from finetune.progress_bars import console

WIDTH = 78


def show_diagnosis(found: Diagnosis) -> None:
    """Print the findings with evidence and advice, then the checks that passed and those that could not be made."""
    console.print(f"[bold]{escape(found.run)}[/]" + (f", against {escape(found.against)}" if found.against else ""))
    if found.problems:
        console.print(_count(found), highlight=False)
    for finding in found.findings:
        _show_finding(found, finding)
    if not found.problems:
        console.print("\nNothing is wrong with this run, as far as its records tell.")
    if found.clear:
        console.print("\nChecks that found nothing")
        for one in found.clear:
            _paragraph(f"{one.title}: {one.figure}" if one.figure else one.title, "  [green]✓[/] ", "    ")
    if found.not_checked:
        console.print("\nNot looked at")
        for unknown in found.not_checked:
            _paragraph(f"{unknown.title}: {unknown.reason}", "  – ", "    ")


def _count(found: Diagnosis) -> str:
    n_causes = sum(finding.caused_by is None for finding in found.problems)
    n_following = len(found.problems) - n_causes
    return plural(n_causes, "problem") + (f", and {n_following} more that may follow from it" if n_following else "")


def _show_finding(found: Diagnosis, finding: Finding) -> None:
    colour = "red" if finding.severity == "problem" else "yellow"
    cause = found.finding(finding.caused_by) if finding.caused_by else None
    follows = f", follows from {cause.title.lower()}" if cause else ""
    console.print(f"\n[bold {colour}]{escape(finding.title)}[/] ({finding.certainty}{escape(follows)})")
    _paragraph(f"{finding.sentence[0].upper()}{finding.sentence[1:]}.", "  ", "  ")
    for evidence in finding.evidence:
        expected = f" (expected: {evidence.expected})" if evidence.expected else ""
        _paragraph(f"{evidence.what}: {evidence.value}{expected}", "  · ", "    ")
    if cause is None:
        for advice in finding.advice:
            _paragraph(advice, "  [bold]→[/] ", "    ")


def _paragraph(text: str, first: str, rest: str) -> None:
    """Print wrapped text with the prefix `first`, then `rest`; `first` may contain markup and is as wide as `rest`."""
    lines = textwrap.wrap(text, WIDTH - len(rest), break_long_words=False, break_on_hyphens=False) or [""]
    for number, line in enumerate(lines):
        console.print((first if number == 0 else rest) + escape(line), soft_wrap=True, highlight=False)
