"""What is wrong with a run, from its own records: `diagnose(folder)`.

Each finding is a module in `checks`; what they may look at is `RunRecords`. Torch-free and free of randomness: the same folder
gives the same diagnosis, on any machine that NumPy runs on.
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
    """Look for everything that `CHECKS` know in the records of one run.

    Args:
        against: a run of the same data to compare training errors with, shallower or with more of it frozen; by default the
            head that was solved on frozen features before the first step.

    Raises:
        NotFound: one of them is not the folder of a run.
    """
    reference = None if against is None else RunRecords.read(against)
    return diagnose_records(RunRecords.read(run, reference))


def diagnose_records(records: RunRecords) -> Diagnosis:
    """Return the diagnosis of a run whose records have been read."""
    verdicts = [check.look(records) for check in CHECKS]
    causes = {check.code: check.explains for check in CHECKS}
    return Diagnosis(
        run=records.run.name,
        against=None if records.against is None else records.against.run.name,
        findings=in_order([found for found in verdicts if isinstance(found, Finding)], causes),
        clear=tuple(found for found in verdicts if isinstance(found, Clear)),
        not_checked=tuple(found for found in verdicts if isinstance(found, NotChecked)),
    )


def write_diagnosis(run: RunDir) -> Diagnosis:
    """Diagnose a run at its end, write ``diagnosis.json`` and record what was found."""
    found = diagnose(run.root)
    write_json(run.diagnosis, found.to_dict())
    run.record(Diagnosed(found.sentence, [finding.code for finding in found.problems]))
    return found


def read_diagnosis(run: RunDir) -> Diagnosis | None:
    """Return what `write_diagnosis` wrote, if anything."""
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
