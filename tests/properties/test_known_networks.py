"""A head on a network that an earlier run left, without torch, has the bits of one on the network that torch built."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import TINY, carry_out_at, tiny_spec, weights_of, write_stripes

from finetune.bundle.manifest import read_manifest
from finetune.evaluation.predictions import Predictions, read
from finetune.runs import prepare as prepare_module
from finetune.runs.outcome import Outcome
from finetune.spec import JobSpec
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir, kept_run

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MEASURED = ("cost", "run", "bundle", "version", "cross_validation")  # in an outcome: what differs between two runs anyway

specs = st.fixed_dictionaries(
    {
        "model": st.builds(
            lambda backbone, pooling: {**TINY["model"], "backbone": backbone, "head": {"pooling": pooling}},
            st.sampled_from(["test_efficientnet", "test_vit"]),
            st.sampled_from(["avg", "gem"]),
        ),
        "data": st.fixed_dictionaries(
            {
                "folds": st.sampled_from([None, None, 3]),
                "test_fraction": st.sampled_from(["auto", 0.0]),
                "split_seed": st.integers(0, 2),
                "resize": st.sampled_from(["auto", "squash", "letterbox"]),
            }
        ),
        "hyperparameters": st.fixed_dictionaries(
            {
                "l2": st.sampled_from(["auto", 0.01]),
                "label_smoothing": st.sampled_from(["auto", 0.1]),
                "views": st.sampled_from([1, 2]),
                "refit": st.booleans(),
            }
        ),
        "export": st.fixed_dictionaries({"quantize": st.sampled_from(["none", "none", "int8"])}),
        "seed": st.integers(0, 1),
    }
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pictures(home: Path) -> Path:
    return write_stripes(home, 36)


@pytest.mark.longer
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=specs)
def test_a_run_on_a_known_network_has_the_bits_of_the_run_that_built_it(
    asked: dict[str, Any], home: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(pictures, **asked)
    name = spec.digest()
    first = run(spec, home / name, "first")
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "built_network", None)  # building one would fail
        again = run(spec, home / name, "again")
    assert result_of(again) == result_of(first)
    assert predictions_of(again).keys() == predictions_of(first).keys() != set()
    for split, table in predictions_of(first).items():
        assert_equal(predictions_of(again)[split], table)


def run(spec: JobSpec, home: Path, name: str) -> RunDir:
    folder = RunDir(home / name)
    carry_out_at(home, spec, folder)
    return folder


def result_of(run: RunDir) -> dict[str, Any]:
    """Everything that a run came to, without what was measured and how its export was compared."""
    outcome, bundle = Outcome.read(run), kept_run(run).bundle
    manifest = read_manifest(bundle).to_dict()
    differing = ("parity", "created_at", "files")
    return {
        "outcome": {key: value for key, value in outcome.to_dict().items() if key not in MEASURED},
        "weights": weights_of(bundle),
        "manifest": {key: value for key, value in manifest.items() if key not in differing},
        "evaluation": read_json(run.evaluation),
        "resolved": read_json(run.resolved),
        "split": run.split.read_text(),
        "children": [child_result(folder) for folder in sorted((run.root / "runs").glob("*"))],
    }


def child_result(folder: Path) -> dict[str, Any]:
    outcome = Outcome.read(RunDir(folder)).to_dict()
    return {"name": folder.name, **{key: value for key, value in outcome.items() if key not in MEASURED}}


def predictions_of(run: RunDir) -> dict[str, Predictions]:
    return {path.stem: read(path) for path in sorted(run.predictions.glob("*.npz"))}


def assert_equal(given: Predictions, expected: Predictions) -> None:
    values, wanted = asdict(given), asdict(expected)
    for name, value in wanted.items():
        np.testing.assert_array_equal(values[name], value, err_msg=name)
