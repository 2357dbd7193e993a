"""The refit as a study: one run chooses on val, the other does the same on train and val together, and that one is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import carry_out_at, tiny_spec, write_stripes

from finetune.bundle.manifest import read_manifest
from finetune.evaluation.evaluate import read_evaluation
from finetune.evaluation.predictions import read
from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.runs.resolve import Resolved
from finetune.storage.files import read_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("pictures"), 36)


@pytest.mark.parametrize("method", ["partial", "full"])  # steps on cached activations, and on images
@pytest.mark.longer
def test_a_refit_takes_the_chosen_epochs_of_more_images(method: str, pictures: Path, home: Path) -> None:
    given = {"method": {"type": method, "warm_head": False}, "hyperparameters": {"n_epochs": 2, "batch_size": 5, "refit": True}}
    run = RunDir(home / "runs" / method)
    outcome = carry_out_at(home, tiny_spec(pictures, **given), run)
    chose, refitted = run.child("choose"), run.child("refit")
    chosen, done = Outcome.read(chose).choices, Outcome.read(refitted)
    assert chosen["n_epochs"] >= 1
    assert done.choices["n_epochs"] == chosen["n_epochs"]
    sizes = Resolved.from_dict(read_json(chose.resolved)).dataset.sizes
    pool = sizes["train"] + sizes["val"]
    assert (Outcome.read(chose).n_train, done.n_train, outcome.n_train) == (sizes["train"], pool, pool)
    assert Resolved.from_dict(read_json(refitted.resolved)).dataset.sizes == {"train": pool, "test": sizes["test"]}
    steps = [line["step"] for line in read_lines(refitted.metrics)]
    assert max(steps) == chosen["n_epochs"] * -(-pool // 5)


def test_val_speaks_before_the_refit_and_test_after_it(pictures: Path, home: Path) -> None:
    run = RunDir(home / "runs" / "probe")
    spec = tiny_spec(pictures, hyperparameters={"refit": True})
    outcome = carry_out_at(home, spec, run)
    chose, refitted = run.child("choose"), run.child("refit")
    assert {path.stem for path in chose.predictions.iterdir()} == {"val"}
    assert {path.stem for path in refitted.predictions.iterdir()} == {"test"}
    for split, child in (("val", chose), ("test", refitted)):
        assert (read(run.predictions_of(split)).logits == read(child.predictions_of(split)).logits).all()
        assert read_evaluation(run.evaluation).evaluations[split] == read_evaluation(child.evaluation).evaluations[split]
    assert outcome.summary.endswith("then fitted once more on train + val with what val chose")
    notes: Any = read_manifest(outcome.bundle).method["notes"]
    assert any("val figures are those of the model before that" in note for note in notes)
    assert read_json(run.study) == {"kind": "refit", "children": ["choose", "refit"], "kept": "refit"}
    assert RunOptions.read(refitted).decided_by == "../choose"
    assert (refitted.root / "../choose").resolve() == chose.root


@pytest.mark.longer
def test_a_refit_of_method_auto_does_what_was_kept_and_not_all_of_it_again(pictures: Path, home: Path) -> None:
    run = RunDir(home / "runs" / "auto")
    given = {"method": "auto", "hyperparameters": {"n_epochs": 1, "batch_size": 5, "refit": True}}
    outcome = carry_out_at(home, tiny_spec(pictures, **given), run)
    kept = read_json(run.child("choose").study)["kept"]
    assert not run.child("refit").study.exists(), "one run, and no study of several"
    assert outcome.method == "auto"
    assert outcome.carried_out == kept == Outcome.read(run.child("refit")).carried_out
    assert read_json(run.resolved)["recipe"]["method"] == kept
