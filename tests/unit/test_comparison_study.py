"""A comparison as a study: which runs it asks for in which order, when it gives an arm up, and which runs it can pair."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import workspace_at

from finetune.comparison_spec import ComparisonSpec, load_request, parse_comparison, parse_request
from finetune.errors import InvalidInput, NotFound, SpecError
from finetune.evaluation import predictions as tables
from finetune.evaluation.predictions import Predictions
from finetune.runs.outcome import Outcome
from finetune.storage.rundir import RunDir
from finetune.studies.compare import compare_runs
from finetune.studies.compare.study import ArmsTimesSeeds

CLASSES = ("a", "b")


def spec_of(**given: Any) -> ComparisonSpec:
    return parse_comparison({"training_file": "photos", "methods": ["linear_probe", "full"], **given})


def answers(right: np.ndarray, split: str = "test", names: tuple[str, ...] | None = None) -> Predictions:
    """Answers to images 0, 1 … of class a; right where `right` says so."""
    ids = names if names is not None else tuple(str(number % 256) for number in range(len(right)))
    digests = np.zeros((len(right), 32), np.uint8)
    digests[:, 0] = [int(name) for name in ids]
    digests[:, 1] = 1
    logits = np.where(right[:, None], [2.0, 0.0], [0.0, 2.0]).astype(np.float32)
    return Predictions(split, "multiclass", CLASSES, ids, digests, np.zeros(len(right), np.int64), logits)


def outcome_of(run: RunDir, seconds: float = 10.0, method: str = "full") -> Outcome:
    cost = {"wall_seconds": seconds, "train_seconds": seconds, "trainable_parameters": 10.0}
    metrics = {"val/top1": 0.5, "test/top1": 0.5, "test/macro_f1": 0.5}
    return Outcome(run.root, method, method, "judged", metrics, cost, "done", CLASSES, 8, (), 0)


def finish(study: ArmsTimesSeeds, rights: Mapping[str, np.ndarray], seconds: Mapping[str, float]) -> dict[str, Outcome]:
    """Run the study with runs that answer as given, an arm each; return the outcomes in the order of the runs."""
    finished: dict[str, Outcome] = {}
    while children := study.next_children(finished):
        for child in children:
            arm = child.name.rpartition("-seed")[0]
            run = study.run.child(child.name).create()
            tables.write(run.predictions_of("test"), answers(rights[arm]))
            finished[child.name] = outcome_of(run, seconds[arm])
    return finished


def test_every_arm_has_a_first_run_before_any_has_a_second_and_runs_of_one_seed_may_go_side_by_side(tmp_path: Path) -> None:
    study = ArmsTimesSeeds(spec_of(seeds=2, seed=7), RunDir(tmp_path), "test")
    first, second = study.next_children({}), None
    assert [child.name for child in first] == ["linear-probe-seed0", "full-seed0"]
    assert [child.options.goal for child in first] == ["exported", "exported"], "for their size and latency"
    second = study.next_children({child.name: outcome_of(RunDir(tmp_path)) for child in first})
    assert [(child.name, child.spec.seed, child.options.goal) for child in second] == [
        ("linear-probe-seed1", 8, "judged"),
        ("full-seed1", 8, "judged"),
    ]
    assert study.n_children == 4


@pytest.mark.longer
def test_a_budget_stops_what_cannot_win_any_more_and_what_does_not_fit_and_says_so(tmp_path: Path) -> None:
    n = 400
    same, worse = np.arange(n) % 10 > 0, np.arange(n) % 3 > 0
    rights, seconds = {"linear-probe": worse, "full": same}, {"linear-probe": 1.0, "full": 10.0}
    beaten = ArmsTimesSeeds(spec_of(seeds=3, budget_seconds=1000.0), RunDir(tmp_path / "beaten"), "test")
    finished = finish(beaten, rights, seconds)
    assert list(finished) == ["linear-probe-seed0", "full-seed0", "full-seed1", "full-seed2"]
    assert [arm.note for arm in beaten.arm_runs(finished)] == [
        "stopped after 1 of 3 seeds: full is significantly better already",
        "",
    ]
    short = ArmsTimesSeeds(spec_of(seeds=3, budget_seconds=15.0), RunDir(tmp_path / "short"), "test")
    finished = finish(short, {"linear-probe": same, "full": same}, seconds)
    assert list(finished) == ["linear-probe-seed0", "full-seed0", "linear-probe-seed1", "linear-probe-seed2"]
    assert [arm.note for arm in short.arm_runs(finished)] == [
        "",
        "stopped after 1 of 3 seeds: another would exceed the budget of 15 s",
    ]


def test_an_arm_whose_first_run_a_budget_leaves_no_time_for_is_left_out(tmp_path: Path) -> None:
    study = ArmsTimesSeeds(spec_of(seeds=1, budget_seconds=5.0), RunDir(tmp_path), "test")
    right = np.ones(8, bool)
    finished = finish(study, {"linear-probe": right, "full": right}, {"linear-probe": 6.0, "full": 1.0})
    assert list(finished) == ["linear-probe-seed0"]
    assert study.given_up(study.spec.arms[1], finished) == "the budget of 5 s was spent before it could begin"


def finished_run(folder: Path, right: np.ndarray, *, seen: tuple[str, ...] = (), names: Any = None, **given: Any) -> Path:
    """A finished run that has `seen` images in training, beside the test images that it answers."""
    from finetune.spec import parse_spec

    run = RunDir(folder).create()
    table = answers(right, names=names)
    tables.write(run.predictions_of("test"), table)
    spec = parse_spec({"training_file": "photos", "method": "full", **given})
    run.spec.write_text(spec.to_yaml())
    digests = answers(np.ones(len(seen), bool), names=seen).digests()
    rows = [f"{name},a,train,{digest}" for name, digest in zip(seen, digests, strict=True)]
    run.split.write_text("\n".join(["path,label,split,sha256", *rows]) + "\n")
    outcome_of(run, method=spec.method.type).write(run)
    return folder


def test_runs_that_exist_are_paired_by_the_bytes_of_the_images_and_seen_ones_are_left_out_and_counted(tmp_path: Path) -> None:
    right = np.arange(20) % 4 > 0
    first = finished_run(tmp_path / "first", right, seen=("100", "101"))
    shuffled = tuple(map(str, [*range(19, 4, -1), 100, 200]))  # 0 to 4 are missing, 200 is nobody else's
    second = finished_run(tmp_path / "second", np.ones(17, bool), seen=("7",), names=shuffled, method="linear_probe")
    found = compare_runs([first, second], workspace_at(tmp_path / "home"))
    assert found.left_out == 1, "7: the other run has trained on it"
    assert found.arm("full").metrics["test/top1"].n == 14
    assert found.arm("full").metrics["test/top1"].value == pytest.approx(np.mean([right[i] for i in range(5, 20) if i != 7]))
    assert found.arm("linear_probe").metrics["test/top1"].value == 1.0
    assert found.report.exists()


def test_runs_that_differ_in_the_seed_alone_are_one_arm(tmp_path: Path) -> None:
    right = np.arange(20) % 4 > 0
    runs = [finished_run(tmp_path / f"full{seed}", right, seed=seed) for seed in (0, 1)]
    other = finished_run(tmp_path / "probe", right, method="linear_probe")
    found = compare_runs([*runs, other], workspace_at(tmp_path / "home"))
    assert {arm.name: len(arm.runs) for arm in found.arms} == {"full": 2, "linear_probe": 1}


def test_runs_that_cannot_be_compared_are_refused_with_the_reason(tmp_path: Path) -> None:
    right = np.ones(8, bool)
    first = finished_run(tmp_path / "first", right)
    apart = finished_run(tmp_path / "apart", right, names=tuple(map(str, range(50, 58))), method="linear_probe")
    workspace = workspace_at(tmp_path / "home")
    with pytest.raises(InvalidInput, match=r"share no image .*\(0 test images in common\).*data\.split_seed"):
        compare_runs([first, apart], workspace)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(NotFound, match="not the folder of a finished run"):
        compare_runs([first, tmp_path / "nothing"], workspace)
    untested = finished_run(tmp_path / "untested", right, method="linear_probe")
    RunDir(untested).predictions_of("test").unlink()
    with pytest.raises(InvalidInput, match="evaluated on no test images, and its weights were chosen on val"):
        compare_runs([first, untested], workspace)


def test_a_request_names_everything_that_is_wrong_with_it(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        parse_comparison({"training_file": "photos", "methods": ["probe", "full"], "seeds": 0, "hyperparameters": {"n_epoch": 3}})
    said = str(caught.value)
    assert "methods[0]: must be 'linear_probe', 'partial', 'full', 'gradual' or 'auto', given 'probe'" in said
    assert "seeds: must be greater than or equal to 1, given 0" in said
    assert "hyperparameters.n_epoch" in said
    with pytest.raises(SpecError, match="at least two arms"):
        spec_of(methods=["full"])
    with pytest.raises(SpecError, match=r"reads or splits the data differently"):
        spec_of(methods=[], arms=[{"name": "a"}, {"name": "b", "set": {"data.split_seed": 4}}])
    for key in ("training_file", "suffix", "metadata.team"):
        with pytest.raises(SpecError, match=rf"arms\[1\]\.set\.{key}: arm 'b': all arms share this"):
            spec_of(methods=[], arms=[{"name": "a"}, {"name": "b", "set": {key: "elsewhere"}}])
    with pytest.raises(SpecError, match=r"models\[1\]: arm 'r+': model\.backbone: must be"):
        spec_of(methods=[], models=["resnet18", 1001 * "r"])
    with pytest.raises(SpecError, match=r"runs: must be a list of at least 2, given \['one'\]"):
        parse_request({"runs": ["one"]})
    with pytest.raises(SpecError, match=r"seeds: unknown key"):
        parse_request({"runs": ["one", "two"], "seeds": 3})


def test_arms_are_methods_times_models_and_settings_beside_them(tmp_path: Path) -> None:
    request = tmp_path / "request.yaml"
    request.write_text("training_file: photos\nmethods: [linear_probe]\nmodels: [resnet18, resnet50]\n")
    spec = load_request(request, {"arms": [{"name": "light", "set": {"augmentation": "light"}}]}, ["seed=3"])
    assert isinstance(spec, ComparisonSpec)
    assert [arm.name for arm in spec.arms] == ["resnet18 linear_probe", "resnet50 linear_probe", "light"]
    assert [arm.spec.model.backbone for arm in spec.arms][:2] == ["resnet18", "resnet50"]
    assert spec.arms[2].spec.augmentation.policy == "light"
    assert {arm.spec.seed for arm in spec.arms} == {3}
    assert parse_comparison(spec.to_dict()) == spec
