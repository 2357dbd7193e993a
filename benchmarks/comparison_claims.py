"""How often a comparison is wrong: same against same, power at the stated difference, and equivalence at the margin.

    python benchmarks/comparison_claims.py --simulated 500
    python benchmarks/comparison_claims.py --simulated 0 --real 100 --data photos

Simulated arms answer images of which some are hard for both; their runs vary as runs with other seeds do. Real pairs are whole
comparisons of a method with itself, on photographs, each with another division of the images and other seeds. Prints a table
and writes JSON with ``--out``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from finetune.comparison_spec import parse_comparison
from finetune.evaluation import compare, paired
from finetune.evaluation.compare import ArmPredictions, compare_pairs
from finetune.evaluation.predictions import Predictions
from finetune.runs.shared import Shared
from finetune.storage.workspace import Workspace
from finetune.studies.compare import compare as run_comparison

CLASSES = ("a", "b", "c")
ACCURACY, MARGIN = 0.9, 0.01
IMAGES, RUNS, COMMON, SEED_SD = (150, 400, 1500), (1, 3), (0.5, 0.9), (0.0, 0.01)
IMAGES_OF_A_CLASS = 40  # in each real comparison


@dataclass(frozen=True)
class Cell:
    """One kind of simulated pair, and how often each claim was made about it."""

    images: int
    runs: int
    common: float  # share of the difficulty of an image that both arms feel
    seed_sd: float
    false_claims: float  # where there is no difference
    detectable: float  # the smallest detectable difference, on average
    power: float  # at that difference
    wrong_equivalence: float  # where the true difference is the margin


def simulated_pair(rng: np.random.Generator, cell: tuple[int, int, float, float], accuracy: float, lead: float) -> compare.Pair:
    """Compare two simulated arms of which the first is better by `lead`."""
    n, n_runs, common, seed_sd = cell
    difficulty, targets = rng.normal(size=n), rng.integers(0, len(CLASSES), n)
    arms = []
    for name, mean in (("first", accuracy + lead), ("second", accuracy)):
        runs = []
        for _ in range(n_runs):
            share = float(np.clip(mean + (seed_sd * rng.normal() if n_runs > 1 else 0.0), 0.01, 0.99))
            felt = math.sqrt(common) * difficulty + math.sqrt(1 - common) * rng.normal(size=n)
            runs.append(_answers(felt < stats.norm.ppf(share), targets))
        arms.append(ArmPredictions(name, tuple(runs)))
    (pair,) = compare_pairs(arms, MARGIN)
    return pair


def _answers(right: np.ndarray, targets: np.ndarray) -> Predictions:
    n = len(targets)
    logits = np.zeros((n, len(CLASSES)), np.float32)
    logits[np.arange(n), np.where(right, targets, (targets + 1) % len(CLASSES))] = 2.0
    ids = tuple(map(str, range(n)))
    return Predictions("test", "multiclass", CLASSES, ids, np.zeros((n, 32), np.uint8), targets.astype(np.int64), logits)


def simulate(cell: tuple[int, int, float, float], n_pairs: int, seed: int) -> Cell:
    """Return how often each claim is made about `n_pairs` of a kind."""
    rng = np.random.default_rng(seed)
    same = [simulated_pair(rng, cell, ACCURACY, 0.0) for _ in range(n_pairs)]
    detectable = float(np.mean([pair.smallest_detectable for pair in same]))
    apart = [simulated_pair(rng, cell, min(ACCURACY, 0.97 - detectable), detectable) for _ in range(n_pairs)]
    at_margin = [simulated_pair(rng, cell, ACCURACY, MARGIN) for _ in range(n_pairs)]
    return Cell(
        *cell,
        false_claims=float(np.mean([pair.significant for pair in same])),
        detectable=detectable,
        power=float(np.mean([pair.winner == "first" for pair in apart])),
        wrong_equivalence=float(np.mean([pair.outcome == "equivalent" for pair in at_margin])),
    )


def real_pair(data: Path, home: Path, number: int, method: str, n_runs: int, input_size_px: int) -> compare.Pair:
    """Compare a method with itself on photographs of `data`, on the `number`-th division of the images."""
    spec = parse_comparison(
        {
            "training_file": str(_sample(data, home / "photos" / str(number), number)),
            "model": {"input_size_px": input_size_px},
            "data": {"test_fraction": 0.5, "split_seed": number},
            "method": {"type": method, "warm_head": False},  # a solved head would be the same for every seed
            "hyperparameters": {"n_epochs": 3},
            "arms": [{"name": "first", "set": {"seed": 1000 * number}}, {"name": "second", "set": {"seed": 1000 * number + 500}}],
            "seeds": n_runs,
            "register_chosen": False,
        }
    )
    found = run_comparison(spec, Shared.of(Workspace.at(home)), run_dir=home / "runs" / str(number))
    (pair,) = found.pairs
    shutil.rmtree(home / "photos" / str(number))
    shutil.rmtree(home / "runs" / str(number))
    return pair


def _sample(data: Path, folder: Path, number: int) -> Path:
    """Copy some photographs of every class."""
    draw = random.Random(number)
    for of_class in sorted(path for path in data.iterdir() if path.is_dir()):
        photographs = sorted(of_class.iterdir())
        (folder / of_class.name).mkdir(parents=True)
        for photograph in draw.sample(photographs, min(IMAGES_OF_A_CLASS, len(photographs))):
            shutil.copy(photograph, folder / of_class.name)
    return folder


def interval(k: int, n: int) -> str:
    low, high = stats.binomtest(k, n).proportion_ci(method="wilson")
    return f"{100 * k / n:.1f} % ({k} of {n}; 95 % interval {100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulated", type=int, default=500, help="pairs of each kind")
    parser.add_argument("--real", type=int, default=0, help="pairs of a method with itself, trained on --data")
    parser.add_argument("--data", type=Path, help="class folders")
    parser.add_argument("--method", default="partial")
    parser.add_argument("--runs", type=int, default=2, help="seeds of each arm of a real pair")
    parser.add_argument("--input-size-px", type=int, default=96)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    document: dict[str, Any] = {}
    if given.simulated:
        paired.RESAMPLINGS = 10  # the other metrics' intervals are not looked at here
        print("images  runs  common  seed sd   false claims   detectable   power   wrong equivalence", flush=True)
        cells = []
        kinds = [kind for kind in itertools.product(IMAGES, RUNS, COMMON, SEED_SD) if kind[1] > 1 or kind[3] == 0]
        for seed, kind in enumerate(kinds):
            cell = simulate(kind, given.simulated, seed)
            cells.append(cell)
            print(
                f"{cell.images:6}  {cell.runs:4}  {cell.common:6}  {cell.seed_sd:7}   {100 * cell.false_claims:10.1f} %   "
                f"{100 * cell.detectable:8.1f} %   {100 * cell.power:3.0f} %   {100 * cell.wrong_equivalence:15.1f} %",
                flush=True,
            )
        n = given.simulated * len(cells)
        print("false claims     ", interval(round(sum(cell.false_claims for cell in cells) * given.simulated), n))
        print("power            ", interval(round(sum(cell.power for cell in cells) * given.simulated), n))
        print("wrong equivalence", interval(round(sum(cell.wrong_equivalence for cell in cells) * given.simulated), n))
        document["simulated"] = [asdict(cell) for cell in cells]
    if given.real:
        known = json.loads(given.out.read_text()).get("real", []) if given.out and given.out.exists() else []
        pairs: list[dict[str, Any]] = document.setdefault("real", known)
        with tempfile.TemporaryDirectory() as home:
            for number in range(len(pairs), given.real):
                pair = real_pair(given.data, Path(home), number, given.method, given.runs, given.input_size_px)
                pairs.append(
                    {
                        "difference": pair.headline.difference,
                        "p_value": pair.p_value,
                        "n": pair.n,
                        "significant": pair.significant,
                        "outcome": pair.outcome,
                    }
                )
                print(
                    f"{number + 1:4} of {given.real}: {100 * pair.headline.difference:+.1f} points on {pair.n} images, "
                    f"p = {pair.p_value:.3f}, {pair.outcome}",
                    flush=True,
                )
                if given.out:  # a pair takes a minute or more: a run that was stopped goes on after the last
                    given.out.write_text(json.dumps(document, indent=2) + "\n")
        print(
            f"{given.method} against itself:",
            interval(sum(pair["significant"] for pair in pairs), len(pairs)),
            "declared a difference",
        )
    if given.out:
        given.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
