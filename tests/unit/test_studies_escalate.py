"""Method auto goes deeper while that pays, keeps the best, and says why it stopped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finetune.train.auto import paired_gain, train_until_it_stops_paying
from finetune.train.methods import Compute, Context, Trained
from torch import nn

from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.train import auto

N = 200  # validation images


def right(count: int) -> np.ndarray:
    """The first `count` of N images are right."""
    return np.arange(N) < count


def test_the_standard_error_counts_only_images_that_one_of_the_two_gets_right():
    same_but_four = right(100).copy()
    same_but_four[[0, 1, 2]] = False
    same_but_four[150] = True
    gain = paired_gain(same_but_four, right(100))
    assert gain.gain == pytest.approx(-2 / N)
    differences = same_but_four.astype(float) - right(100)
    assert gain.standard_error == pytest.approx(differences.std() / np.sqrt(N))


def test_equal_answers_do_not_pay():
    assert not paired_gain(right(100), right(100)).pays


@pytest.mark.parametrize(
    ("counts", "tried", "kept"),
    [
        ({"linear_probe": 100, "partial": 101, "full": 180}, ["linear_probe", "partial"], "partial"),
        ({"linear_probe": 100, "partial": 90, "full": 180}, ["linear_probe", "partial"], "linear_probe"),
        ({"linear_probe": 100, "partial": 130, "full": 180}, ["linear_probe", "partial", "full"], "full"),
        ({"linear_probe": 100, "partial": 130, "full": 120}, ["linear_probe", "partial", "full"], "partial"),
    ],
)
def test_it_goes_deeper_while_that_pays_and_keeps_the_best(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counts: dict[str, int], tried: list[str], kept: str
):
    classifier = nn.Linear(1, 1)
    begun_with: list[float] = []
    done: list[str] = []

    def train(model: nn.Linear, recipe: Any, context: Context) -> Trained:
        begun_with.append(model.bias.item())
        with torch.no_grad():
            model.bias.fill_(counts[recipe.method])
        context.run.metric(1, {"val/top1": counts[recipe.method] / N})
        done.append(recipe.method)
        return Trained(f"did {recipe.method}", 1.0, 0, 0, {}, None, None, recipe)

    monkeypatch.setattr(auto, "train_classifier", train)
    monkeypatch.setattr(auto, "_correct", lambda model, *_: right(int(model.bias.item())))
    run = RunDir(tmp_path / "run").create()
    recipes = [SimpleNamespace(method=method) for method in counts]
    context = Context(None, None, run, Compute("cpu", "float32", 1), identity={}, store=Store(tmp_path))  # type: ignore[arg-type]
    trained = train_until_it_stops_paying(classifier, recipes, context)  # type: ignore[arg-type]

    assert done == tried
    assert len(set(begun_with)) == 1, "each candidate starts from the same weights"
    assert classifier.bias.item() == counts[kept]
    assert trained.summary.startswith(f"auto: did {kept}")
    assert trained.seconds == len(tried)
    assert [line["values"]["val/top1"] for line in read_lines(run.metrics)] == [counts[kept] / N]
    if tried != list(counts):
        assert "goes no deeper" in trained.summary
