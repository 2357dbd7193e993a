"""What a bento is made of: the model that was asked for, and exactly what serving needs. `.ci/check_bento.py` asks real ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tiny_bundle import write_tiny_bundle

from finetune import bento
from finetune.bundle.registry import Registry
from finetune.errors import NotFound

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINING = {"torch", "torchvision", "timm", "albumentations", "opencv-python-headless", "mlflow", "onnx", "scikit-learn"}


def names(requirements: list[str]) -> set[str]:
    return {line.partition("==")[0] for line in requirements}


def test_the_requirements_hold_all_that_serving_needs_and_nothing_that_trains() -> None:
    found = bento.core_requirements()
    assert {"bentoml", "fastapi", "onnxruntime", "pillow", "starlette", "numpy", "h11"} <= names(found)
    assert not names(found) & TRAINING
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+", line) for line in found)
    assert found == sorted(found)


def test_the_file_that_bentoml_build_reads_is_what_serving_needs() -> None:
    written = (REPOSITORY / "docker" / "requirements-serve.txt").read_text().splitlines()
    assert names([line for line in written if not line.startswith("#")]) == names(bento.core_requirements())
    constraints = (REPOSITORY / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    assert [line for line in written if not line.startswith("#") and line.lower() not in constraints] == []


def test_every_file_that_the_bentofile_names_exists() -> None:
    options = yaml.safe_load((REPOSITORY / "bentofile.yaml").read_text())
    assert (REPOSITORY / options["python"]["requirements_txt"]).is_file()
    module, _, attribute = options["service"].partition(":")
    assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file()
    assert attribute == "Service"


def test_a_bento_holds_the_version_that_was_asked_for_as_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path / "home" / "models")
    write_tiny_bundle(tmp_path / "bundle")
    for _ in range(3):
        registry.register(tmp_path / "bundle", "trees")
    seen = {}

    def look(context: Path, name: str, labels: dict[str, str]) -> str:
        packed = Registry(context / "models")
        seen["versions"] = [(version.name, version.version) for version in packed.list()]
        seen["default"] = packed.default().version
        seen["requirements"] = (context / "requirements.txt").read_text().splitlines()
        seen["code"] = (context / "service" / "app.py").is_file() and (context / "finetune" / "bento.py").is_file()
        return f"{name}:{labels['model_version']}"

    monkeypatch.setattr(bento, "_built", look)
    assert bento.build_bento(registry, "trees@2") == "trees:2"
    assert seen["versions"] == [("trees", "2")]
    assert seen["default"] == "2"
    assert seen["requirements"] == bento.core_requirements()
    assert seen["code"]
    assert bento.build_bento(registry) == "trees:1"
    with pytest.raises(NotFound):
        bento.build_bento(registry, "trees@9")


def test_only_the_code_of_a_bento_looks_for_models_beside_itself(tmp_path: Path) -> None:
    (tmp_path / "src" / "models").mkdir(parents=True)
    assert bento.models_in_bento(tmp_path / "src") is None
    (tmp_path / "bento.yaml").touch()
    assert bento.models_in_bento(tmp_path / "src") == tmp_path / "src" / "models"
