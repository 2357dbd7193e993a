"""Run and show examinations of data, and report all problems of refused data at once."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from finetune.cli.terminal import shortened
from finetune.doctor.finding import LISTED
from finetune.jobs.kinds import CHECK
from finetune.messages import natural_list, printable
from finetune.progress_bars import console

if TYPE_CHECKING:
    from finetune.doctor.finding import Finding
    from finetune.runs.shared import Shared
    from finetune.spec import JobSpec
    from finetune.studies.examination import Examined

SHOWN_CASES = 3
_STYLES = {"problem": "red", "doubt": "yellow", "note": "cyan"}


def carry_out(spec: JobSpec, run_dir: Path, shared: Shared) -> dict[str, Any]:
    """Examine the data of a request as a worker's process, in the folder `run_dir`; return a summary of the findings."""
    from finetune.jobs.lease import watch_lease_from_environment
    from finetune.progress import silent
    from finetune.runs.watch import Stopwatch, failures_recorded, recorded
    from finetune.storage.files import read_json, write_json
    from finetune.storage.rundir import RunDir
    from finetune.studies.examination import data_problems, examine_request

    watch_lease_from_environment()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = RunDir(run_dir.absolute())
    done = run.root / CHECK.result
    with run.create().held(), failures_recorded(run):
        if done.exists():
            return dict(read_json(done))
        progress = recorded(silent, run, Stopwatch(run))
        with data_problems(shared, progress):
            found = examine_request(spec, shared, progress, page=run.report)
        write_json(run.examination, found.examination.to_dict(LISTED))
        short = {"summary": found.examination.summary, "revision": found.examination.revision}
        write_json(done, short)
        return short


def show_examination(found: Examined) -> None:
    """Print the findings, worst first, with a few cases of each."""
    findings = found.examination.findings
    console.print(f"\n{found.examination.summary}\n", markup=False)
    for finding in findings:
        if finding.count and finding.severity != "note":
            _show_cases(finding)
    for finding in findings:
        if finding.count and finding.severity == "note":
            console.print(_words(finding))
    accepted = {finding.kind: finding.acknowledged for finding in findings if finding.acknowledged}
    if accepted:
        kinds = natural_list([f"{count:,} of {kind}" for kind, count in accepted.items()])
        console.print(
            f"acknowledged before, not shown: {kinds} (--reopen {next(iter(accepted))} reports them again)", markup=False
        )
    console.print(f"page      {shortened(found.page)}" if found.page else "", markup=False, soft_wrap=True)
    if found.manifest is not None:
        out, grouped, suggested = found.changes
        text = f"{out:,} left out, {grouped:,} in groups of copies, {suggested:,} with another label suggested"
        console.print(f"manifest  {shortened(found.manifest)}: {text}", markup=False, soft_wrap=True)
        console.print(f"train     add --set data.manifest={shortened(found.manifest)}", markup=False, soft_wrap=True)
    elif any(finding.fix != "none" or finding.kind == "label_errors" for finding in findings):
        console.print("fix       --fix corrected.csv writes a manifest; no image is touched", markup=False, soft_wrap=True)


def _words(finding: Finding) -> str:
    text = f"{finding.title}: {finding.evidence} {finding.advice}"
    return f"[{_STYLES[finding.severity]}]{finding.severity}[/] {escape(text)}"


def _show_cases(finding: Finding) -> None:
    console.print(_words(finding))
    shown = [case for case in finding.cases if case.ids or finding.kind == "shortcuts"][:SHOWN_CASES]
    for case in shown:
        names = natural_list([printable(one) for one in case.ids], 3)
        rather = f", rather {case.suggested}" if case.suggested and finding.fix == "relabel" else ""
        console.print(f"    {': '.join(filter(None, (names, case.said)))}{rather}", markup=False)
    if shown and finding.count > len(shown):
        console.print(f"    and {finding.count - len(shown):,} more", markup=False)
    console.print()
