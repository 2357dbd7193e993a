"""What a run exports for the drift watch is what its bundle answers to the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_labels import write_colours
from tiny_runs import carry_out_at, tiny_spec, write_stripes

from finetune.bundle.manifest import DRIFT
from finetune.bundle.predictor import Predictor
from finetune.data.dataset import LocalFile, Sample
from finetune.evaluation.predict import SamplePrediction, predict_samples
from finetune.evaluation.predictions import read
from finetune.monitoring.drift import compare
from finetune.monitoring.reference import read_reference
from finetune.monitoring.statistics import statistics_of
from finetune.storage.rundir import RunDir

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.longer]


@pytest.mark.parametrize(("several", "split"), [(False, "test"), (False, "val"), (True, "test")])
def test_the_reference_is_what_the_bundle_answers_to_the_held_out_images(tmp_path: Path, several: bool, split: str) -> None:
    folder = tmp_path / "pictures"
    training_file = write_colours(folder, 90) if several else write_stripes(folder, 90)
    folder = folder if several else training_file
    fractions = {"val_fraction": 0.45, "test_fraction": 0.0} if split == "val" else {"val_fraction": 0.2, "test_fraction": 0.4}
    spec = tiny_spec(training_file, suffix="watched", data=fractions)
    outcome = carry_out_at(tmp_path, spec, RunDir(tmp_path / "runs" / "one"))
    bundle, table = Path(str(outcome.bundle)), read(RunDir(outcome.run).predictions_of(split))
    reference, predictor = read_reference(bundle / DRIFT), Predictor.load(bundle)
    assert reference is not None
    assert (reference.split, len(reference)) == (split, len(table))
    answers = list(predict_samples(predictor, [Sample(name, LocalFile(folder / name), ()) for name in table.ids]))
    found = [one for one in answers if isinstance(one, SamplePrediction)]
    probs, embeddings = np.stack([one.probs for one in found]), np.stack([one.embedding for one in found])
    manifest = predictor.manifest
    live = statistics_of(manifest.task, probs, embeddings, predictor.estimator.subspace, manifest.thresholds)
    assert reference.statistics.confidence == pytest.approx(live.confidence, abs=1e-4)
    assert reference.statistics.label.tolist() == live.label.tolist()
    if several:
        assert reference.statistics.given is not None
        assert reference.statistics.given.tolist() == live.given.tolist()  # type: ignore[union-attr]
    names = {test.name for test in compare(reference, live)}
    assert names >= ({"confidence", "labels", "labels_per_image"} if several else {"confidence", "classes"})
