#!/usr/bin/env python3
"""Build the source distribution and the wheel, and use the wheel alone, in an environment and a folder of its own.

With the core dependencies: the command, `predict` and `serve` on a bundle, and the hint that training needs an extra. Then with
the extra "train": the demonstration, from images to an answer over HTTP. Run it with a Python that has `build`, from anywhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from processes import answers, clean_environment, free_port, run, serving

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--core-only", action="store_true", help="leave out the extra 'train' and the demonstration")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="finetune-wheel-") as name:
        folder = Path(name)
        wheel = build(folder / "dist")
        step(began, f"built {wheel.name}")
        check_contents(wheel)
        step(began, "the wheel holds every file of both packages")
        bundle, image = make_bundle(folder / "material")
        python = new_environment(folder / "environment", [str(wheel)])
        step(began, "installed with the core dependencies")
        check_core(python, bundle, image, folder)
        step(began, "core: help, predict, serve and the hint for training work")
        if not options.core_only:
            install(python, [f"{wheel}[train]"])
            step(began, "installed with the extra train")
            check_demo(python, folder)
            step(began, "train: the demonstration works")
    print("wheel: all checks passed", flush=True)


def step(began: float, what: str) -> None:
    print(f"wheel: {time.monotonic() - began:5.0f} s  {what}", flush=True)


def build(target: Path) -> Path:
    """Build a wheel from the source distribution, not from the checkout, so that both are proven."""
    run([sys.executable, "-m", "build", "--outdir", str(target), str(REPOSITORY)], cwd=REPOSITORY)
    assert len(list(target.glob("*.tar.gz"))) == 1, list(target.iterdir())
    (wheel,) = target.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Compare the wheel with what git tracks in the packages, and look for licence and notices."""
    listed = run(["git", "ls-files", "finetune", "service"], cwd=REPOSITORY).splitlines()
    assert len(listed) > 100, "git lists too few files to be this repository"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = {Path(name).name for name in archive.namelist() if ".dist-info/licenses/" in name}
    assert held == set(listed), f"missing: {sorted(set(listed) - held)}, not tracked: {sorted(held - set(listed))}"
    assert licences == {"LICENSE", "NOTICE"}, licences


def make_bundle(folder: Path) -> tuple[Path, Path]:
    """Write a small true bundle and an image, with the checkout's test helpers: the environment under test cannot train."""
    script = (
        "import sys; from pathlib import Path; from PIL import Image; from tiny_bundle import write_tiny_bundle; "
        "folder = Path(sys.argv[1]); folder.mkdir(); write_tiny_bundle(folder / 'bundle'); "
        "Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert('RGB').save(folder / 'image.png')"
    )
    run([sys.executable, "-c", script, str(folder)], environment={"PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}"})
    return folder / "bundle", folder / "image.png"


def new_environment(folder: Path, requirements: list[str]) -> Path:
    run([sys.executable, "-m", "venv", str(folder)])
    python = folder / "bin" / "python"
    install(python, ["pip"])
    install(python, requirements)
    return python


def install(python: Path, requirements: list[str]) -> None:
    constraints = str(REPOSITORY / "constraints.txt")
    run([str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", constraints, *requirements])


def check_core(python: Path, bundle: Path, image: Path, folder: Path) -> None:
    finetune = str(python.with_name("finetune"))
    outside = folder / "elsewhere"
    outside.mkdir()
    where = run([str(python), "-c", "import finetune; print(finetune.__file__)"], cwd=outside)
    assert str(folder) in where, f"imported {where} instead of the installed package"
    no_torch = run([str(python), "-c", "import importlib.util as u; print(u.find_spec('torch'))"], cwd=outside)
    assert no_torch.strip() == "None", no_torch
    for arguments in (["--help"], ["--version"], ["models", "list"], ["train", "--help"], ["jobs", "--help"]):
        run([finetune, *arguments], cwd=outside)
    training = [finetune, "train", "--data", str(image.parent)]
    refused = subprocess.run(training, cwd=outside, env=clean_environment({}), capture_output=True, text=True, check=False)
    assert refused.returncode == 2, refused
    assert "pip install 'finetune-images[train]'" in refused.stderr, refused.stderr
    (answer,) = json.loads(run([finetune, "predict", str(image), "--model", str(bundle), "--json"], cwd=outside))
    served = ask_server(finetune, bundle, image, outside)
    assert served["predictions"][0]["label"] == answer["predictions"][0]["label"], (served, answer)


def ask_server(finetune: str, bundle: Path, image: Path, outside: Path) -> dict:
    port = free_port()
    with serving([finetune, "serve", "--no-worker", "--port", str(port), "--model", str(bundle)], port, outside) as url:
        assert answers(f"{url}/"), "the page is not served: are the static files in the wheel?"
        request = urllib.request.Request(f"{url}/predict", image.read_bytes(), {"Content-Type": "image/png"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)


def check_demo(python: Path, folder: Path) -> None:
    outside = folder / "demo"
    outside.mkdir()
    result = json.loads(run([str(python.with_name("finetune")), "demo", "--json"], cwd=outside))
    accuracies = {arm["name"]: arm["metrics"]["test/top1"]["value"] for arm in result["comparison"]["arms"]}
    assert set(accuracies) == {"linear_probe", "partial", "full"}, accuracies
    assert min(accuracies.values()) > 0.85, accuracies
    assert result["comparison"]["verdict"]["choose"] in accuracies, result["comparison"]["verdict"]
    assert result["answer"]["predictions"], result["answer"]
    print(f"wheel: demo accuracies {accuracies}", flush=True)


if __name__ == "__main__":
    assert shutil.which("git"), "needs git"
    main()
