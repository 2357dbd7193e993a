"""docs/mlflow.md is executed: its Python works on a comparison as `finetune compare` leaves it in MLflow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import mlflow.onnx  # what the page uses, imported where warnings of imports do not count
import mlflow.pyfunc
import pytest
from run_folders import registered_run, whole_comparison
from tiny_bundle import CLASSES, self_test_files

from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.sync import sync_run
from finetune.tracking.tracker import Choice

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mlflow.md"


@pytest.fixture
def workspace(mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A workspace ``.finetune`` in the current folder; what the page tells MLflow is forgotten afterwards."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    found = Workspace.at(tmp_path / ".finetune")
    found.root.mkdir()
    found.mlflow_database.write_bytes(mlflow_database.read_bytes())
    yield found
    mlflow.set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def test_the_python_of_the_page_works_from_top_to_bottom(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison, run = RunDir(workspace.runs / "flowers-comparison"), RunDir(workspace.runs / "flowers-full")
    whole_comparison(comparison, {"linear_probe": 0.75, "full": 0.875}, seeds=2)
    registered_run(run, workspace)
    for one in (comparison, run):
        assert sync_run(one, Choice("mlflow"), workspace).reason == ""
    (tmp_path / "some.jpg").write_bytes(self_test_files()[1])
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    arms = names["arms"]
    assert arms.runs.to_dict() == {"full": 2, "linear-probe": 2}
    assert arms.top1.to_dict() == pytest.approx({"full": 0.88, "linear-probe": 0.755})
    assert arms.n.to_dict() == {"full": 14.0, "linear-probe": 14.0}
    assert {"params.method", "params.trains", "params.seed"} <= set(names["differing"])
    assert names["course"] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert names["answers"].label[0] in CLASSES
    assert len(names["answers"].predictions[0]) == 5
    assert names["network"].graph.input[0].name == "images"
    assert "full is better than linear_probe by 10 points." in capsys.readouterr().out
