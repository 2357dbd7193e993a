"""The same requests give the same models: figures everywhere, and the very bits of the weights on a platform that is recorded.

``bits.json`` beside this file holds both. ``make golden`` records it anew on the machine that it runs on; a difference that
nobody meant is a change in what training computes.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import threadpoolctl
import torch
from tiny_runs import carry_out_at, tiny_spec, weights_of, write_stripes

from finetune.storage.rundir import RunDir

pytestmark = pytest.mark.usefixtures("one_torch_thread")

RECORDED = Path(__file__).with_name("bits.json")
STEPS = {"n_epochs": 2, "batch_size": 8}
REQUESTS: dict[str, dict[str, Any]] = {
    "linear_probe": {},
    "partial": {"method": "partial", "hyperparameters": STEPS},
    "full": {"method": {"type": "full", "bn": "recalibrate"}, "hyperparameters": {**STEPS, "mixup": 0.2, "ema": True}},
    "gradual": {"method": {"type": "gradual", "bn": "train"}, "hyperparameters": {"n_epochs": 3, "batch_size": 8}},
    "auto": {"method": "auto", "hyperparameters": STEPS},
    "refit": {"method": "full", "hyperparameters": {**STEPS, "refit": True}},
    "folds": {"data": {"folds": 3}},
}
OTHER_PLATFORM = {"rel": 0.02, "abs": 0.02}  # rounding moves a loss in its third digit; an image that flips shows


def this_platform() -> str:
    """Everything that decides how float32 sums are rounded."""
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    kernels = sorted({str(found.get("architecture")) for found in threadpoolctl.threadpool_info() if "architecture" in found})
    versions = [f"{name} {version(name)}" for name in ("torch", "onnxruntime", "numpy", "timm", "pillow", "albumentations")]
    return ", ".join([cpu, torch.backends.cpu.get_cpu_capability(), *kernels, *versions])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One workspace, so that features are computed once, as for a person who tries one method after another."""
    home = tmp_path_factory.mktemp("home")
    write_stripes(home / "pictures", 60)
    return home


@pytest.mark.parametrize("name", REQUESTS)
def test_golden_bits(name: str, home: Path, request: pytest.FixtureRequest) -> None:
    spec = tiny_spec(home / "pictures" / "stripes", suffix="golden", export={"register_model": "always"}, **REQUESTS[name])
    outcome = carry_out_at(home, spec, RunDir(home / "runs" / name))
    metrics, weights = dict(outcome.metrics), weights_of(Path(str(outcome.bundle)))
    if request.config.getoption("renew_golden"):
        record(name, metrics, weights)
        return
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    digests = recorded["weights"].get(this_platform())
    tolerance = OTHER_PLATFORM if digests is None else {"rel": 0, "abs": 0}
    assert metrics == pytest.approx(recorded["metrics"][name], **tolerance)
    assert digests is None or weights == digests[name], "the figures are the same, and yet the weights are others"


def record(name: str, metrics: dict[str, float], weights: str) -> None:
    """Put what one request gives into the file; what other platforms gave before goes, for it may no longer hold."""
    before = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {"metrics": {}, "weights": {}}
    digests = {**before["weights"].get(this_platform(), {}), name: weights}
    document = {
        "metrics": {one: found for one, found in {**before["metrics"], name: metrics}.items() if one in REQUESTS},
        "weights": {this_platform(): {one: digest for one, digest in sorted(digests.items()) if one in REQUESTS}},
    }
    RECORDED.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def test_the_file_holds_every_request() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert set(recorded["metrics"]) == set(REQUESTS)
    assert all(set(digests) == set(REQUESTS) for digests in recorded["weights"].values())
