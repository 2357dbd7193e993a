"""The notebook of the documentation runs from top to bottom, and its results draw themselves."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "python.ipynb"


@pytest.mark.longer
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "what is committed holds no outputs"
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown_data = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    drawn = ["".join(data["text/html"]) for data in shown_data if "text/html" in data]
    for shown in ("top-1 accuracy", "much L2", "data:image/svg+xml", "data:image/jpeg"):
        assert any(shown in page for page in drawn), shown
