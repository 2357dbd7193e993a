"""Which jobs a worker can carry out with what is installed."""

from __future__ import annotations

import importlib.util

import pytest
from click.testing import CliRunner

from finetune.cli import cli
from finetune.jobs.kinds import KINDS, runnable_kinds


def test_without_torch_a_worker_answers_batch_predictions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(runnable_kinds()) == set(KINDS)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert runnable_kinds() == ("batch",)


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    refused = CliRunner().invoke(cli, ["worker", "--kinds", "batch,trainning"])
    assert refused.exit_code == 2
    assert "expected one or more of training, comparison, batch, check" in refused.output
