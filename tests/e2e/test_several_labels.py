"""Images with several labels from the table to the answers of every door; see also ``benchmarks/multilabel.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from serving import in_process
from tiny_labels import COLOURS, write_colours
from tiny_runs import TINY, carry_out_at, shared_at, tiny_spec, workspace_at, write_stripes

import finetune
from finetune.bundle.mlflow_model import BundleModel
from finetune.bundle.predictor import Predictor
from finetune.cli import cli
from finetune.comparison_spec import parse_comparison
from finetune.errors import DataError, InvalidInput, SpecError
from finetune.evaluation.evaluate import read_evaluation
from finetune.evaluation.of_bundle import evaluate_bundle
from finetune.evaluation.predictions import read
from finetune.runs.outcome import Outcome
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir
from finetune.studies.compare import compare, compare_runs
from finetune.tasks import task_named

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_colours(home / "pictures", 90)
    return home


@pytest.fixture(scope="module")
def probe(home: Path) -> Outcome:
    spec = tiny_spec(home / "pictures" / "labels.jsonl", suffix="colours")
    return carry_out_at(home, spec, RunDir(home / "runs" / "probe"))


def test_the_task_is_found_and_the_labels_are_learnt(probe: Outcome) -> None:
    run = RunDir(probe.run)
    resolved = read_json(run.resolved)
    assert resolved["task"] == "multilabel"
    assert resolved["sources"]["task"] == "images have several labels, or none"
    assert probe.classes == COLOURS
    assert probe.metrics["test/map"] > 0.95
    assert probe.metrics["test/micro_f1"] > 0.85
    found = read_evaluation(run.evaluation)
    assert found.evaluations["test"].headline == "map"
    assert found.thresholds is not None
    table = read(run.predictions_of("test"))
    assert table.labels.shape == table.logits.shape
    assert table.thresholds == pytest.approx(np.tile(np.float32(found.thresholds), (len(table), 1)))
    page = run.report.read_text(encoding="utf-8")
    assert "mean average precision" in page
    assert "label cardinality" in page
    assert "Confusion" not in page


def test_every_door_gives_the_same_labels_with_the_same_probabilities(home: Path, probe: Outcome) -> None:
    predictor = Predictor.load(Path(str(probe.bundle)))
    files = sorted((home / "pictures").glob("*.png"))[:12]
    expected = [predictor.predict(file.read_bytes()).several for file in files]
    assert all(one is not None and set(one.scores) == set(one.thresholds) == set(COLOURS) for one in expected)
    assert len({one.given for one in expected if one}) > 3

    with in_process(home / ".finetune", model=str(probe.bundle)) as client:
        answers = [client.post("/predict?top_k=1", files={"image": file.read_bytes()}).json() for file in files]
        refused = client.post("/predict?coverage=0.9", files={"image": files[0].read_bytes()})
    assert [one.to_dict() for one in expected if one] == [
        {key: answer[key] for key in ("labels", "scores", "thresholds")} for answer in answers
    ]
    assert all(len(answer["predictions"]) == 1 for answer in answers)
    assert refused.status_code == 422
    assert "any number of labels" in refused.json()["detail"]

    rows = BundleModel(predictor).predict([str(file) for file in files], {"top_k": 3})
    for row, one in zip(rows.to_dict("records"), expected, strict=True):
        assert one is not None
        assert tuple(row["labels"]) == one.given
        assert {p["label"]: p["probability"] for p in row["predictions"]} == pytest.approx(one.scores, abs=1e-6)

    model = finetune.load(Path(str(probe.bundle)))
    answered = model.predict(files[0])
    assert answered.given == expected[0].given  # type: ignore[union-attr]
    with pytest.raises(InvalidInput, match="does not apply"):
        model.predict(files[0], finetune.CertaintyOptions(coverage=0.9))


@pytest.mark.longer
def test_the_mlflow_model_says_that_it_gives_labels_and_gives_them(home: Path, probe: Outcome, tmp_path: Path) -> None:
    import mlflow.pyfunc

    from finetune.tracking.mlflow.model import write_model

    write_model(tmp_path / "model", Path(str(probe.bundle)))
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert model.metadata.signature.outputs.input_names()[:4] == ["label", "probability", "predictions", "labels"]
    files = sorted((home / "pictures").glob("*.png"))[:3]
    predictor = Predictor.load(Path(str(probe.bundle)))
    expected = [list(predictor.predict(file.read_bytes()).several.given) for file in files]  # type: ignore[union-attr]
    assert [list(labels) for labels in model.predict([str(file) for file in files]).labels] == expected


def test_a_bundle_is_measured_on_other_labelled_images(home: Path, probe: Outcome) -> None:
    table = write_colours(home / "others", 40, seed=7)
    model = finetune.load(Path(str(probe.bundle)))
    found = evaluate_bundle(model.folder, table)
    assert found.evaluation.values["map"] > 0.9
    assert found.evaluation.n == 40


def test_what_does_not_fit_is_refused_before_anything_is_computed(home: Path) -> None:
    table = home / "pictures" / "labels.jsonl"
    with pytest.raises(SpecError) as solved:
        tiny_spec(table, hyperparameters={"loss": "asymmetric"})
    assert "needs a convex loss" in str(solved.value.problems[0])
    with pytest.raises(SpecError) as named:
        tiny_spec(table, task="multiclass", method="full", hyperparameters={"loss": "asymmetric"})
    assert "is not a loss of task multiclass" in str(named.value.problems[0])
    with pytest.raises(DataError, match="cross_entropy is not a loss of the task multilabel"):
        carry_out_at(home, tiny_spec(table, hyperparameters={"loss": "cross_entropy"}), RunDir(home / "r1"))
    with pytest.raises(DataError, match="task multiclass learns exactly one label for each image"):
        carry_out_at(home, tiny_spec(table, task="multiclass"), RunDir(home / "r2"))


@pytest.mark.parametrize("loss", ["auto", "asymmetric"])
@pytest.mark.longer
def test_steps_are_taken_with_either_loss(home: Path, loss: str) -> None:
    steps = {"n_epochs": 2, "batch_size": 16, "loss": loss, "mixup": 0.2, "label_smoothing": 0.05}
    data = {"class_weights": "balanced"}
    spec = tiny_spec(home / "pictures" / "labels.jsonl", data=data, method="full", hyperparameters=steps, suffix="steps")
    outcome = carry_out_at(home, spec, RunDir(home / "runs" / f"steps-{loss}"))
    assert outcome.metrics["test/map"] > task_named("multilabel").chance(read(RunDir(outcome.run).predictions_of("test")).labels)
    values = [line for line in RunDir(outcome.run).metrics.read_text().splitlines() if "train/exact_match" in line]
    assert len(values) == 2
    assert all("val/map" in line and "val/exact_match" in line for line in values)


@pytest.mark.longer
def test_one_label_each_may_be_learnt_as_several(home: Path, tmp_path: Path) -> None:
    """Class folders with ``task: multilabel``: each class is a yes or no of its own."""
    spec = tiny_spec(write_stripes(tmp_path, 60), task="multilabel", suffix="stripes")
    outcome = carry_out_at(tmp_path, spec, RunDir(tmp_path / "run"))
    assert outcome.metrics["test/labels_per_image"] == 1.0
    assert Predictor.load(Path(str(outcome.bundle))).manifest.task == "multilabel"


def test_the_command_line_marks_the_labels_that_are_given(home: Path, probe: Outcome) -> None:
    file = sorted((home / "pictures").glob("*.png"))[0]
    found = CliRunner().invoke(cli, ["predict", str(file), "--model", str(probe.bundle)])
    expected = Predictor.load(Path(str(probe.bundle))).predict(file.read_bytes()).several
    assert expected is not None
    marked = [line.split()[-1] for line in found.output.splitlines() if "✓" in line]
    assert tuple(marked) == expected.given


# ── studies ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def noisy(home: Path) -> Path:
    """Pictures of which one label in six is wrong, so that probabilities, thresholds and figures are not all alike."""
    return write_colours(home / "noisy", 150, wrong=0.17)


@pytest.mark.longer
def test_folds_carry_their_thresholds_and_the_bundle_has_those_of_all_answers(home: Path, noisy: Path) -> None:
    """Each fold chooses on its own val, refits, and judges what it held out by what it chose."""
    run = RunDir(home / "runs" / "folds")
    spec = tiny_spec(noisy, data={"folds": 3, "val_fraction": 0.45}, suffix="folds", export={"register_model": "always"})
    outcome = carry_out_at(home, spec, run)
    pooled = read(run.predictions_of("cv"))
    assert pooled.thresholds is not None
    chosen = [read_evaluation(run.child(f"fold-{fold}").child("choose").evaluation).thresholds for fold in (1, 2, 3)]
    assert len(set(chosen)) == 3
    assert {tuple(row) for row in pooled.thresholds.tolist()} == {tuple(np.float32(one).tolist()) for one in chosen}
    found = read_evaluation(run.evaluation)
    task = task_named("multilabel")
    assert found.thresholds == pytest.approx(task.choose_thresholds(pooled.logits, pooled.labels))
    manifest = Predictor.load(Path(str(outcome.bundle))).manifest
    temperature = found.temperature.temperature if found.temperature else 1.0
    assert manifest.thresholds == pytest.approx(task.probability_thresholds(np.array(found.thresholds), temperature))
    assert outcome.metrics["cv/map"] == pytest.approx(outcome.metrics["cv/map_mean"], abs=0.1)
    assert "Expect mean average precision" in run.report.read_text(encoding="utf-8")


@pytest.mark.longer
def test_ways_to_train_are_compared_by_mean_average_precision(home: Path, noisy: Path) -> None:
    arms = [{"name": name, "set": {"hyperparameters": {"l2": l2}}} for name, l2 in (("weak", 0.01), ("strong", 30.0))]
    request = {**TINY, "suffix": "compared", "training_file": str(noisy), "arms": arms, "seeds": 1}
    found = compare(
        parse_comparison({**request, "data": {"test_fraction": 0.4}}), shared_at(home), run_dir=home / "runs" / "compared"
    )
    (pair,) = found.pairs
    assert (found.headline, pair.headline.metric, pair.test) == ("map", "map", "paired bootstrap")
    assert {other.metric for other in pair.others} >= {"micro_f1", "exact_match"}
    page = found.report.read_text(encoding="utf-8")
    assert "mean average precision" in page
    assert found.verdict.sentence.split(".")[0] in page
    again = compare_runs([arm.runs[0] for arm in found.arms], workspace_at(home))
    for arm, of_same_runs in zip(found.arms, again.arms, strict=True):
        assert {k: v.value for k, v in of_same_runs.metrics.items()} == pytest.approx(
            {k: v.value for k, v in arm.metrics.items()}
        )
