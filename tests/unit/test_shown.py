"""What the terminal shows beside golden screens: the findings at the end of a training, costs, progress lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from diagnosed import N_STEPS, answered, run_records, write_run

from finetune.cli.comparing import compare
from finetune.cli.show import show_cost, show_findings
from finetune.errors import SpecError
from finetune.evaluation.diagnose import write_diagnosis
from finetune.events import Planned
from finetune.progress import Progress
from finetune.progress_bars import console, progress_bars, values_text
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir

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
    assert "of training images answered wrongly" in text
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
        compare.main(["photos", "--methods", "linear_probe"], standalone_mode=False)
