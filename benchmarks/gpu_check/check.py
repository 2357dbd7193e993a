"""Check training on this machine's GPU beside its CPU, from the folder that this file lies in. No network is needed.

    python check.py --out results.json --seconds 450

It runs the GPU tests; a linear probe, partial and full training of the same photographs on both devices; full training in float32
beside bfloat16; and a run that is interrupted and resumed. It prints one table, writes everything as JSON, and ends with exit
code 1 where a check failed. What needs a GPU is skipped with a reason where there is none. `make gpu-check` builds the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
N_EPOCHS = 4
NEEDED = (
    "numpy",
    "scipy",
    "sklearn",
    "torch",
    "timm",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "PIL",
    "yaml",
    "rich",
    "click",
    "pydantic",
)
LEAST_SECONDS = 15.0  # with less time left, nothing new is started
NO_TIME = "no time left"
N_STANDARD_ERRORS = 2.0  # how far two accuracies on the same images may be apart and still count as equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="where the results are written")
    parser.add_argument("--seconds", type=float, default=450.0, help="what does not fit into this time is skipped")
    parser.add_argument("--keep", type=Path, help="keep runs and logs in this folder")
    parser.add_argument("--one-run", nargs=3, metavar=("SPEC", "RUN", "RESULT"), help=argparse.SUPPRESS)
    parser.add_argument("--answers", nargs=3, metavar=("BUNDLE", "IMAGES", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_run:
        return one_run(*map(Path, options.one_run))
    if options.answers:
        return answers(*map(Path, options.answers))
    folder = options.keep or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        check = Check(folder.resolve(), options.out, time.monotonic() + options.seconds)
        check.run()
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if any(one.state == "failed" for one in check.findings) else 0)


@dataclass
class Finding:
    """What one check came to: passed, failed or skipped, and why or with which figures."""

    name: str
    state: str
    detail: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """What one training run measured."""

    name: str
    device: str
    precision: str
    seconds: float
    images_per_second: float | None
    gpu_mib: float | None
    process_mib: float
    val_top1: float
    test_top1: float
    bundle: str
    run: str
    last_loss: float | None


class Check:
    """All steps, in order of importance. Every result is written as soon as it is there."""

    def __init__(self, folder: Path, out: Path, deadline: float) -> None:
        self.folder, self.out, self.deadline = folder, out, deadline
        self.began = time.monotonic()
        self.findings: list[Finding] = []
        self.runs: dict[str, Run] = {}
        self.machine: dict[str, Any] = {}
        self.environment = self._environment()

    def run(self) -> None:
        """Carry out every step, then print what came of it."""
        self.machine = self._look_at_machine()
        if missing := self.machine["missing"]:
            self._add(
                Finding("machine", "failed", f"modules are missing: {', '.join(missing)}. Build the folder with --installed")
            )
            self._show()
            return
        self.cuda = bool(self.machine["cuda"])
        self.no_cuda = "" if self.cuda else "no CUDA device here"
        self._add(self._tests())
        for method in ("linear_probe", "partial", "full"):
            for device in ("cuda", "cpu"):
                self._add(self._train(f"{method} {device}", method, device))
            self._add(self._compare(f"{method}: cuda as cpu", f"{method} cuda", f"{method} cpu"))
        self._add(self._same_answers())
        self._add(self._train("full cuda float32", "full", "cuda", precision="float32"))
        self._add(self._compare("full: bfloat16 as float32", "full cuda", "full cuda float32"))
        self._add(self._precision())
        device = "cuda" if self.cuda else "cpu"
        self._add(self._interrupted(device))
        if device == "cuda":
            self._add(self._compare("resumed as left alone", f"interrupted {device}", f"full {device}"))
        self._show()

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────

    def _tests(self) -> Finding:
        if reason := self._no_time() or self.no_cuda:
            return Finding("GPU tests", "skipped", reason)
        results = self.folder / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
        command += [f"--junitxml={results}", "gpu"]
        ended = self._call("tests", command, cwd=HERE / "tests")
        if not results.exists():
            return Finding("GPU tests", "failed", f"no result: {ended}")
        suite = next(xml.etree.ElementTree.parse(results).getroot().iter("testsuite"))
        figures = {str(one.get("name")): one.get("value") for one in suite.iter("property")}
        cases = list(suite.iter("testcase"))
        failed = [case.get("name") for case in cases if any(case.find(kind) is not None for kind in ("failure", "error"))]
        skipped = [f"{case.get('name')} ({one.get('message')})" for case in cases for one in case.iter("skipped")]
        good = len(cases) - len(failed) - len(skipped)
        detail = f"{good} passed, {len(failed)} failed, {len(skipped)} skipped"
        detail += "".join(f"; failed: {name}" for name in failed) + "".join(f"; skipped: {name}" for name in skipped)
        return Finding("GPU tests", "failed" if failed or not good else "passed", detail, figures)

    def _train(self, name: str, method: str, device: str, precision: str = "auto") -> Finding | None:
        if reason := self._no_time() or (self.no_cuda if device == "cuda" else ""):
            return Finding(f"run {name}", "skipped", reason)
        ended, result = self._start(name, self._spec(name, method, device, precision))
        if result is None:
            return Finding(f"run {name}", "skipped" if ended == NO_TIME else "failed", ended)
        self.runs[name] = result
        return None

    def _compare(self, what: str, one: str, other: str) -> Finding:
        """Accuracies on the same images count as equal within two standard errors of a difference of independent ones."""
        if missing := [name for name in (one, other) if name not in self.runs]:
            return Finding(what, "skipped", f"no run of {' and '.join(missing)}")
        first, second = self.runs[one].test_top1, self.runs[other].test_top1
        n = sum(1 for _ in (HERE / "data" / "test").glob("*/*"))
        mean = (first + second) / 2
        allowed = N_STANDARD_ERRORS * math.sqrt(2 * max(mean * (1 - mean), 1 / n) / n)
        detail = f"test top-1 {first:.3f} and {second:.3f} of {n} images; up to {allowed:.3f} apart is noise"
        return Finding(what, "passed" if abs(first - second) <= allowed else "failed", detail)

    def _same_answers(self) -> Finding:
        """Both probes have the same backbone, so that their answers differ by the features that their heads were solved on."""
        what, names = "probe: answers of both heads", ("linear_probe cuda", "linear_probe cpu")
        if missing := [name for name in names if name not in self.runs]:
            return Finding(what, "skipped", f"no run of {' and '.join(missing)}")
        tables = []
        for name in names:
            result = self.folder / f"answers {name}.json"
            ended = self._call(
                f"answers {name}",
                [sys.executable, __file__, "--answers", self.runs[name].bundle, str(HERE / "data" / "test"), str(result)],
            )
            if not result.exists():
                return Finding(what, "failed", ended)
            tables.append(json.loads(result.read_text()))
        differences = [abs(first[label] - second[label]) for first, second in zip(*tables, strict=True) for label in first]
        same = sum(max(first, key=first.get) == max(second, key=second.get) for first, second in zip(*tables, strict=True))
        share = same / len(tables[0])
        detail = f"same class for {same} of {len(tables[0])} images; probabilities differ by at most {max(differences):.4f}"
        return Finding(what, "passed" if share >= 0.97 else "failed", detail, {"max_difference": max(differences), "same": share})

    def _precision(self) -> Finding:
        """Say which number format full training chose on the GPU, and what that gained."""
        what = "full: chosen precision"
        chosen, exact = self.runs.get("full cuda"), self.runs.get("full cuda float32")
        if not (chosen and exact and chosen.images_per_second and exact.images_per_second):
            return Finding(what, "skipped", "no run of full cuda and full cuda float32")
        ratio = chosen.images_per_second / exact.images_per_second
        return Finding(what, "passed", f"{chosen.precision}, at {ratio:.2f} times the images/s of float32", {"ratio": ratio})

    def _interrupted(self, device: str) -> Finding:
        """Stop a full run after its first epoch, give the same command again, and compare with the run that was left alone."""
        what, name, whole = f"interrupted and resumed on {device}", f"interrupted {device}", f"full {device}"
        if reason := self._no_time() or ("" if whole in self.runs else f"no run of {whole}"):
            return Finding(what, "skipped", reason)
        spec = self._spec(name, "full", device, "auto")
        metrics = self.folder / name / "run" / "metrics.jsonl"
        ended, _ = self._start(name, spec, stop_when=lambda: metrics.exists() and '"train/loss"' in metrics.read_text())
        if ended == NO_TIME:
            return Finding(what, "skipped", NO_TIME)
        if ended != "exit code 130":
            return Finding(what, "failed", f"the interrupted run ended with {ended}, not with exit code 130")
        ended, result = self._start(name, spec)
        if result is None:
            return Finding(what, "skipped" if ended == NO_TIME else "failed", f"the resumed run: {ended}")
        events = [json.loads(line) for line in (self.folder / name / "run" / "events.jsonl").read_text().splitlines()]
        steps = [event.get("step") for event in events if event["kind"] == "resumed"]
        self.runs[name] = result
        if not steps or not steps[0]:
            return Finding(what, "failed", f"it did not resume from a step (resumed: {steps})")
        equal = result.last_loss == self.runs[whole].last_loss and result.test_top1 == self.runs[whole].test_top1
        losses = f"last loss {result.last_loss} and, left alone, {self.runs[whole].last_loss}"
        detail = f"resumed at step {steps[0]}; {'equal to the last digit' if equal else 'not bit-equal'} ({losses})"
        if device == "cpu":
            return Finding(what, "passed" if equal else "failed", detail)
        return Finding(what, "passed", detail)

    # ── means ─────────────────────────────────────────────────────────────────────────────────────

    def _environment(self) -> dict[str, str]:
        """Unpack the wheels beside what is installed and before it."""
        site = self.folder / "site"
        wheels = sorted(str(path) for path in (HERE / "wheels").glob("*.whl"))
        if wheels and not site.exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
            subprocess.run([*command, "--disable-pip-version-check", "--target", str(site), *wheels], check=True)
        paths = [str(site), str(HERE / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths if wheels else paths[1:]),
            "PYTHONUNBUFFERED": "1",
            "FINETUNE_CACHE": str(self.folder / "cache"),
            "FINETUNE_TEST_PHOTOS": str(HERE / "data"),
        }

    def _look_at_machine(self) -> dict[str, Any]:
        script = (
            "import importlib.util as u, json, os, platform; from importlib import metadata\n"
            f"missing = [name for name in {NEEDED!r} if u.find_spec(name) is None]\n"
            "found = dict(python=platform.python_version(), cores=len(os.sched_getaffinity(0)), missing=missing, cuda=None)\n"
            "found['augmentation'] = 'light' if u.find_spec('cv2') else 'none'\n"
            "if not missing:\n"
            "    import torch\n"
            "    names = ('torch', 'timm', 'onnx', 'onnxruntime', 'numpy', 'pillow', 'finetune-images')\n"
            "    found['versions'] = {name: metadata.version(name) for name in names}\n"
            "    if torch.cuda.is_available():\n"
            "        one = torch.cuda.get_device_properties(0)\n"
            "        found['cuda'] = dict(name=one.name, memory_mib=one.total_memory >> 20, runtime=torch.version.cuda,\n"
            "                             bfloat16=torch.cuda.is_bf16_supported())\n"
            "print(json.dumps(found))\n"
        )
        ended = subprocess.run([sys.executable, "-c", script], env=self.environment, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            sys.exit(f"torch cannot be imported here:\n{ended.stderr}")
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return found

    def _spec(self, name: str, method: str, device: str, precision: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        splits = {field: str(HERE / "data" / split) for field, split in
                  (("training_file", "train"), ("validation_file", "val"), ("test_file", "test"))}  # fmt: skip
        request = {
            **splits,
            "method": {"type": method},
            "augmentation": self.machine["augmentation"],
            "compute": {"device": device, "precision": precision},
            "suffix": name.replace(" ", "-").replace("_", "-"),
        }
        if method != "linear_probe":
            request["hyperparameters"] = {"n_epochs": N_EPOCHS}
        (folder / "spec.yaml").write_text(json.dumps(request))
        return folder / "spec.yaml"

    def _start(self, name: str, spec: Path, stop_when: Callable[[], bool] | None = None) -> tuple[str, Run | None]:
        """Train in a process of its own, in a workspace of its own."""
        result = spec.with_name("result.json")
        result.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--one-run", str(spec), str(spec.with_name("run")), str(result)]
        environment = {"FINETUNE_HOME": str(spec.with_name("workspace"))}
        ended = self._call(name, command, environment, stop_when=stop_when)
        if not result.exists():
            return ended, None
        return ended, Run(name=name, **json.loads(result.read_text()))

    def _call(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stop_when: Callable[[], bool] | None = None,
    ) -> str:
        """Run a command until its end or the deadline, or until `stop_when` says to interrupt it; say how it ended."""
        print(f"{time.monotonic() - self.began:5.0f} s  {name} …", flush=True)
        log = self.folder / f"{name}.log"
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                command,
                env={**self.environment, **(environment or {})},
                cwd=cwd,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    if time.monotonic() > self.deadline:
                        return NO_TIME
                    if stop_when is not None and stop_when():
                        process.terminate()
                        stop_when = None
                    time.sleep(0.02)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode in (0, 130):
            return f"exit code {process.returncode}"
        return f"exit code {process.returncode}: {log.read_text(errors='replace')[-1500:]}"

    def _no_time(self) -> str:
        left = self.deadline - time.monotonic()
        return "" if left > LEAST_SECONDS else NO_TIME

    def _add(self, finding: Finding | None) -> None:
        if finding is not None:
            self.findings.append(finding)
        self._write()

    def _write(self) -> None:
        document = {
            "machine": self.machine,
            "data": json.loads((HERE / "folder.json").read_text()),
            "seconds": round(time.monotonic() - self.began, 1),
            "runs": [asdict(run) for run in self.runs.values()],
            "findings": [asdict(finding) for finding in self.findings],
        }
        self.out.write_text(json.dumps(document, indent=2) + "\n")

    def _show(self) -> None:
        cuda = self.machine.get("cuda")
        print(f"\n{cuda['name'] if cuda else 'no CUDA device'}, {self.machine['cores']} cores")
        print(", ".join(f"{name} {version}" for name, version in self.machine.get("versions", {}).items()) + "\n")
        header = ("run", "seconds", "images/s", "precision", "GPU MiB", "process MiB", "val top-1", "test top-1")
        rows = [
            (run.name, f"{run.seconds:.1f}", _figure(run.images_per_second), run.precision, _figure(run.gpu_mib),
             _figure(run.process_mib), f"{run.val_top1:.3f}", f"{run.test_top1:.3f}")
            for run in self.runs.values()
        ]  # fmt: skip
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                            for column, (cell, width) in enumerate(zip(row, widths, strict=True))))  # fmt: skip
        print()
        for finding in self.findings:
            print(f"{finding.state:8} {finding.name}: {finding.detail}")
        for finding in self.findings:
            for name, value in finding.figures.items():
                print(f"         {finding.name}: {name} = {value}")
        print(f"\n{time.monotonic() - self.began:.0f} s in all; everything is in {self.out}")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


# ── in processes of their own ─────────────────────────────────────────────────────────────────────


def finetune(*arguments: str) -> Any:
    """Run the command in this process and return its JSON document, so that the process's GPU memory can be asked afterwards."""
    from finetune.cli import main as command

    sys.argv = ["finetune", *arguments, "--json"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            command()
    except SystemExit as leaving:
        if leaving.code:
            raise
    return json.loads(printed.getvalue())


def one_run(spec: Path, run: Path, result: Path) -> None:
    began = time.perf_counter()
    outcome = finetune("train", str(spec), "--run-dir", str(run))
    seconds = time.perf_counter() - began
    import torch

    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    journal = [json.loads(line)["values"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    settings: dict[str, Any] = next((event["settings"] for event in events if "settings" in event), {})
    rates = [values["train/images_per_second"] for values in journal if "train/images_per_second" in values]
    losses = [values["train/loss"] for values in journal if "train/loss" in values]
    metrics, cost = outcome["metrics"], outcome["cost"]
    n_images = sum(1 for split in ("train", "val") for _ in (HERE / "data" / split).glob("*/*"))
    document = {
        "device": json.loads(spec.read_text())["compute"]["device"],
        "precision": settings.get("precision", "–"),
        "seconds": seconds,
        "images_per_second": sorted(rates)[len(rates) // 2] if rates else n_images / cost["train_seconds"],
        "gpu_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        "process_mib": cost["peak_memory_bytes"] / 2**20,
        "val_top1": metrics["val/top1"],
        "test_top1": metrics["test/top1"],
        "bundle": outcome["bundle"],
        "run": str(run),
        "last_loss": losses[-1] if losses else None,
    }
    result.write_text(json.dumps(document))


def answers(bundle: Path, images: Path, result: Path) -> None:
    """Write the probability of every class for every image."""
    files = sorted(str(path) for path in images.glob("*/*"))
    n_classes = sum(1 for _ in images.iterdir())
    documents = finetune("predict", *files, "--model", str(bundle), "--top-k", str(n_classes))
    table = [{row["label"]: row["probability"] for row in document["predictions"]} for document in documents]
    result.write_text(json.dumps(table))


if __name__ == "__main__":
    main()
