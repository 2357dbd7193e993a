"""Read and write ``tried_backbones.csv``, which records whether one small member of every timm family works here. Torch-free.

``benchmarks/backbones.py`` writes the table; ``finetune backbones`` shows it.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("tried_backbones.csv")


@dataclass(frozen=True)
class Trial:
    """The result of trying one backbone."""

    backbone: str
    works: bool
    reason: str = ""  # why it does not work; empty if it does
    n_stages: int = 0
    cam_kind: str | None = None  # linear, layernorm; None: no class activation map
    input_size_px: int = 0
    n_parameters: int = 0
    milliseconds: float = 0.0  # CPU time of one image on one core, in ONNX Runtime


def read_trials(path: Path = TABLE) -> dict[str, Trial]:
    """Return the trials in the table by family; empty if there is no table."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as stream:
        return {
            row["family"]: Trial(
                backbone=row["backbone"],
                works=row["works"] == "yes",
                reason=row["reason"],
                n_stages=int(row["n_stages"]),
                cam_kind=row["cam_kind"] or None,
                input_size_px=int(row["input_size_px"]),
                n_parameters=int(row["n_parameters"]),
                milliseconds=float(row["milliseconds"]),
            )
            for row in csv.DictReader(stream)
        }


def write_trials(trials: Mapping[str, Trial], path: Path = TABLE) -> None:
    """Write the table, with one row for each family, sorted by name."""
    names = [field.name for field in dataclasses.fields(Trial)]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["family", *names])
        for family, trial in sorted(trials.items()):
            values = dataclasses.asdict(trial)
            values |= {"works": "yes" if trial.works else "no", "milliseconds": f"{trial.milliseconds:.1f}"}
            writer.writerow([family, *("" if values[name] is None else values[name] for name in names)])
