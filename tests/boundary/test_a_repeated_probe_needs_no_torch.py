"""A probe whose network is known runs in a process where torch and its companions cannot be imported."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image, ImageOps
from tiny_runs import write_stripes

from finetune.model.backbone import build_backbone
from finetune.storage.files import read_json

FORBIDDEN = ("torch", "torchvision", "timm", "onnxscript", "onnx_ir", "albumentations", "cv2", "mlflow", "sklearn")


def refusing(*allowed: str) -> str:
    """Return a program that runs the command and refuses imports of what is forbidden, apart from some modules."""
    return REFUSING.replace("FORBIDDEN", repr(tuple(name for name in FORBIDDEN if name not in allowed)))


REFUSING = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"{name} was imported", name=name)

sys.meta_path.insert(0, Refuse())
from finetune.cli import main
main()
"""
FREELY = "from finetune.cli import main; main()"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in a file, as pretrained ones are: not another network for another seed."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    safetensors.torch.save_file(build_backbone("test_efficientnet", weights="none", input_size_px=64).module.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """A workspace in which a probe was trained, with torch, and the request beside it."""
    home = tmp_path_factory.mktemp("home")
    request: dict[str, Any] = {
        "training_file": str(write_stripes(home, 48).relative_to(home)),
        "model": {"backbone": "test_efficientnet", "weights": str(weights), "input_size_px": 64},
        "compute": {"device": "auto", "threads": 1},
        "suffix": "stripes",
    }
    (home / "request.yaml").write_text(yaml.safe_dump(request))
    done = finetune(FREELY, home)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    """A copy of that workspace."""
    return Path(shutil.copytree(trained, tmp_path / "home"))


def finetune(code: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, "train", str(home / "request.yaml"), "--json", *arguments]
    environment = {**os.environ, "FINETUNE_HOME": str(home / "workspace"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, timeout=240, check=False)


def outcome_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--seed", "1"), id="another seed"),
        # in folds and in a refit other images train, whose augmented views nobody has computed
        pytest.param(("--folds", "3", "--set", "hyperparameters.views=1"), id="folds"),
        pytest.param(("--seed", "2", "--set", "hyperparameters.refit=true", "--set", "hyperparameters.views=1"), id="refit"),
        pytest.param(("--seed", "3", "--set", "export.quantize=int8"), id="int8"),
    ],
)
def test_a_repeated_probe_imports_nothing_of_torch(home: Path, arguments: Sequence[str]) -> None:
    # Each fold holds out other images: those that are much alike are compared as pictures, with OpenCV, which is not torch's.
    allowed = ("cv2",) if "--folds" in arguments else ()
    outcome = outcome_of(finetune(refusing(*allowed), home, *arguments))
    manifest = read_json(Path(outcome["bundle"]) / "bundle.json")
    assert manifest["versions"]["torch"] == importlib.metadata.version("torch")
    assert "in an earlier process" in manifest["parity"]["reference"]
    assert manifest["parity"]["n_images"] > 0
    assert manifest["frozen"]["digest_before"] == manifest["frozen"]["digest_after"]
    assert (Path(outcome["run"]) / "report.html").exists()


def test_other_images_and_classes_in_another_workspace_need_no_torch(home: Path, tmp_path: Path) -> None:
    # Of weights in a file it is measured on the images which normalisation they expect, and for augmented views of new images
    # albumentations imports torch: neither is what is tested here.
    arguments = ("--set", "model.weights=none", "--set", "hyperparameters.views=1")
    outcome_of(finetune(FREELY, home, *arguments))
    (home / "workspace").rename(tmp_path / "elsewhere")
    shutil.copytree(home / "stripes" / "class0", home / "stripes" / "class3")
    for number, path in enumerate((home / "stripes" / "class3").iterdir()):
        with Image.open(path) as image:
            ImageOps.invert(image).rotate(number).save(path)
    outcome = outcome_of(finetune(refusing("cv2"), home, *arguments))  # OpenCV compares val images with similar training images
    manifest = read_json(Path(outcome["bundle"]) / "bundle.json")
    assert len(manifest["classes"]) == 4
    assert manifest["parity"]["reference"].startswith("the features that the head was solved on, from a graph that was compared")
    assert manifest["parity"]["max_prob_difference"] < 1e-5
    assert manifest["frozen"]["digest_before"] == manifest["frozen"]["digest_after"]


@pytest.mark.parametrize("what", ["method", "input size", "weights"])
def test_what_is_not_known_needs_torch(home: Path, weights: Path, what: str, request: pytest.FixtureRequest) -> None:
    arguments = {"method": ("--method", "partial"), "input size": ("--set", "model.input_size_px=96")}.get(what, ())
    if what == "weights":
        times = weights.stat()
        request.addfinalizer(lambda: os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns)))  # other tests know them
        os.utime(weights, (1, 1))
    done = finetune(refusing(), home, "--seed", "4", "--set", "hyperparameters.views=1", *arguments)
    assert done.returncode != 0
    assert "this command needs t" in done.stderr or "this command needs t" in done.stdout
