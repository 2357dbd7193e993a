"""A comparison from a folder of pictures to a verdict: same images, same document at every door, the same bits after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from serving import live_server
from tiny_runs import TINY, shared_at, weights_of, workspace_at, write_stripes

import finetune
from finetune.bundle.registry import Registry
from finetune.cli import cli
from finetune.client import Client
from finetune.comparison_spec import ComparisonSpec, parse_comparison
from finetune.errors import InvalidInput
from finetune.evaluation import predictions as tables
from finetune.progress import Progress
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir
from finetune.studies.compare import compare, finished_before
from finetune.studies.compare.result import Comparison

CRASHING = Path(__file__).parents[1] / "crashing"
STEPPED = {"type": "full", "warm_head": False, "bn": "train"}
REQUEST: dict[str, Any] = {
    **TINY,
    "suffix": "stripes",
    "arms": [{"name": "frozen", "set": {"method": "linear_probe"}}, {"name": "full", "set": {"method": STEPPED}}],
    "seeds": 2,
    "hyperparameters": {"n_epochs": 2, "batch_size": 4},
    "data": {"test_fraction": 0.4},
    "export": {"register_model": "always"},
}
RUNS = ("frozen-seed0", "frozen-seed1", "full-seed0", "full-seed1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("pictures"), 36)


def spec_of(pictures: Path, **given: Any) -> ComparisonSpec:
    return parse_comparison({**REQUEST, "training_file": str(pictures), **given})


@pytest.fixture(scope="module")
def compared(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path, list[Progress]]:
    home, seen = tmp_path_factory.mktemp("home"), []
    return compare(spec_of(pictures), shared_at(home), seen.append, home / "runs" / "whole"), home, seen


def bits_of(run: RunDir, names: Sequence[str] = RUNS) -> dict[str, bytes]:
    """Return what the comparison's statistics are computed from."""
    return {name: run.child(name).predictions_of("test").read_bytes() for name in names}


def test_every_arm_and_seed_is_a_run_of_its_own_judged_on_the_same_images(compared: Any) -> None:
    found, home, seen = compared
    run = RunDir(home / "runs" / "whole")
    answers = [tables.read(run.child(name).predictions_of("test")) for name in RUNS]
    assert len({table.ids for table in answers}) == 1
    assert len(answers[0]) == 18
    assert not np.array_equal(answers[2].logits, answers[3].logits), "another seed is another training"
    seeds = [read_json(run.child(name).resolved)["spec"]["seed"] for name in RUNS]
    assert seeds == [0, 1, 0, 1]
    for arm, names in zip(found.arms, (RUNS[:2], RUNS[2:]), strict=True):
        values = [read_json(run.child(name).outcome)["metrics"]["test/top1"] for name in names]
        figure = arm.metrics["test/top1"]
        assert (figure.value, figure.n) == (pytest.approx(np.mean(values)), 18)
        assert figure.sd == pytest.approx(np.std(values, ddof=1))
        assert figure.low <= figure.value <= figure.high
    assert [update.done for update in seen if update.phase == "runs"] == [0, 1, 2, 2, 3, 4]
    assert any(update.message.startswith("full, seed 2 of 2: ") for update in seen)


def test_the_document_says_what_was_found_and_can_be_read_again(compared: Any, pictures: Path) -> None:
    found, home, _ = compared
    run = RunDir(home / "runs" / "whole")
    document = read_json(run.comparison)
    assert document == json.loads(json.dumps(found.to_dict()))
    assert document["object"] == "comparison"
    assert {arm["name"]: len(arm["runs"]) for arm in document["arms"]} == {"frozen": 2, "full": 2}
    assert {"train_seconds", "latency_seconds", "bundle_bytes", "trainable_parameters"} <= set(document["arms"][0]["cost"])
    frozen = next(arm for arm in document["arms"] if arm["name"] == "frozen")["cost"]
    assert 0 < frozen["feature_seconds"] < frozen["train_seconds"], "the second seed found them, and they count all the same"
    (headline,) = [pair for pair in document["pairs"] if pair["p_value"] is not None]
    assert (headline["a"], headline["b"], headline["metric"]) == ("frozen", "full", "test/top1")
    assert headline["low"] <= headline["difference"] <= headline["high"]
    assert headline["smallest_detectable"] > 0
    assert {pair["metric"] for pair in document["pairs"]} >= {"test/top1", "test/macro_f1", "test/loss", "test/ece"}
    assert document["verdict"]["outcome"] in ("better", "equivalent", "undecided")
    page = run.report.read_text(encoding="utf-8")
    assert document["verdict"]["sentence"].split(".")[0] in page
    again = compare(spec_of(pictures), shared_at(home), run_dir=run.root)
    assert again.to_dict() == found.to_dict(), "a finished comparison is not done again"


def test_the_chosen_arms_run_that_val_likes_best_is_registered_and_no_other(compared: Any) -> None:
    found, home, _ = compared
    (version,) = Registry(home / "models").versions("stripes")
    assert found.registered == f"stripes@{version.version}"
    kept = RunDir(home / "runs" / "whole").child(read_json(RunDir(home / "runs" / "whole").study)["kept"])
    assert kept.name.startswith(found.verdict.choose)
    assert weights_of(kept.bundle) == weights_of(Registry(home / "models").locate(found.registered))
    answers = Registry(home / "models").predictions_of(version)
    assert answers.read_bytes() == kept.predictions_of("test").read_bytes(), "a later version is compared with these"


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


@pytest.mark.parametrize("point", ["between two runs", "amid a run", "before the verdict"])
@pytest.mark.longer
def test_a_comparison_that_is_killed_goes_on_there_and_ends_with_the_same_bits(
    point: str, compared: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "runs" / "killed")

    def dying(update: Progress) -> None:
        finished = {"between two runs": 1, "amid a run": 3, "before the verdict": 4}[point]
        if point == "amid a run":
            if update.message.startswith("full, seed 2") and update.phase == "training" and update.done > 3:
                raise Killed
        elif update.phase == "runs" and update.done == finished:
            raise Killed

    with pytest.raises(Killed):
        compare(spec_of(pictures), shared_at(tmp_path), dying, run.root)
    done = {name: run.child(name).outcome.stat().st_mtime_ns for name in RUNS if run.child(name).outcome.exists()}
    assert not run.comparison.exists()
    found = compare(spec_of(pictures), shared_at(tmp_path), run_dir=run.root)
    exported = {name for name in done if read_json(run.child(name).outcome)["goal"] == "registered"}
    assert all(run.child(name).outcome.stat().st_mtime_ns == done[name] for name in set(done) - exported), "not done again"
    assert bits_of(run) == bits_of(RunDir(compared[1] / "runs" / "whole"))
    assert [pair.p_value for pair in found.pairs] == [pair.p_value for pair in compared[0].pairs]


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(
    "point", ["before replace study.json 2", "before replace step-00000006.pt", "after replace comparison.json"]
)
def test_a_killed_process_goes_on_there_also_with_runs_side_by_side(
    point: str, slots: int, compared: Any, pictures: Path, tmp_path: Path
) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps(spec_of(pictures).to_dict()))
    command = [sys.executable, "-m", "finetune", "compare", str(request.rename(request.with_suffix(".yaml")))]
    command += ["--run-dir", str(tmp_path / "home/runs/killed"), "--slots", str(slots), "--json"]
    variables = {**os.environ, "FINETUNE_HOME": str(tmp_path / "home")}
    crash = {"PYTHONPATH": f"{CRASHING}:{Path(finetune.__file__).parents[1]}", "CRASH_AT": point}
    died = subprocess.run(
        command,
        env={**variables, **crash, "CRASH_MARK": str(tmp_path / "crashed")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    in_a_child = slots == 2 and "step" in point
    assert died.returncode == (0 if in_a_child else -9), died.stderr
    assert (tmp_path / "crashed").exists()
    resumed = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert bits_of(RunDir(tmp_path / "home/runs/killed")) == bits_of(RunDir(compared[1] / "runs" / "whole"))


def test_the_command_prints_the_same_document_and_a_table_for_people(
    compared: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, home, _ = compared
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    runs = [str(RunDir(home / "runs" / "whole").child(name).root) for name in RUNS]
    printed = CliRunner().invoke(cli, ["compare", *runs, "--json"], catch_exceptions=False)
    document = json.loads(printed.stdout)
    assert document["left_out"] == 0
    (row,) = [pair for pair in document["pairs"] if pair["p_value"] is not None]
    assert row["p_value"] == pytest.approx(found.pairs[0].p_value), "paired by digest or in their order: the same images"
    shown = CliRunner().invoke(cli, ["compare", *runs], catch_exceptions=False, env={"COLUMNS": "80"})
    assert "top-1 accuracy on 18 test images" in shown.output
    assert max(len(line) for line in shown.output.splitlines() if "report" not in line) <= 80
    again = CliRunner().invoke(cli, ["compare", str(found.folder), "--json"], catch_exceptions=False)
    assert json.loads(again.stdout) == found.to_dict(), "the folder of a finished comparison is shown again"


def test_the_same_comparison_again_knows_of_the_one_before(tmp_path: Path) -> None:
    first, second, third = (RunDir(tmp_path / f"flowers-comparison-0123abcd{end}") for end in ("", "-2", "-3"))
    for run in (first, second):
        run.create()
        run.comparison.write_text("{}")
    assert [finished_before(run) for run in (first, second, third)] == [None, first, second]
    assert finished_before(RunDir(tmp_path / "mine-2")) is None


def test_a_request_to_compare_runs_is_carried_out_in_the_folder_that_it_is_given(
    compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, home, _ = compared
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    request, run = tmp_path / "request.yaml", RunDir(tmp_path / "comparison")
    runs = [str(RunDir(home / "runs" / "whole").child(name).root) for name in RUNS]
    request.write_text(json.dumps({"runs": runs, "margin": 0.2, "metadata": {}}))
    command = ["compare", str(request), "--run-dir", str(run.root), "--json"]
    printed = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert json.loads(printed.stdout) == read_json(run.comparison)
    assert (read_json(run.comparison)["id"], read_json(run.comparison)["verdict"]["margin"]) == ("comparison", 0.2)
    assert [arm["runs"] for arm in read_json(run.comparison)["arms"]] == [runs[:2], runs[2:]]
    assert found.verdict.sentence


@pytest.mark.longer
def test_a_servers_result_is_the_document_of_the_command_line(
    compared: Any, pictures: Path, mlflow_workspace: Path, tmp_path: Path
) -> None:
    """A server and its worker, driven by the command, by HTTP, and looked at in the worker's folder."""
    asked, home, tracked = tmp_path / "asked.yaml", mlflow_workspace, {"FINETUNE_TRACKERS": "mlflow"}
    asked.write_text(json.dumps({**REQUEST, "training_file": str(pictures), "seeds": 1}))
    with live_server(home, worker=True, ready=False, environment=tracked) as server, Client(server.url) as client:
        printed = command_line("compare", str(asked), "--server", server.url, "--json")
        document = json.loads(printed.stdout)
        run, place = RunDir(home / "runs" / document["id"]), f"/v1/fine_tuning/comparisons/{document['id']}"
        written = read_json(run.comparison)
        arms = [
            {**arm, "runs": [f"{place}/runs/{Path(child).name}" for child in arm["runs"]]} for arm in written["arms"]
        ]  # fmt: skip
        assert document["mlflow_run_id"], "the worker's command has tracked it"
        other = {"dataset": "stripes", "report": f"{place}/report", "mlflow_run_id": document["mlflow_run_id"]}
        assert document == {**written, "arms": arms, **other}
        assert document == client.result(document["id"])
        first_runs = ("frozen-seed0", "full-seed0")
        here, there = (bits_of(one, first_runs) for one in (run, RunDir(compared[1] / "runs" / "whole")))
        assert here == there, "trained as if on the command line"
        assert document["verdict"]["sentence"] in client.report(document["id"])
        runs = client.runs(document["id"])
        assert [(one["name"], one["status"]) for one in runs] == [(name, "finished") for name in first_runs]
        comparison = client.job(document["id"])
        assert (comparison["status"], comparison["attempts"]) == ("succeeded", 1)
        registered = f"{comparison['fine_tuned_model']}@{comparison['fine_tuned_version']}"
        assert registered == document["registered"] == "stripes@1"
        made_by = client.version("stripes", "1")["links"]["job"]
        assert made_by in [one["links"]["run"] for one in runs if one["arm"] == document["verdict"]["choose"]]
        (picture, *_) = sorted((pictures / "class0").iterdir())
        assert client.predict(picture, model="stripes")["model"].startswith("stripes")
        shown = command_line("compare", document["id"], "--server", server.url).stderr
        assert f"{server.url}{place}/report" in shown.replace("\n", "")
        assert "top-1 accuracy on 18 test images" in shown
        listed = json.loads(command_line("jobs", "list", "--server", server.url, "--json").stdout)["jobs"]
        assert [(job["id"], job["kind"], job["what"]) for job in listed] == [(document["id"], "comparison", "frozen, full")]


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "finetune", *arguments]
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran


def test_the_python_door_compares_and_draws_itself(compared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, home, _ = compared
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    runs = [RunDir(home / "runs" / "whole").child(name).root for name in RUNS]
    through_python = finetune.compare(runs)
    assert [pair.p_value for pair in through_python.pairs] == [pair.p_value for pair in found.pairs]
    assert through_python.verdict.sentence.split(":")[0] in through_python._repr_html_()


def test_without_images_kept_apart_there_is_nothing_to_compare_on(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"images that no run has trained or chosen on: give data\.test_fraction"):
        compare(spec_of(pictures, data={"test_fraction": 0.0}), shared_at(tmp_path))


@pytest.mark.longer
def test_folds_compare_without_images_kept_apart_by_the_corrected_test(pictures: Path, tmp_path: Path) -> None:
    probes = [{"name": name, "set": {"hyperparameters.l2": value}} for name, value in (("loose", 0.001), ("tight", 100.0))]
    folded = spec_of(pictures, arms=probes, data={"folds": 2}, seeds=1, register_chosen=False)
    found = compare(folded, shared_at(tmp_path), run_dir=workspace_at(tmp_path).runs / "folded")
    assert found.split == "cv"
    assert found.arms[0].metrics["cv/top1"].n == 36
    assert found.pairs[0].test == "corrected resampled t"
    assert found.registered is None
