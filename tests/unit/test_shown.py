"""What the terminal shows beside golden screens: the findings at the end of a training, costs, progress lines."""

from __future__ import annotations

import re
import socket
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click import UsageError
from diagnosed import N_STEPS, answered, run_records, write_run
from folders import write_classes
from PIL import Image
from tiny_bundle import write_tiny_bundle

import finetune
from finetune.cli import _resumes, cli, show_comparison
from finetune.cli.show_run import show_cost, show_findings
from finetune.errors import DamagedFile, DataChangedError, DataError, InvalidInput, NotFound, SpecError
from finetune.evaluation.diagnose import write_diagnosis
from finetune.events import Planned
from finetune.jobs.http import Connection
from finetune.progress import Progress
from finetune.progress_bars import console, progress_bars, values_text
from finetune.runs.shared import Shared
from finetune.spec import parse_spec
from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.studies.carry_out import fine_tune
from finetune.studies.compare import compare_runs
from finetune.tracking.mlflow.pages import _refuse_taken_port

COST = {
    "wall_seconds": 10.0, "train_seconds": 4.0, "feature_seconds": 3.0, "peak_memory_bytes": 2.0**30,
    "trainable_parameters": 5.0, "total_parameters": 7.0,
}  # fmt: skip


def underfitted(folder: Path) -> RunDir:
    """A run whose network answers as many training images wrongly as held-out ones."""
    run = write_run(folder, run_records(samples={0: answered(200, 0.5), N_STEPS: answered(200, 0.55)}))
    write_diagnosis(run)
    return run


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_problem_is_shown_with_what_to_try_and_the_command_for_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = underfitted(tmp_path / "run")
    show_findings(run)
    text = shown(capsys)
    assert text.startswith("Underfitting (")
    assert "of training images predicted wrongly" in text
    assert " Try: " in text
    assert text.endswith(f"diagnosis finetune diagnose {run.root}")


def test_of_a_study_the_findings_of_the_run_that_it_kept_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = RunDir(tmp_path / "study").create()
    underfitted(study.child("final").root)
    write_json(study.study, {"kept": "final"})
    show_findings(study)
    assert shown(capsys).startswith("Underfitting (")


def test_a_run_with_which_nothing_is_wrong_adds_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", run_records())
    write_diagnosis(run)
    show_findings(run)
    assert shown(capsys) == ""


def test_a_cost_above_the_time_of_the_run_is_explained_and_several_attempts_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path).create()
    show_cost(COST, run)
    text = shown(capsys)
    assert text.startswith("Cost what measured")
    assert "cache" not in text.partition("peak memory")[2]
    for _ in range(2):
        run.record(Planned("", {}, 0))
    show_cost({**COST, "train_seconds": 40.0, "feature_seconds": 39.0}, run)
    text = shown(capsys)
    assert text.startswith("Cost, 2 attempts together")
    assert "frozen features that this run took from the cache" in text


@pytest.mark.parametrize(
    ("n_characters", "text"), [(40, "loss 0.123 img/s 1,024 val 0.861"), (24, "loss 0.123 val 0.861"), (10, "val 0.861")]
)
def test_values_that_do_not_fit_into_a_progress_line_are_left_out_the_least_important_first(n_characters: int, text: str) -> None:
    values = {"loss": 0.1234, "top1": 0.9, "lr": 1e-3, "images/s": 1024.0, "eta_seconds": 3.0, "val/top1": 0.861}
    assert values_text(values, n_characters) == text


def test_a_label_of_40_characters_is_shown_whole_in_a_terminal_of_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "width", 80)
    with progress_bars(shown=True) as update:
        update(
            Progress("training", 1, 2, "steps", {"loss": 0.5, "images/s": 100.0}, "linear_probe, seed 3 of 3: frozen features")
        )
        update(
            Progress("training", 2, 2, "steps", {"loss": 0.5, "images/s": 100.0}, "linear_probe, seed 3 of 3: frozen features")
        )
    lines = capsys.readouterr().err.splitlines()
    assert any("linear_probe, seed 3 of 3: frozen features" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_comparing_one_method_says_what_to_add() -> None:
    with pytest.raises(SpecError, match=r"at least two arms, given 1 \(linear_probe\)\. Add a method .*finetune train"):
        cli.main(["compare", "photos", "--methods", "linear_probe"], standalone_mode=False)


def test_settings_that_a_linear_probe_ignores_are_named() -> None:
    given = {"training_file": "photos", "hyperparameters": {"n_epochs": 5, "l2": 0.1}, "model": {"head": {"dropout": 0.5}}}
    assert parse_spec(given).without_effect() == ("hyperparameters.n_epochs", "model.head.dropout")
    assert parse_spec({**given, "method": "full"}).without_effect() == ()
    assert parse_spec({"training_file": "photos"}).without_effect() == ()


@pytest.mark.parametrize(
    ("arguments", "said", "resumes"),
    [
        (["train", "photos"], "interrupted", True),
        (["train", "photos"], "stopped by SIGINT at step 3 of 6; the same command goes on from there", False),
        (["compare", "photos", "--server=http://gpu-box:3000"], "interrupted", False),
        (["serve"], "interrupted", False),
        ([], "interrupted", False),
    ],
)
def test_after_an_interruption_it_is_said_whether_the_same_command_resumes(
    arguments: list[str], said: str, resumes: bool
) -> None:
    assert _resumes(arguments, said) is resumes


def test_runs_that_do_not_exist_are_refused_and_leave_no_folder(tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path / "workspace")
    with pytest.raises(NotFound, match=r"no such folder\. Give the folders of finished runs"):
        compare_runs([tmp_path / "one", tmp_path / "two"], workspace)
    assert not workspace.runs.exists()


@pytest.mark.parametrize("arguments", [["photos", "--method", "full"], ["photos", "--method", "linear_probe"]])
def test_a_single_method_for_the_default_arms_is_refused_with_the_option_to_use(arguments: list[str]) -> None:
    with pytest.raises(
        UsageError, match=r"To compare methods, use --methods, as in: --methods (full,linear_probe|linear_probe,full)"
    ):
        cli.main(["compare", *arguments], standalone_mode=False)


def test_an_address_of_a_server_without_a_scheme_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"'gpu-box' is not the address of a server; give one such as http://127"):
        Connection("gpu-box")


def test_a_damaged_file_of_a_run_is_named_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text('{"object": ')
    with pytest.raises(DamagedFile, match=r"outcome\.json: this file is damaged \(Expecting value.*delete the folder"):
        read_json(tmp_path / "outcome.json")
    with pytest.raises(ValueError, match="damaged"):  # as readers of caches expect it
        read_json(tmp_path / "outcome.json")


def test_a_table_whose_files_are_all_missing_is_refused_before_a_network_is_built(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\nx.png,red\ny.png,blue\n")
    with pytest.raises(DataError, match="2 of 2 images do not exist"):
        fine_tune(parse_spec({"training_file": str(tmp_path / "labels.csv")}), Shared.of(Workspace.at(tmp_path / "home")))


def test_data_of_another_revision_than_the_one_asked_for_is_refused_once(tmp_path: Path) -> None:
    for number, name in enumerate(("ash", "elm")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(6):
            colour = (40 * index, 90 * number, 10)
            Image.new("RGB", (40, 30), colour).save(tmp_path / "photos" / name / f"{index}.png")
    given = {
        "training_file": str(tmp_path / "photos"),
        "data": {"revision": "abcdef12"},
        "model": {"backbone": "test_resnet", "weights": "none", "input_size_px": 64},
    }
    with pytest.raises(DataChangedError, match=r"and data\.revision asks for abcdef12"):
        fine_tune(parse_spec(given), Shared.of(Workspace.at(tmp_path / "home")))


def test_a_name_of_a_model_that_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(SpecError, match=r"suffix: must be at most 63 lower-case letters, digits.*given 'My Model'"):
        parse_spec({"training_file": "photos", "suffix": "My Model"})


def test_a_comparison_of_fewer_than_two_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="at least two finished runs to compare, given 0"):
        compare_runs([], Workspace.at(tmp_path))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("nowhere.jpg", r"nowhere\.jpg: no such image file"),
        (3, "given int"),
        (np.zeros((4, 4), np.uint8), r"given \(4, 4\) uint8"),
        (np.zeros((4, 4, 3)), r"given \(4, 4, 3\) float64"),
    ],
)
def test_what_is_no_image_is_refused_by_a_model_in_python(tmp_path: Path, image: Any, said: str) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    with pytest.raises(InvalidInput, match=said):
        finetune.load(tmp_path / "bundle").predict(image)


def test_mlflow_refuses_a_port_that_another_program_has(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"--port {port}: another program already listens on 127"):
            _refuse_taken_port("127.0.0.1", port)
    _refuse_taken_port("127.0.0.1", port)  # nobody listens there any more


@pytest.mark.usefixtures("unmeasured_machine")
def test_a_plan_at_a_python_prompt_is_a_few_lines(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", {"a": 6, "b": 6})
    tiny = {"model.backbone": "test_efficientnet", "model.weights": "none", "model.input_size_px": 64}
    plan = finetune.check(root, folds=3, settings=tiny, workspace=tmp_path / "home", progress=False)
    first, second, *notes, page = repr(plan).splitlines()
    assert first.startswith("Plan: linear_probe on test_efficientnet, 3 folds, about ")
    assert second.startswith("2 classes; images: ")
    assert any(line.startswith("Found in 12 images: ") for line in notes), "it examines the images, as the command does"
    assert all(re.match("(note|problem|doubt|Found in .*): ", line) for line in notes)
    assert plan.examined is not None
    assert page == f"page: {plan.examined.page}"
    assert finetune.check(root, quick=True, settings=tiny, workspace=tmp_path / "home", progress=False).examined is None
    with pytest.raises(finetune.FinetuneError, match="no such"):
        finetune.check(tmp_path / "nothing", progress=False)


def test_warnings_of_pillow_are_not_shown_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(**_: object) -> None:
        warnings.warn_explicit("Palette images with Transparency", UserWarning, "PIL/Image.py", 1134, module="PIL.Image")
        warnings.warn_explicit("something else", UserWarning, "finetune/x.py", 1, module="finetune.x")

    monkeypatch.setattr(finetune.cli.cli, "main", decode)
    monkeypatch.setattr(finetune.cli, "skip_final_collection", lambda: None)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        finetune.cli.main()
    assert [str(one.message) for one in shown] == ["something else"]


@pytest.fixture
def only_what_to_do_next(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("_show_arms", "_show_verdict"):
        monkeypatch.setattr(show_comparison, part, lambda found: None)


@pytest.mark.usefixtures("only_what_to_do_next")
def test_a_model_on_a_server_is_asked_there(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"registered": "flowers@2"}
    show_comparison.show_comparison(found, "report.html")
    assert "serve finetune serve --model flowers@2" in shown(capsys)
    show_comparison.show_comparison(found, "http://gpu:3000/report", "http://gpu:3000")
    said = shown(capsys)
    assert "predict finetune predict FOLDER --server http://gpu:3000 --model flowers@2" in said
    assert "finetune serve" not in said


@pytest.mark.usefixtures("only_what_to_do_next")
def test_the_demo_proposes_commands_that_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make demo` is run without an activated environment, and an installed package has no Makefile."""
    comparison = SimpleNamespace(to_dict=lambda: {"registered": "digits@1"}, report=Path("report.html"))
    result: Any = SimpleNamespace(comparison=comparison, asked=Path("3.png"), truth="3", answer={"predictions": []}, seconds=90.0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    for found, command in (("/usr/bin/finetune", "finetune"), (None, ".venv/bin/finetune")):
        monkeypatch.setattr("shutil.which", lambda _, found=found: found)
        show_comparison.show_demo(result)
        said = shown(capsys)
        assert all(f"{command} {name}" in said for name in ("mlflow", "serve", "compare"))
        assert "make" not in said
