"""What the first argument of `train` and `compare` is: a request in YAML or JSON, or data, which may be JSON too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from finetune.cli import cli
from finetune.cli.training import is_spec_file
from finetune.errors import InvalidInput


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("job.yaml", "training_file: photos", True),
        ("job.YML", "", True),
        ("job.json", {"training_file": "photos", "method": "full"}, True),
        ("coco.json", {"images": [], "annotations": [], "categories": []}, False),
        ("label-studio.json", [{"data": {"image": "a.jpg"}}], False),
        ("torn.json", "{", False),
        ("photos.csv", "path,label", False),
    ],
)
def test_requests_are_told_from_data(tmp_path: Path, name: str, content: Any, expected: bool) -> None:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert is_spec_file(path) is expected


def test_what_does_not_exist_is_data(tmp_path: Path) -> None:
    assert not is_spec_file(tmp_path / "none.json")


def test_train_reads_a_request_in_json(tmp_path: Path) -> None:
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps({"training_file": str(tmp_path / "nowhere"), "method": "linear_probe"}))
    with pytest.raises(InvalidInput, match="nowhere") as refused:
        CliRunner().invoke(cli, ["check", str(spec)], catch_exceptions=False)
    assert "job.json" not in str(refused.value)
