"""MLflow as a mirror of the run folder: what is in the folder gets there, now or later, and never at the cost of the run.

The caller says once what MLflow should know beyond files (params, dataset, model name); that is kept in ``mlflow.json`` in the
run folder. A background thread compares it, the journal ``metrics.jsonl`` and the result files with what MLflow has, and sends
the difference. One path therefore serves a live run, a run resumed after a kill, and `replay` of a run that MLflow missed. The
training loop only writes its journal and never waits.

Does not know what trains or serves. mlflow is imported inside `link` alone, in that thread.
"""

from finetune.tracking.record import RunRecord, Status, read_record
from finetune.tracking.server import Destination, UiCommand, destination, open_ui, run_url, ui_command
from finetune.tracking.tracker import Delivery, MlflowTracker, NoTracker, Tracker, open_run, replay

__all__ = [
    "Delivery", "Destination", "MlflowTracker", "NoTracker", "RunRecord", "Status", "Tracker", "UiCommand",
    "destination", "open_run", "open_ui", "read_record", "replay", "run_url", "ui_command",
]  # fmt: skip
