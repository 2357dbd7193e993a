"""What came of trying one small member of every family of timm: the table ``tried_backbones.csv`` beside this file. Torch-free.

``benchmarks/backbones.py`` writes it; ``finetune backbones`` shows it.
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
    """What came of trying one backbone; `reason` is empty where it works."""

    backbone: str
    works: bool
    reason: str = ""
    n_stages: int = 0
    cam_kind: str | None = None  # linear, layernorm; None: no class activation map
    input_size_px: int = 0
    n_parameters: int = 0
    milliseconds: float = 0.0  # CPU time of one image on one core, in ONNX Runtime


def read_trials(path: Path = TABLE) -> dict[str, Trial]:
    """Return the trial of each family that has been tried; none where there is no table."""
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
    """Write the table, one row a family, in their order."""
    names = [field.name for field in dataclasses.fields(Trial)]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["family", *names])
        for family, trial in sorted(trials.items()):
            values = dataclasses.asdict(trial)
            values |= {"works": "yes" if trial.works else "no", "milliseconds": f"{trial.milliseconds:.1f}"}
            writer.writerow([family, *("" if values[name] is None else values[name] for name in names)])
