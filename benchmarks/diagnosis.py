"""Does `finetune diagnose` name what is wrong with a run, and nothing where nothing is?

    python benchmarks/diagnosis.py --out runs --results benchmarks/results/diagnosis.json

Trains healthy runs and runs with one injected fault each (`faults.py`) on small real data: scikit-learn's digits, and photographs
of clothes where they are (``--photographs``). Run folders stay in ``--out`` and are not made again, so that rules can be tried on
them (``--judge-only``). ``--lock FILE`` waits for a lock before every run, for machines that others use too.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faults
import torch
from faults import Normalisation
from PIL import Image, ImageOps
from safetensors.torch import save_file

from finetune.demo import write_digits
from finetune.errors import FinetuneError
from finetune.evaluation.diagnose import diagnose
from finetune.runs.options import RunOptions
from finetune.runs.shared import Shared
from finetune.spec import parse_spec
from finetune.storage.files import atomic_path
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.studies.carry_out import carry_out

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clothing" / "train"
PHOTOGRAPH_SIDE_PX = 128
PER_CLASS = 320  # at most; the smallest class has about a hundred
SMALL = "residual14_bn"

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BYTES = Normalisation((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
BLUE_FIRST = Normalisation(HALVES.mean, HALVES.std, bgr=True)


@dataclass(frozen=True)
class Lab:
    """Where everything is, and what is made once for all runs."""

    out: Path
    photographs: Path | None
    shared: Shared

    def digits(self) -> Path:
        return write_digits(self.out / "data" / "digits")

    def new_digits(self) -> Path:
        """Return the digits 5 to 9; the small network has been trained on the others."""
        return self._some_digits("56789")

    def old_digits(self) -> Path:
        return self._some_digits("01234")

    def _some_digits(self, wanted: str) -> Path:
        folder = self.out / "data" / f"digits-{wanted}"
        if not folder.exists():
            for digit in wanted:
                shutil.copytree(self.digits() / digit, folder / digit)
        return folder

    def clothes(self) -> Path:
        """Return some photographs of each class, made small."""
        folder = self.out / "data" / "clothes"
        assert self.photographs is not None
        for source in sorted(self.photographs.iterdir()):
            for path in sorted(source.iterdir())[:PER_CLASS]:
                target = folder / source.name / f"{path.stem}.jpg"
                if not target.exists():
                    with Image.open(path) as image, atomic_path(target) as written:
                        small = ImageOps.exif_transpose(image).convert("RGB")
                        small.thumbnail((2 * PHOTOGRAPH_SIDE_PX,) * 2, Image.Resampling.BICUBIC)
                        small.save(written, format="JPEG", quality=90)
        return folder

    def small_weights(self) -> Path:
        """Return weights of a small network that was trained on the digits 0 to 4."""
        path = self.out / "weights" / f"{SMALL}.safetensors"
        if not path.exists():
            request = scratch(SMALL, n_epochs=10) | {"training_file": str(self.old_digits())}
            run = RunDir(self.out / "weights" / "run")
            carry_out(parse_spec(request), run, self.shared, options=RunOptions(goal="judged"))
            newest = sorted(run.checkpoints.glob("*.pt"))[-1]
            model = torch.load(newest, weights_only=False)["model"]
            prefix = "backbone.module."
            state = {name.removeprefix(prefix): t.contiguous() for name, t in model.items() if name.startswith(prefix)}
            save_file(state, path)
        return path

    def lite_weights(self, expected: Normalisation) -> Path:
        """Return the default weights, changed to expect another normalisation than the run will use."""
        from finetune.model.backbone import build_backbone

        name = "-".join(f"{value:.3f}" for value in (*expected.mean, *expected.std)) + ("-bgr" if expected.bgr else "")
        path = self.out / "weights" / f"lite0-{name}.safetensors"
        if not path.exists():
            backbone = build_backbone("tf_efficientnet_lite0")
            own = Normalisation(backbone.preprocess.mean, backbone.preprocess.std)
            faults.weights_expecting(backbone.module.state_dict(), "conv_stem", "bn1", own, expected, path)
        return path


# ── the runs ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Case:
    """One run: what is asked for, what is done to it, and what a diagnosis should say first.

    Args:
        expected: codes of findings of which the first finding must be one; none for a healthy run.
        request: what to train on, made when it is needed.
        against: the name of the case that this run is compared with.
    """

    name: str
    expected: frozenset[str]
    request: Callable[[Lab], Mapping[str, Any]]
    inject: faults.Inject = faults.nothing
    against: str | None = None
    needs_photographs: bool = False


def scratch(backbone: str, n_epochs: int = 8, **hyperparameters: Any) -> dict[str, Any]:
    """Return a request for training a small network from nothing."""
    return {
        "model": {"backbone": backbone, "weights": "none", "input_size_px": 32},
        "method": {"type": "full", "warm_head": False, "bn": "train"},
        "augmentation": "none",
        "compute": {"threads": 1},
        "hyperparameters": {
            "n_epochs": n_epochs,
            "batch_size": 32,
            "label_smoothing": 0.0,
            "early_stopping_epochs": None,
            **hyperparameters,
        },
    }


def on_digits(lab: Lab, seed: int, backbone: str, **hyperparameters: Any) -> dict[str, Any]:
    return scratch(backbone, **hyperparameters) | {
        "training_file": str(lab.digits()),
        "seed": seed,
        "data": {"split_seed": seed},
    }


def transfer(lab: Lab, seed: int, method: Any = "full", data: Path | None = None, **hyperparameters: Any) -> dict[str, Any]:
    """Return a request for fine-tuning the small network on the digits that it has not seen."""
    return {
        "training_file": str(data or lab.new_digits()),
        "model": {"backbone": SMALL, "weights": str(lab.small_weights()), "input_size_px": 32},
        "method": method,
        "augmentation": "none",
        "compute": {"threads": 1},
        "seed": seed,
        "data": {"split_seed": seed},
        "hyperparameters": {"n_epochs": 8, "learning_rate": 3e-3, **hyperparameters} if method != "linear_probe" else {},
    }


def divided(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the request for data that has its own train and val folders."""
    return request | {"training_file": str(folder / "train"), "validation_file": str(folder / "val")}


def on_clothes(lab: Lab, seed: int, method: Any, data: Path | None = None, **more: Any) -> dict[str, Any]:
    request = {
        "training_file": str(data or lab.clothes()),
        "model": {"input_size_px": 128, **more.pop("model", {})},
        "method": method,
        "augmentation": "none",  # so that what is frozen is computed once for all runs
        "compute": {"threads": 1},
        "seed": seed,
        "data": {"split_seed": seed},
        "hyperparameters": {},
    }
    if method != "linear_probe":
        request["hyperparameters"] = {"n_epochs": 5, **more.pop("hyperparameters", {})}
    return request | more


def healthy_cases(seeds: Iterable[int]) -> Iterator[Case]:
    """Yield runs with which nothing is wrong, trained for long enough to fit their training images."""
    for seed in seeds:
        named = partial(Case, expected=frozenset())
        for method in ("linear_probe", "partial", "full", "gradual"):
            asked = {"type": "partial", "stages": 2} if method == "partial" else method
            yield named(f"transfer-{method}-{seed}", request=partial(transfer, seed=seed, method=asked))
        for backbone in ("residual8_bn", "residual14_bn", "plain8_bn"):
            yield named(f"scratch-{backbone}-{seed}", request=partial(on_digits, seed=seed, backbone=backbone, n_epochs=16))
        for method in ("linear_probe", "partial"):
            yield named(f"clothes-{method}-{seed}", request=partial(on_clothes, seed=seed, method=method), needs_photographs=True)
        yield named(f"digits-lite0-{seed}", request=partial(_on_lite_digits, seed=seed))


def _on_lite_digits(lab: Lab, seed: int) -> dict[str, Any]:
    return {
        "training_file": str(lab.digits()),
        "model": {"input_size_px": 64},
        "method": "linear_probe",
        "augmentation": "none",
        "compute": {"threads": 1},
        "data": {"split_seed": seed},
    }


def faulty_cases(seeds: Iterable[int]) -> Iterator[Case]:
    """Yield runs with one fault each; the first word of a name is the fault."""
    for seed in seeds:

        def case(fault: str, setting: str, expected: str, seed: int = seed, **more: Any) -> Case:
            return Case(f"{fault}-{setting}-{seed}", frozenset(expected.split("|")), **more)

        yield case("lr_high", "transfer", "learning_rate_high", request=partial(transfer, seed=seed, learning_rate=0.3))
        yield case(
            "lr_high", "scratch", "learning_rate_high",
            request=partial(on_digits, seed=seed, backbone="plain8_he", learning_rate_multiplier=100.0),
        )  # fmt: skip
        yield case("lr_low", "transfer", "learning_rate_low", request=partial(transfer, seed=seed, learning_rate_multiplier=1e-4))
        yield case(
            "lr_low", "scratch", "learning_rate_low",
            request=partial(on_digits, seed=seed, backbone="residual8_bn", learning_rate_multiplier=1e-4),
        )  # fmt: skip
        yield case("shallow", "plain8", "", request=partial(on_digits, seed=seed, backbone="plain8_bn", n_epochs=6))
        for backbone in ("plain26", "plain44_bn"):
            yield case(
                "deep", backbone, "degradation|vanishing_gradients",
                request=partial(on_digits, seed=seed, backbone=backbone, n_epochs=6), against=f"shallow-plain8-{seed}",
            )  # fmt: skip
        yield case(
            "dead", "transfer", "dead_units", request=partial(transfer, seed=seed), inject=partial(faults.biases_sunk, 4, 60)
        )
        yield case(
            "dead", "scratch", "dead_units",
            request=partial(on_digits, seed=seed, backbone="plain8_he"), inject=partial(faults.biases_sunk, 2, 100),
        )  # fmt: skip
        yield case("shuffled", "transfer-full", "shuffled_labels", request=partial(_on_shuffled, seed=seed, method="full"))
        yield case(
            "shuffled", "transfer-probe", "shuffled_labels", request=partial(_on_shuffled, seed=seed, method="linear_probe")
        )
        yield case(
            "few", "clothes", "overfitting", request=partial(_on_few, seed=seed, setting="clothes"), needs_photographs=True
        )
        yield case("few", "scratch", "overfitting", request=partial(_on_few, seed=seed, setting="scratch"))
        yield case(
            "frozen", "gradient", "frozen_stage", request=partial(transfer, seed=seed), inject=partial(faults.stage_left_out, 3)
        )
        yield case(
            "frozen", "rate", "frozen_stage",
            request=partial(on_digits, seed=seed, backbone="residual8_bn"), inject=partial(faults.stage_without_learning_rate, 1),
        )  # fmt: skip
        for share in (0.4, 1.0):
            yield case("leak", f"transfer-{share:g}", "leakage", request=partial(_on_leaked, seed=seed, share=share))
        for method in ("linear_probe", "full"):
            yield case("collapse", method, "collapsed_classes", request=partial(_on_merged, seed=seed, method=method))
        for name, expected in (("imagenet", IMAGENET), ("bytes", BYTES), ("bgr", BLUE_FIRST)):
            yield case(
                "preprocessing", name, "preprocessing", request=partial(_on_wrong_weights, seed=seed, expected=expected),
                needs_photographs=True,
            )  # fmt: skip
        yield case("short", "scratch", "underfitting|learning_rate_low",
            request=partial(on_digits, seed=seed, backbone="residual14_bn", n_epochs=1, learning_rate=1e-4),
        )  # fmt: skip


def _on_shuffled(lab: Lab, seed: int, method: str) -> dict[str, Any]:
    folder = lab.out / "data" / f"shuffled-{seed}"
    if not folder.exists():
        faults.shuffled_labels(lab.new_digits(), folder, seed)
    return transfer(lab, seed, method, folder)


def _on_few(lab: Lab, seed: int, setting: str) -> dict[str, Any]:
    folder = lab.out / "data" / f"few-{setting}-{seed}"
    source, per_class = (lab.clothes(), 3) if setting == "clothes" else (lab.digits(), 4)
    if not folder.exists():
        faults.few_images(source, folder, seed, per_class)
    if setting == "clothes":
        return divided(on_clothes(lab, seed, "partial", hyperparameters={"n_epochs": 30}), folder)
    return divided(on_digits(lab, seed, "residual8_bn", n_epochs=60, batch_size=8, learning_rate=1e-2), folder)


def _on_leaked(lab: Lab, seed: int, share: float) -> dict[str, Any]:
    folder = lab.out / "data" / f"leaked-{share:g}-{seed}"
    if not folder.exists():
        faults.leaked(lab.new_digits(), folder, seed, share)
    return divided(transfer(lab, seed), folder)


def _on_merged(lab: Lab, seed: int, method: str) -> dict[str, Any]:
    folder = lab.out / "data" / f"merged-{seed}"
    if not folder.exists():
        faults.classes_merged(lab.new_digits(), folder, seed, kept=3)
    return divided(transfer(lab, seed, method), folder)


def _on_wrong_weights(lab: Lab, seed: int, expected: Normalisation) -> dict[str, Any]:
    return on_clothes(lab, seed, "linear_probe", model={"weights": str(lab.lite_weights(expected))})


# ── making and judging them ───────────────────────────────────────────────────────────────────────


@contextmanager
def waiting_for(lock: Path | None) -> Iterator[None]:
    """Hold an advisory lock while the block runs."""
    if lock is None:
        yield
        return
    with open(lock, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def make(case: Case, lab: Lab) -> None:
    """Train the case's run, unless its folder is finished; a run that fails is a result too."""
    run = RunDir(lab.out / "runs" / case.name)
    if run.outcome.exists() or run.error.exists():
        return
    began = time.perf_counter()
    try:
        with case.inject():
            carry_out(parse_spec(case.request(lab)), run, lab.shared, options=RunOptions(goal="judged"))
    except FinetuneError as error:
        print(f"  {case.name}: {error.message}", file=sys.stderr)
    print(f"{case.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def judged(case: Case, lab: Lab) -> dict[str, Any] | None:
    """Return what the diagnosis of the case's run says and whether it is right; None where there is no finished run."""
    runs = lab.out / "runs"
    folder, against = runs / case.name, None if case.against is None else runs / case.against
    if not any((folder / name).exists() for name in ("diagnosis.json", "error.json")):
        return None
    found = diagnose(folder, against)
    problems = [finding.code for finding in found.problems]
    expected = {code for code in case.expected if code}
    right = problems[:1] != [] and problems[0] in expected if expected else not problems
    return {"case": case.name, "expected": sorted(expected), "problems": problems, "right": right}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the runs, those named rightly, false alarms, and degradation taken for overfitting or the reverse."""
    faulty, healthy = ([row for row in rows if bool(row["expected"]) == wanted] for wanted in (True, False))
    confused = [row for row in faulty if {"degradation", "overfitting"} <= {*row["problems"], *row["expected"]}]
    return {
        "faulty": len(faulty),
        "named_rightly": sum(row["right"] for row in faulty),
        "healthy": len(healthy),
        "false_alarms": sum(not row["right"] for row in healthy),
        "degradation_and_overfitting_confused": len(confused),
        "not_right": [row for row in rows if not row["right"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--photographs", type=Path, default=PHOTOGRAPHS if PHOTOGRAPHS.exists() else None)
    parser.add_argument("--first-seed", type=int, default=6, help="the rules were tried on seeds 0 to 5")
    parser.add_argument("--seeds", type=int, default=5, help="of each fault and of each healthy setting")
    parser.add_argument("--more-healthy-seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--judge-only", action="store_true")
    parser.add_argument("--lock", type=Path)
    options = parser.parse_args()
    out = options.out.absolute()
    lab = Lab(out, options.photographs, Shared.of(Workspace.at(out / "home")))
    last = options.first_seed + options.seeds
    cases = [case for seed in range(options.first_seed, last) for case in (*faulty_cases([seed]), *healthy_cases([seed]))]
    cases += healthy_cases(range(last, last + options.more_healthy_seeds))
    cases = [case for case in cases if case.name.startswith(options.only) and (lab.photographs or not case.needs_photographs)]
    torch.set_num_threads(1)
    if not options.judge_only:
        for case in cases:
            with waiting_for(options.lock):
                make(case, lab)
    rows = [row for row in (judged(case, lab) for case in cases) if row is not None]
    found = {"cases": len(cases), **summary(rows)}
    print(json.dumps(found, indent=2))
    if options.results:
        options.results.write_text(json.dumps({**found, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
