"""What `finetune check` says a run will take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import shared_at, tiny_spec, write_stripes

from finetune.runs.estimate import Estimate, estimate, together
from finetune.runs.prepare import prepare
from finetune.training.machine import Timing, measure

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_twice_the_epochs_take_longer_and_a_probe_keeps_only_pooled_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Sequence[Timing]] = []

    def once(*given: Any) -> Sequence[Timing]:  # a busy machine takes more or less time for the same step
        measured.append(measured[0] if measured else measure(*given))
        return measured[0]

    monkeypatch.setattr("finetune.runs.estimate.measure", once)
    pictures, shared = write_stripes(tmp_path, 15), shared_at(tmp_path / "home")

    def of(**given: object) -> Estimate:
        return estimate(prepare(tiny_spec(pictures, data={"test_fraction": 0}, **given), shared), shared)

    probe = of(hyperparameters={"views": 1})
    short = of(method={"type": "full", "warm_head": False}, hyperparameters={"n_epochs": 100})
    long = of(method={"type": "full", "warm_head": False}, hyperparameters={"n_epochs": 10_000})
    n_features = prepare(tiny_spec(pictures), shared).resolved.backbone.n_features
    assert probe.cache_bytes == 15 * (n_features * 4 + 32), "float32 rows and their keys"
    assert long.seconds == pytest.approx(100 * short.seconds)
    assert short.seconds > 0
    assert short.cache_bytes == 0
    assert "no features are cached" in short.prefix
    assert long.memory_bytes > 0


def test_runs_that_follow_one_another_add_up_in_time_and_not_in_room() -> None:
    first, second = Estimate(10.0, 5e9, 100.0, "a"), Estimate(20.0, 3e9, 300.0, "a")
    assert together([first, second]) == Estimate(30.0, 5e9, 300.0, "a")
