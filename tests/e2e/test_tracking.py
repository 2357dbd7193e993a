"""A real run from the Python door is in both trackers when it returns, and its model answers through MLflow."""

from __future__ import annotations

import functools
from pathlib import Path

import mlflow
import mlflow.pyfunc
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY, write_stripes

from finetune.api import train
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import read_state, tracked_as
from finetune.tracking.mlflow.connection import connect, destination_of
from finetune.tracking.process import followed


@pytest.mark.longer
@pytest.mark.timeout(600)
def test_a_run_is_tracked_from_its_beginning_to_its_registered_model(
    mlflow_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.api.followed", functools.partial(followed, wait_seconds=240.0))  # on a busy machine
    pictures = write_stripes(tmp_path, 60)
    run = train(
        pictures,
        method="partial",
        epochs=2,
        name="stripes",
        settings={**TINY, "export.register_model": "always"},
        workspace=mlflow_workspace,
        trackers=["mlflow", "tensorboard"],
        progress=False,
    )
    folder = RunDir(run.folder)
    for kind in ("mlflow", "tensorboard"):
        state = read_state(folder, kind)
        assert state is not None
        assert (state.complete, state.reason) == (True, ""), kind
    client = connect(destination_of(Workspace.at(mlflow_workspace)))
    stored = client.get_run(tracked_as(folder, "mlflow"))
    assert stored.info.status == "FINISHED"
    assert client.get_experiment(stored.info.experiment_id).name == "stripes"
    assert next(iter(stored.data.metrics)) == "test/top1"
    assert stored.data.metrics["test/top1"] == pytest.approx(run.metrics["test/top1"], abs=1e-6)
    assert stored.data.metrics["train_seconds"] == pytest.approx(run.cost["train_seconds"], rel=1e-5)
    assert stored.data.params["method"] == "partial"
    assert len(stored.data.params) <= 25
    assert "auto" not in stored.data.params.values()
    assert len(client.get_metric_history(stored.info.run_id, "train/val_top1")) >= 2
    events = EventAccumulator(str(folder.tracking / "tensorboard")).Reload()
    assert events.Scalars("final/test/top1")[-1].value == pytest.approx(run.metrics["test/top1"])
    image = next(pictures.glob("*/*.png"))
    (label,) = mlflow.pyfunc.load_model("models:/stripes@champion").predict(str(image)).label
    assert label == run.predict(image).label
