"""What a training is foretold to take: sums that follow the recipe, and speeds that survive being written down."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import SpecError
from finetune.model.facts import StageFacts
from finetune.runs import known_speeds
from finetune.runs.forecast import Forecast, Images, Speeds, forecast, stages_of
from finetune.runs.known_speeds import find_speeds, measured_speeds, measurement_request
from finetune.runs.speeds import measure_speeds
from finetune.spec import parse_spec
from finetune.storage.workspace import Workspace
from finetune.training.compute import Compute

SPEEDS = Speeds(
    backbone="made_up",
    stages=tuple(StageFacts(index, f"blocks.{index}", 1000 * (index + 1), (8, 7, 7)) for index in range(6)),
    n_parameters=21_000,
    has_batch_norm=True,
    resizable=True,
    input_size_px=(224, 224),
    device="cpu",
    threads=1,
    start_seconds=3.0,
    decode_seconds=0.001,
    decode_seconds_per_megabyte=0.01,
    feature_seconds=0.01,
    prefix_shares={0: 0.0, 4: 0.8, 5: 0.9, 6: 1.0},
    step_seconds={0: 0.05, 4: 0.01, 5: 0.005, 6: 0.0},
)
FEW, MANY = Images(150, 4, 100_000), Images(1500, 4, 100_000)


def foretold(method: Any, images: Images = FEW, speeds: Speeds = SPEEDS, **sections: Any) -> Forecast:
    return forecast(parse_spec({"training_file": "photos", "method": method, **sections}), speeds, images)


def test_a_forecast_is_a_range_around_its_middle() -> None:
    for method in ("linear_probe", "partial", "full", "gradual", "auto"):
        found = foretold(method)
        assert 0 < found.low < found.about < found.high


def test_what_trains_more_of_more_images_takes_longer() -> None:
    quick, better, full = (foretold(method).about for method in ("linear_probe", {"type": "partial", "stages": 2}, "full"))
    assert quick < better < full
    assert foretold("linear_probe", MANY).about > quick
    assert foretold("full", MANY).about > full
    assert foretold("full", hyperparameters={"n_epochs": 1}).about < full
    assert foretold("linear_probe", replace(FEW, mean_bytes=5e6)).about > quick
    assert foretold("linear_probe", data={"folds": 5}).about == pytest.approx(quick, rel=0.5)  # the features are computed once
    assert foretold("full", data={"folds": 5}).about > 3 * full


def test_auto_takes_at_least_its_first_two_ways_and_at_most_all_three() -> None:
    quick, partial, full, auto = (foretold(method) for method in ("linear_probe", "partial", "full", "auto"))
    assert quick.low < auto.low
    assert auto.high > full.high
    assert auto.high < (quick + partial + full).high


def test_between_two_measured_depths_lies_what_is_between_them() -> None:
    assert SPEEDS.step(2) == pytest.approx(0.03)
    assert SPEEDS.prefix_share(2) == pytest.approx(0.4)
    assert replace(SPEEDS, threads=4).step(0) < SPEEDS.step(0)


def test_the_stages_of_a_method_are_those_that_it_trains_or_tries() -> None:
    def of(method: Any) -> tuple[list[int], list[int]]:
        trains, tried = stages_of(parse_spec({"training_file": "photos", "method": method}).method, SPEEDS)
        return list(trains), list(tried)

    assert of("linear_probe") == ([], [])
    assert of({"type": "partial", "stages": 2}) == ([4, 5], [])
    assert of("full") == ([0, 1, 2, 3, 4, 5], [])
    assert of("auto") == ([], [0, 1, 2, 3, 4, 5])
    with pytest.raises(SpecError, match="at most 6"):
        foretold({"type": "partial", "stages": 7})


def test_speeds_are_the_same_after_a_trip_through_json() -> None:
    assert Speeds.from_dict(json.loads(json.dumps(SPEEDS.to_dict()))) == SPEEDS


@pytest.mark.longer
def test_a_network_is_measured_at_a_few_depths(tmp_path: Path) -> None:
    speeds = measure_speeds("test_resnet", 64, Compute("cpu", "auto", 1), tmp_path, time.process_time())
    n_stages = len(speeds.stages)
    assert speeds.input_size_px == (64, 64)
    assert sorted(speeds.step_seconds) == sorted(speeds.prefix_shares) == [0, n_stages - 2, n_stages - 1, n_stages]
    assert min(seconds for depth, seconds in speeds.step_seconds.items() if depth < n_stages) > 0
    assert speeds.feature_seconds > 0
    assert speeds.decode_seconds > 0
    assert forecast(parse_spec({"training_file": "photos"}), speeds, FEW).about > 0


def test_a_measurement_is_kept_in_the_workspace_where_the_server_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.at(tmp_path)
    question = measurement_request(parse_spec({"training_file": "photos", "compute": {"threads": 2}}), "made_up")
    assert question == {"backbone": "made_up", "input_size_px": None, "device": "auto", "threads": 2}
    for failed in (None, {"problem": "no such backbone"}):
        monkeypatch.setattr(known_speeds, "measure_in_child", lambda given, failed=failed: failed)
        assert measured_speeds(workspace, question) is None
    monkeypatch.setattr(known_speeds, "measure_in_child", lambda given: {"speeds": json.loads(json.dumps(SPEEDS.to_dict()))})
    assert measured_speeds(workspace, question) == SPEEDS
    monkeypatch.setattr(known_speeds, "measure_in_child", lambda given: pytest.fail("measured again"))
    assert measured_speeds(workspace, question) == find_speeds(workspace, question) == SPEEDS
