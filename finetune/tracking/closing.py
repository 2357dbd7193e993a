"""``python -m finetune.tracking.closing < {run folder: status}``: close the MLflow runs of runs that have ended.

A process that was killed leaves its MLflow run RUNNING, and one that MLflow did not answer leaves some of it unsent. Workers,
which import no MLflow, start this one. Exit code 1: MLflow lacks something still; repeating costs nothing.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from finetune.storage.rundir import RunBusy, RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.record import Status, read_record
from finetune.tracking.tracker import replay

log = logging.getLogger(__name__)


def close(run: RunDir, home: Path, status: Status) -> bool:
    """Send what MLflow lacks of a run, and end it as `status` unless it said itself how it ended; whether MLflow has it all."""
    record = read_record(run)
    if record is None or (record.complete and record.status != "RUNNING"):
        return True
    try:
        with run.held():
            delivery = replay(run, home, status if record.status == "RUNNING" else None)
    except RunBusy:
        return False
    if not delivery.complete:
        log.warning("MLflow has not everything of %s: %s", run.root.name, delivery.reason)
    return delivery.complete


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    home = Workspace.from_environment().root
    statuses: dict[str, Status] = json.load(sys.stdin)
    done = [close(RunDir(Path(folder)), home, status) for folder, status in statuses.items()]
    sys.exit(0 if all(done) else 1)


if __name__ == "__main__":
    main()
