"""Find out what is wrong with a run from the files in its folder: `diagnose(folder)`.

Each kind of finding is a module in `checks`; `RunRecords` is the data that they read. Torch-free and deterministic: the same
folder gives the same diagnosis on every machine.
"""

from __future__ import annotations

from pathlib import Path

from finetune.evaluation.diagnose.checks import CHECKS
from finetune.evaluation.diagnose.finding import Clear, Diagnosis, Evidence, Finding, NotChecked, in_order
from finetune.evaluation.diagnose.records import RunRecords
from finetune.events import Diagnosed
from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir


def diagnose(run: Path, against: Path | None = None) -> Diagnosis:
    """Apply all `CHECKS` to the records of one run.

    Args:
        against: a run on the same data, shallower or with more frozen stages, to compare training errors with; by default the
            head that was solved on frozen features before the first step.

    Raises:
        NotFound: `run` or `against` is not the folder of a run.
    """
    reference = None if against is None else RunRecords.read(against)
    return diagnose_records(RunRecords.read(run, reference))


def diagnose_records(records: RunRecords) -> Diagnosis:
    """Return the diagnosis of a run whose records have been read."""
    results = [check.check(records) for check in CHECKS]
    causes = {check.code: check.explains for check in CHECKS}
    return Diagnosis(
        run=records.run.name,
        against=None if records.against is None else records.against.run.name,
        findings=in_order([found for found in results if isinstance(found, Finding)], causes),
        clear=tuple(found for found in results if isinstance(found, Clear)),
        not_checked=tuple(found for found in results if isinstance(found, NotChecked)),
    )


def write_diagnosis(run: RunDir, study: RunDir | None = None) -> Diagnosis:
    """Diagnose a finished run, write ``diagnosis.json`` and record the findings as an event.

    Args:
        study: the study that keeps the run, whose records are diagnosed with those of the run.
    """
    found = diagnose((study or run).root)
    write_json(run.diagnosis, found.to_dict())
    run.record(Diagnosed(found.sentence, [finding.code for finding in found.problems]))
    return found


def read_diagnosis(run: RunDir) -> Diagnosis | None:
    """Return the diagnosis that `write_diagnosis` wrote, or None if there is none."""
    return Diagnosis.from_dict(read_json(run.diagnosis)) if run.diagnosis.exists() else None


__all__ = [
    "Clear",
    "Diagnosis",
    "Evidence",
    "Finding",
    "NotChecked",
    "RunRecords",
    "diagnose",
    "diagnose_records",
    "read_diagnosis",
    "write_diagnosis",
]
