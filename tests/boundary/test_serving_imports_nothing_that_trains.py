"""What serves, queues and reads bundles works in a process where nothing that trains can be imported."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import write_tiny_bundle

import finetune

FORBIDDEN = ("torch", "torchvision", "timm", "albumentations", "cv2", "mlflow", "onnx", "sklearn", "scipy", "matplotlib")

# Modules that call themselves torch-free may make ONNX files, which serving does not.
OF_TORCH = (*(name for name in FORBIDDEN if name != "onnx"), "onnxscript", "onnx_ir")

PRELUDE = """
import importlib, importlib.abc, json, pkgutil, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} is not installed where models are served")

sys.meta_path.insert(0, Refuse())

def modules(package):
    found = importlib.import_module(package)
    walked = pkgutil.walk_packages(found.__path__, package + ".") if hasattr(found, "__path__") else ()
    return [package, *(module.name for module in walked if not module.name.endswith("__main__"))]
"""


def run(code: str, *arguments: str, cwd: Path, forbidden: tuple[str, ...] = FORBIDDEN) -> str:
    """Standard output of `code` in a fresh process in which the `forbidden` packages cannot be imported."""
    code = f"FORBIDDEN = {forbidden!r}\n{PRELUDE}{code}"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_refusal_itself_works(tmp_path: Path) -> None:
    code = """
try:
    import numpy, torch
except ImportError as error:
    print(error)
"""
    assert run(code, cwd=tmp_path).strip() == "torch is not installed where models are served"


@pytest.mark.parametrize(
    ("package", "at_least"),
    [
        ("finetune.errors", 1),
        ("finetune.spec", 1),
        ("finetune.storage", 5),
        ("finetune.runtime", 2),
        ("finetune.progress", 1),
        ("finetune.bundle", 7),
        ("finetune.jobs", 2),
        ("service", 2),
        ("finetune.data.sources", 3),
        ("finetune.data.index", 1),
        ("finetune.data.check", 1),
        ("finetune.data.split", 1),
        ("finetune.data.pixels", 1),
        ("finetune.events", 1),
        ("finetune.naming", 1),
        ("finetune.messages", 1),
        ("finetune.tasks", 3),
        ("finetune.metrics", 6),
        ("finetune.evaluation.of_bundle", 1),
        ("finetune.evaluation.tables", 1),
        ("finetune.runs.outcome", 1),
    ],
)
def test_every_module_of_the_ground_floor_imports_alone(package: str, at_least: int, tmp_path: Path) -> None:
    code = """
names = modules(sys.argv[1])
for name in names:
    importlib.import_module(name)
print(json.dumps({"imported": names, "loaded": sorted(sys.modules)}))
"""
    said = json.loads(run(code, package, cwd=tmp_path).splitlines()[-1])
    assert len(said["imported"]) >= at_least
    assert not {name.partition(".")[0] for name in said["loaded"]} & set(FORBIDDEN)


def test_what_calls_itself_torch_free_is(tmp_path: Path) -> None:
    """Every module, or package, whose first lines say so."""
    root = Path(finetune.__file__).parents[1]
    said = []
    for path in sorted((root / "finetune").rglob("*.py")):
        if "torch-free" in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").lower():
            said.append(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
    assert len(said) > 40
    code = """
for name in sys.argv[1:]:
    importlib.import_module(name)
print("imported")
"""
    assert run(code, *said, cwd=tmp_path, forbidden=OF_TORCH).strip() == "imported"


def test_a_bundle_is_loaded_registered_and_asked_without_anything_that_trains(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    code = """
from pathlib import Path
from finetune.bundle.overlay import overlay_png
from finetune.bundle.predictor import Predictor, read_self_test
from finetune.bundle.registry import Registry

version = Registry(Path("models")).register(Path("bundle"), "trees")
prediction = Predictor.load(version.path).predict(read_self_test(version.path / "probe.npz").encoded[0])
png = overlay_png(prediction.image, prediction.cam)
print(json.dumps([prediction.name, prediction.version, len(prediction.labels), len(png) > 0]))
"""
    assert json.loads(run(code, cwd=tmp_path)) == ["trees", "1", 5, True]
