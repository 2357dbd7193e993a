"""The demo: compare a frozen backbone with full fine-tuning on handwritten digits, and get one prediction from the server.

The digits are the 1,797 8x8 scans of the UCI "Optical Recognition of Handwritten Digits" data set in scikit-learn. They are
written as image files, so that the demo starts from a folder of class folders like a user's own run.
"""

from __future__ import annotations

import csv
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from finetune.comparison_spec import ComparisonSpec, parse_comparison
from finetune.errors import FinetuneError
from finetune.progress import ProgressCallback
from finetune.runs.shared import Shared
from finetune.storage.files import atomic_path, read_json
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.studies.compare import compare
from finetune.studies.compare.result import Comparison
from finetune.studies.compare.study import best_run
from finetune.tracking.process import followed
from finetune.tracking.tracker import choose
from finetune.tracking.view import experiment_name

METHODS = ("linear_probe", "partial", "full")
DIGIT_SIZE_PX = 64


@dataclass(frozen=True)
class DemoResult:
    """The result of the comparison, and the chosen model's prediction over HTTP."""

    comparison: Comparison
    asked: Path
    truth: str
    answer: Mapping[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "comparison": self.comparison.to_dict(),
            "asked": str(self.asked),
            "truth": self.truth,
            "answer": dict(self.answer),
            "seconds": self.seconds,
        }


def run_demo(data: Path | None, workspace: Workspace, progress: ProgressCallback) -> DemoResult:
    """Compare the methods, serve the chosen model, and request its prediction for one test image."""
    began = time.monotonic()
    folder = data or write_digits(workspace.root / "demo" / "digits")
    spec = demo_spec(folder, own_data=data is not None)
    with followed(choose(None), workspace, experiment_name(spec.job)) as begun:
        found = compare(spec, Shared.of(workspace), progress, begun=begun)
    chosen = RunDir(best_run(found).root)
    asked, truth = held_out_image(chosen)
    with serving(chosen.bundle) as url:
        answer = post_image(url, asked)
    return DemoResult(found, asked, truth, answer, time.monotonic() - began)


def demo_spec(folder: Path, *, own_data: bool) -> ComparisonSpec:
    """Return the demo's comparison. The digits get a small input and no augmentation, since mirrored digits are wrong."""
    request: dict[str, Any] = {"training_file": str(folder), "suffix": "demo", "methods": list(METHODS), "seeds": 2}
    if not own_data:
        request |= {"model": {"input_size_px": DIGIT_SIZE_PX}, "augmentation": "none", "hyperparameters": {"n_epochs": 2}}
    return parse_comparison(request)


def write_digits(folder: Path) -> Path:
    """Write scikit-learn's digits as ``folder/<digit>/<number>.png``, once."""
    if (folder / "complete").exists():
        return folder
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        ink = Image.fromarray((scan * (255 / 16)).astype("uint8"))  # (8, 8) float in 0..16 -> u8
        with atomic_path(folder / str(label) / f"{number:04d}.png") as path:
            ink.resize((DIGIT_SIZE_PX, DIGIT_SIZE_PX), Image.Resampling.BICUBIC).save(path, format="PNG")
    (folder / "complete").touch()
    return folder


def held_out_image(run: RunDir) -> tuple[Path, str]:
    """Return the first image of the test split and its true class."""
    root = Path(read_json(run.resolved)["dataset"]["root"])
    with open(run.split, newline="", encoding="utf-8") as stream:
        row = next(row for row in csv.DictReader(stream) if row["split"] == "test")
    return root / row["path"], row["label"]


@contextmanager
def serving(bundle: Path, *, ready_seconds: float = 60) -> Iterator[str]:
    """Run a server on a free port of this machine while the block runs; yield its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "service", "--host", "127.0.0.1", "--port", str(port), "--model", str(bundle), "--no-worker"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _wait_until_ready(url, server, ready_seconds)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            output = server.stderr.read().decode(errors="replace")[-2000:] if server.stderr else ""
            raise ServerFailed(f"the server stopped with exit code {server.returncode} before it was ready:\n{output}")
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise ServerFailed(f"the server was not ready after {seconds:.0f} s; start it by hand to see why: finetune serve")


def post_image(url: str, image: Path) -> dict[str, Any]:
    """POST the file to ``/predict`` and return the decoded response."""
    with open(image, "rb") as stream:
        response = httpx.post(f"{url}/predict", files={"image": (image.name, stream)}, params={"top_k": 3}, timeout=30)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


class ServerFailed(FinetuneError):
    """The server of the demo stopped or did not become ready."""

    code = "server_failed"
