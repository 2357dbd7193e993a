"""Every learner: it answers what the graph that it exports computes, torch agrees, and training it again changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import carry_out_at, shared_at, tiny_spec, write_stripes

from finetune.data.dataset import Sample
from finetune.progress import silent
from finetune.runs.known import KnownNetwork
from finetune.runs.learner import Learner
from finetune.runs.options import RunOptions
from finetune.runs.prepare import Prepared, prepare
from finetune.runs.run import learner_for, training_context
from finetune.runs.shared import Shared
from finetune.runs.solved import SolvedLearner
from finetune.runs.stepped import SteppedLearner
from finetune.runtime.session import open_session
from finetune.spec import JobSpec
from finetune.storage.rundir import RunDir
from finetune.training.context import Trained, TrainingContext

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LOGITS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A learner that has been trained, and what it was trained with."""

    prepared: Prepared
    learner: Learner
    trained: Trained
    context: TrainingContext
    again: Callable[[], Learner]  # the same learner, made anew for the same run

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.context.dataset.of("val")

    @property
    def images(self) -> np.ndarray:
        """(N, h, w, 3) uint8, the samples as the network sees them."""
        return np.stack([sample.decode(self.prepared.resolved.preprocess.load) for sample in self.samples])

    def exported_answers(self, temperature: float) -> dict[str, np.ndarray]:
        """What ONNX Runtime makes of the images."""
        exported = self.learner.exported(temperature)
        outputs = open_session(exported.model).run(list(exported.outputs), {"images": self.images})
        return dict(zip(exported.outputs, outputs, strict=True))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("pictures"), 36)


@pytest.fixture(scope="module", params=["solved, network built", "solved, network known", "stepped"])
def case(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    home = tmp_path_factory.mktemp("home")
    if request.param == "solved, network known":
        carry_out_at(home, tiny_spec(pictures, seed=0), RunDir(home / "earlier"))
    method = "partial" if request.param == "stepped" else "linear_probe"
    spec = tiny_spec(pictures, method={"type": method}, hyperparameters={"n_epochs": 1} if method == "partial" else {})
    case = trained_case(spec, shared_at(home), RunDir(home / "run").create())
    assert isinstance(case.learner, SteppedLearner if request.param == "stepped" else SolvedLearner)
    assert isinstance(case.prepared.network, KnownNetwork) == (request.param == "solved, network known")
    return case


def trained_case(spec: JobSpec, shared: Shared, run: RunDir) -> Case:
    prepared = prepare(spec, shared, run=run, options=RunOptions(goal="exported"))
    context = training_context(prepared, run, shared, silent)
    learner = learner_for(prepared, shared)
    trained = learner.train(context, None)
    return Case(prepared, learner, trained, context, lambda: learner_for(prepared, shared))


def test_a_learner_answers_every_sample_in_order(case: Case) -> None:
    logits, embedding = case.learner.predict(case.samples, case.context, "val")
    assert len(case.samples) > 3
    assert logits.shape == (len(case.samples), len(case.context.dataset.classes))
    assert embedding.shape == (len(case.samples), case.prepared.network.facts.n_features)
    assert logits.dtype == embedding.dtype == np.float32
    backwards, _ = case.learner.predict(case.samples[::-1], case.context, "val")
    np.testing.assert_allclose(backwards[::-1], logits, atol=LOGITS_TOLERANCE)


def test_a_learner_answers_what_its_exported_graph_computes(case: Case) -> None:
    logits, embedding = case.learner.predict(case.samples, case.context, "val")
    computed = case.exported_answers(temperature=1.0)
    np.testing.assert_allclose(computed["logits"], logits, atol=LOGITS_TOLERANCE)
    np.testing.assert_allclose(computed["embedding"], embedding, atol=LOGITS_TOLERANCE)


def test_torch_agrees_with_the_exported_graph_at_every_temperature(case: Case) -> None:
    for temperature in (1.0, 2.5):
        reference = case.learner.exported(temperature).reference(case.samples, case.images)
        computed = case.exported_answers(temperature)
        np.testing.assert_allclose(computed["probs"], reference.outputs.probs, atol=LOGITS_TOLERANCE)
        np.testing.assert_allclose(computed["logits"], reference.outputs.logits, atol=LOGITS_TOLERANCE)
        assert "torch" in reference.computed_by


def test_a_graph_exported_twice_has_the_same_bytes(case: Case) -> None:
    assert case.learner.exported(1.5).model == case.learner.exported(1.5).model


def test_training_a_finished_run_again_gives_the_same_bits(case: Case) -> None:
    learner = case.again()
    trained = learner.train(case.context, None)
    assert trained.choices == case.trained.choices
    assert trained.frozen == case.trained.frozen
    assert learner.exported(1.0).model == case.learner.exported(1.0).model


def test_features_cost_what_they_took_when_they_were_computed(case: Case) -> None:
    """Also where an earlier run computed them, or an earlier process of this run."""
    found = case.again().train(case.context, None).cost.features
    first = case.trained.cost.features
    assert first.wall > 0
    assert first.cpu > 0
    assert (found.wall, found.cpu) == pytest.approx((first.wall, first.cpu))
    cost = case.trained.cost.to_dict()
    assert cost["train_seconds"] == pytest.approx(case.trained.cost.own.wall + cost["feature_seconds"])
    assert cost["train_cpu_seconds"] == pytest.approx(case.trained.cost.own.cpu + cost["feature_cpu_seconds"])


def test_what_is_frozen_is_proved_and_what_trains_is_counted(case: Case) -> None:
    facts, recipe = case.prepared.network.facts, case.prepared.resolved.recipe
    trains = set(recipe.trainable if recipe.n_steps else ())
    of_head = (facts.n_features + 1) * len(case.context.dataset.classes)
    assert case.trained.frozen["digest_before"] == case.trained.frozen["digest_after"]
    assert case.trained.frozen["stages"] == [stage.name for stage in facts.stages if stage.index not in trains]
    assert case.trained.n_parameters == facts.n_parameters + of_head
    assert case.trained.n_trainable == of_head + sum(facts.stages[index].n_parameters for index in trains)
