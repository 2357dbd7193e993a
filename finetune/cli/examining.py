"""How an examination of data looks in a terminal, and how all that is wrong with data is told at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape

from finetune.cli.terminal import shortened, table
from finetune.data.check import check_images
from finetune.data.index import IndexRefused
from finetune.errors import DataError, Problem
from finetune.messages import natural_list, plural, printable
from finetune.progress_bars import console

if TYPE_CHECKING:
    from finetune.doctor.finding import Finding
    from finetune.progress import ProgressCallback
    from finetune.runs.shared import Shared
    from finetune.studies.examination import Examined

SHOWN_CASES = 3
_STYLES = {"problem": "red", "doubt": "yellow", "note": "cyan"}


@contextmanager
def data_problems(shared: Shared, progress: ProgressCallback) -> Iterator[None]:
    """Where data is refused for how it lies, add the files in it that cannot be read, so that all is told at once.

    Raises:
        DataError: everything that is wrong with the data.
    """
    try:
        yield
    except IndexRefused as error:
        notes = shared.store.folder("notes")
        checked = check_images(error.listed, max_bad_fraction=1.0, may_empty=True, progress=progress, memory=notes)
        known = {problem.where for problem in error.problems}
        bad = [Problem(printable(one.where), one.reason) for one in checked.bad if one.where not in known]
        raise DataError(error.message, [*error.problems, *bad]) from None


def show_examination(found: Examined) -> None:
    """Print the findings, the worst first, with a few cases of each."""
    findings = found.examination.findings
    rows = [[one.severity, one.title, one.count] for one in findings if one.count]
    table("Examination", ["", "what", "cases"], rows)
    if not rows:
        console.print("Nothing was found.\n")
    for finding in findings:
        if finding.count and finding.severity != "note":
            _show_cases(finding)
    n_accepted = sum(finding.acknowledged for finding in findings)
    if n_accepted:
        console.print(f"{plural(n_accepted, 'case')} acknowledged before, not shown", markup=False)
    console.print(f"page      {shortened(found.page)}" if found.page else "", markup=False, soft_wrap=True)
    if found.manifest is not None:
        out, grouped, suggested = found.changes
        said = f"{out:,} left out, {grouped:,} in groups of copies, {suggested:,} with another label suggested"
        console.print(f"manifest  {shortened(found.manifest)}: {said}", markup=False, soft_wrap=True)
        console.print(f"train     add --set data.manifest={shortened(found.manifest)}", markup=False, soft_wrap=True)
    elif any(finding.fix != "none" for finding in findings):
        console.print("fix       --fix corrected.csv writes a manifest; no image is touched", markup=False, soft_wrap=True)


def _show_cases(finding: Finding) -> None:
    console.print(f"[{_STYLES[finding.severity]}]{finding.severity}[/] {escape(finding.title)}: {escape(finding.evidence)}")
    shown = [case for case in finding.cases if case.ids or finding.kind == "shortcuts"][:SHOWN_CASES]
    for case in shown:
        names = natural_list([printable(one) for one in case.ids], 3)
        rather = f", rather {case.suggested}" if case.suggested else ""
        console.print(f"    {': '.join(filter(None, (names, case.said)))}{rather}", markup=False)
    if shown and finding.count > len(shown):
        console.print(f"    and {finding.count - len(shown):,} more", markup=False)
    console.print()
