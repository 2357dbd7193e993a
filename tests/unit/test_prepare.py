"""What is told before training, and how soon."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from folders import write_classes

from finetune.data.check import Scanned
from finetune.data.dataset import Dataset
from finetune.errors import InvalidInput, UnknownBackbone
from finetune.progress import Progress
from finetune.runs import prepare as module
from finetune.runs.prepare import prepare
from finetune.runs.shared import Shared
from finetune.spec import parse_spec
from finetune.storage.workspace import Workspace


def shared(home: Path) -> Shared:
    return Shared.of(Workspace.at(home))


def test_a_wrong_folder_and_a_wrong_model_are_told_in_one_error(tmp_path: Path) -> None:
    spec = parse_spec({"training_file": str(tmp_path / "nowhere"), "model": "resnet5"})
    with pytest.raises(InvalidInput) as caught:
        prepare(spec, shared(tmp_path / "home"))
    told = " ".join(problem.message for problem in caught.value.problems)
    assert "no such folder" in told
    assert "timm has no architecture 'resnet5'" in told


def test_a_wrong_model_is_told_without_waiting_for_every_file_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = []

    def read_for_ever(dataset: Dataset, *, progress: Any, **_: Any) -> Scanned:
        for number in itertools.count():
            try:
                progress(Progress("preparing", number, 0, "images"))
            except BaseException as asked_to_stop:
                given_up.append(asked_to_stop)
                raise
        raise AssertionError

    monkeypatch.setattr(module, "scan", read_for_ever)
    root = write_classes(tmp_path / "photos", {"a": 2, "b": 2})
    with pytest.raises(UnknownBackbone):
        prepare(parse_spec({"training_file": str(root), "model": "resnet5"}), shared(tmp_path / "home"))
    assert len(given_up) == 1
