"""Build a folder with everything that a machine with CUDA but no network lacks, and one script to run there.

    python benchmarks/gpu_check/build.py --data photos --python 3.12 --installed packages.txt

The other machine has CUDA, torch, torchvision, timm, onnx and onnxruntime of any version, which are never taken along. What else
it has is read from ``--installed``, the output of ``pip list --format=freeze`` there; without it, what images with PyTorch
commonly hold is assumed, and said. Wheels of everything else that training needs go into the folder, for the Python given and
Linux on x86-64, at the versions that are installed here: the project's own, its default weights and pytest; beside them go the
tests of the GPU. Serving and tracking stay behind. The images are photographs from ``--data``, made smaller, or scikit-learn's
digits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PHOTOGRAPHS = REPOSITORY.parent / "shared" / "data" / "clothing"  # where it is there; otherwise digits

GIVEN = {"torch", "torchvision", "timm", "onnx", "onnxruntime"}
NOT_FOR_TRAINING = {
    "alembic", "bentoml", "fastapi", "httptools", "mlflow", "prometheus-client", "python-multipart", "starlette", "uvicorn",
}  # fmt: skip
COMMON = {
    "anyio", "certifi", "charset-normalizer", "click", "contourpy", "cycler", "filelock", "flatbuffers", "fonttools", "fsspec",
    "h11", "hf-xet", "httpcore", "httpx", "huggingface-hub", "idna", "iniconfig", "jinja2", "joblib", "kiwisolver",
    "markdown-it-py", "markupsafe", "matplotlib", "mdurl", "ml-dtypes", "mpmath", "narwhals", "networkx", "numpy", "onnx-ir",
    "onnxscript", "opencv-python-headless", "packaging", "pluggy", "protobuf", "psutil", "pygments", "pyparsing", "pytest",
    "pytest-timeout", "python-dateutil", "pyyaml", "requests", "rich", "safetensors", "scikit-learn", "scipy", "setuptools",
    "six", "sympy", "threadpoolctl", "tqdm", "typing-extensions", "urllib3",
}  # fmt: skip
LIMIT_MIB = 56.0
SPLITS = {"train": 36, "val": 10, "test": 16}  # images of each class
SHORT_SIDE_PX, QUALITY = 224, 82


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".gpu-check")
    parser.add_argument("--data", type=Path, help="class folders, or train and validation with class folders inside")
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="the other machine's, e.g. 3.12")
    parser.add_argument("--installed", type=Path, help="pip list --format=freeze of the other machine")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)

    installed = read_installed(options.installed) if options.installed else dict.fromkeys(COMMON, "")
    needed = list(needed_wheels(installed, options.python))
    build_own_wheel(options.out / "wheels")
    download(needed, options.python, options.out / "wheels")
    data = options.data or (PHOTOGRAPHS if PHOTOGRAPHS.is_dir() else None)
    n_images = write_photographs(data, options.out / "data") if data else write_digits(options.out / "data")
    copy_tests(options.out / "tests")
    for script in ("check.py", "sustained.py"):
        shutil.copy(HERE / script, options.out / script)
    kind = "photographs" if data else "digits"
    assumed = "" if options.installed else "assumed: nobody gave a list of what is installed there"
    facts = {"python": options.python, "images": n_images, "kind": kind, "wheels": needed, "note": assumed}
    (options.out / "folder.json").write_text(json.dumps(facts, indent=2) + "\n")
    report(options.out, options.python, assumed)


# ── wheels ────────────────────────────────────────────────────────────────────────────────────────


def read_installed(path: Path) -> dict[str, str]:
    """Return canonical names with versions; a version is empty where the line has none."""
    found = {}
    for line in filter(None, map(str.strip, path.read_text().splitlines())):
        name, _, version = line.partition("==") if "==" in line else (line.partition(" @ ")[0], "", "")
        found[canonicalize_name(name)] = version
    return found


def needed_wheels(installed: dict[str, str], python: str) -> Iterator[str]:
    """Yield ``name==version`` of what training and its tests need and the other machine lacks, however indirectly."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    environment = {
        **{k: str(v) for k, v in default_environment().items()},
        "python_version": python,
        "python_full_version": f"{python}.0",
        "extra": "",
    }
    waiting = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["train"])]
    waiting += [Requirement("pytest"), Requirement("pytest-timeout")]
    seen = set(GIVEN | NOT_FOR_TRAINING)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate(environment)):
            continue
        seen.add(name)
        if name in installed and (not installed[name] or requirement.specifier.contains(installed[name], prereleases=True)):
            continue
        yield f"{name}=={metadata.version(name)}"
        waiting += [Requirement(line) for line in metadata.requires(name) or ()]


def build_own_wheel(target: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", target, REPOSITORY], check=True, stdout=subprocess.DEVNULL
    )


def download(needed: list[str], python: str, target: Path) -> None:
    """Fetch one wheel for each, for another machine's Python: pip then matches each platform tag literally."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(target)]
    command += ["--implementation", "cp", "--python-version", python]
    command += [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*command, *needed], check=True)


# ── images and tests ──────────────────────────────────────────────────────────────────────────────


def write_photographs(source: Path, target: Path) -> int:
    """Write `SPLITS` images of each class, the smaller side `SHORT_SIDE_PX`; which ones depends on their names alone."""
    roots = [source / name for name in ("train", "validation", "val") if (source / name).is_dir()] or [source]
    names = sorted({folder.name for root in roots for folder in root.iterdir() if folder.is_dir()})
    count = 0
    for name in names[:10]:
        files = [path for root in roots for path in (root / name).glob("*.*")]
        files.sort(key=lambda path: hashlib.sha256(path.name.encode()).digest())
        taken = iter(files)
        for split, wanted in SPLITS.items():
            (target / split / name).mkdir(parents=True)
            for number in range(wanted):
                path = next(taken, None)
                if path is None:
                    raise SystemExit(f"{source}: class {name!r} has {len(files)} images, and {sum(SPLITS.values())} are taken")
                with Image.open(path) as image:
                    image.draft("RGB", (2 * SHORT_SIDE_PX, 2 * SHORT_SIDE_PX))
                    upright = ImageOps.exif_transpose(image).convert("RGB")
                scale = SHORT_SIDE_PX / min(upright.size)
                size = (round(upright.width * scale), round(upright.height * scale))
                upright.resize(size, Image.Resampling.BICUBIC).save(target / split / name / f"{number:03d}.jpg", quality=QUALITY)
                count += 1
    return count


def write_digits(target: Path) -> int:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        scans = digits.images[digits.target == label]
        taken = iter(scans)
        for split, wanted in SPLITS.items():
            folder = target / split / str(label)
            folder.mkdir(parents=True)
            for number in range(wanted):
                ink = Image.fromarray((next(taken) * (255 / 16)).astype("uint8"))
                ink.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    return 10 * sum(SPLITS.values())


def copy_tests(target: Path) -> None:
    """Take the GPU tests and the helpers beside them; the project's own pytest settings name packages that stay behind."""
    target.mkdir()
    for path in (REPOSITORY / "tests").glob("*.py"):
        shutil.copy(path, target)
    shutil.copytree(REPOSITORY / "tests" / "gpu", target / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    markers = project["tool"]["pytest"]["ini_options"]["markers"]
    (target / "pytest.ini").write_text("[pytest]\nmarkers =\n" + "".join(f"    {marker}\n" for marker in markers))


def report(folder: Path, python: str, assumed: str) -> None:
    parts = {"wheels": 0, "data": 0, "the rest": 0}
    for path in folder.rglob("*"):
        if path.is_file():
            top = path.relative_to(folder).parts[0]
            parts[top if top in parts else "the rest"] += path.stat().st_size
    total = sum(parts.values()) / 2**20
    print(f"{folder}: {total:.1f} MiB for Python {python}: {', '.join(f'{k} {v / 2**20:.1f}' for k, v in parts.items())}")
    if assumed:
        print(f"What is installed there is {assumed}. Better: pip list --format=freeze > packages.txt there, then --installed")
    if total > LIMIT_MIB:
        wheels = sorted((folder / "wheels").glob("*.whl"), key=lambda path: -path.stat().st_size)[:6]
        largest = ", ".join(f"{path.name.partition('-')[0]} {path.stat().st_size / 2**20:.1f}" for path in wheels)
        raise SystemExit(f"that is more than {LIMIT_MIB:.0f} MiB; the largest wheels: {largest}")
    print("There: python check.py (about eight minutes at most; --help shows more)")


if __name__ == "__main__":
    main()
