"""The request of a depth study: the images, the networks to train, and for how long."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem, SpecError
from finetune.model.depth import AIDS, DEPTHS, KINDS, Aid, network_name
from finetune.spec import JobSpec, parse_spec

STEPS = 320  # of training, about, if no number of epochs is given
BATCH_SIZE = 32


@dataclass(frozen=True)
class Network:
    """One network of the study."""

    kind: str  # plain, residual
    aid: Aid
    depth: int

    @property
    def name(self) -> str:
        return network_name(self.kind, self.depth, self.aid)


@dataclass(frozen=True)
class DepthRequest:
    """A validated request.

    Args:
        data: as `training_file` of a job spec.
        depths: numbers of layers, ascending.
        kinds: plain, residual.
        aids: what is added to networks to make training easier: nothing, He initialisation, batch normalisation.
        n_epochs: None: as many as take about `STEPS` steps.
        n_images: largest number of training images; if there are more, the same share of each class is left out.
    """

    data: Path
    depths: tuple[int, ...] = (8, 20, 44)
    kinds: tuple[str, ...] = KINDS
    aids: tuple[Aid, ...] = AIDS
    n_epochs: int | None = None
    n_images: int = 2000
    input_size_px: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            *_choice("depths", self.depths, DEPTHS),
            *_choice("kinds", self.kinds, KINDS),
            *_choice("aids", self.aids, AIDS),
        ]
        if self.input_size_px < 32 or self.input_size_px > 256:
            problems.append(Problem("size", f"must be 32 to 256 pixels, given {self.input_size_px}"))
        if self.n_images < 2 * BATCH_SIZE:
            problems.append(Problem("images", f"must be at least {2 * BATCH_SIZE}, given {self.n_images}"))
        if self.n_epochs is not None and self.n_epochs < 1:
            problems.append(Problem("epochs", f"must be at least 1, given {self.n_epochs}"))
        if problems:
            raise SpecError("the depth study has invalid options", problems)

    @property
    def networks(self) -> tuple[Network, ...]:
        """The networks in order of their depth, so that the results of each depth are complete before the next begins."""
        return tuple(Network(kind, aid, depth) for depth in self.depths for aid in self.aids for kind in self.kinds)

    def job(self, network: Network, n_train: int) -> JobSpec:
        """Return the job spec of the run that trains one network from scratch on `n_train` images."""
        steps_per_epoch = max(n_train // BATCH_SIZE, 1)
        n_epochs = self.n_epochs or min(max(round(STEPS / steps_per_epoch), 4), 40)
        return parse_spec(
            {
                "training_file": str(self.data),
                "model": {"backbone": network.name, "weights": "none", "input_size_px": self.input_size_px},
                "method": {"type": "full", "warm_head": False, "bn": "train"},
                "augmentation": "none",  # the study compares training errors, which augmentation would change
                "hyperparameters": {
                    "n_epochs": n_epochs,
                    "batch_size": BATCH_SIZE,
                    "learning_rate": 1e-3,
                    "label_smoothing": 0.0,
                    "ema": False,
                    "early_stopping_epochs": None,
                },
                "compute": {"threads": 1},  # layers as small as these take longer on two threads
                "seed": self.seed,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the request as JSON values."""
        values = asdict(self)
        return {key: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> DepthRequest:
        """Return the inverse of `to_dict`."""
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        return cls(**{**values, "data": Path(given["data"])})

    def digest(self) -> str:
        """Return the sha256 of the request; equal requests have equal digests."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def command(self) -> str:
        """The command that repeats the study."""
        default = DepthRequest(self.data)
        options = {
            "--depths": (self.depths, default.depths),
            "--kinds": (self.kinds, default.kinds),
            "--aids": (tuple(aid or "none" for aid in self.aids), tuple(aid or "none" for aid in default.aids)),
            "--epochs": (self.n_epochs, default.n_epochs),
            "--images": (self.n_images, default.n_images),
            "--size": (self.input_size_px, default.input_size_px),
            "--seed": (self.seed, default.seed),
        }
        asked = [
            f"{option} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for option, (value, usual) in options.items()
            if value != usual
        ]
        return " ".join(["finetune study depth", str(self.data), *asked])


def _choice(name: str, given: tuple[Any, ...], allowed: tuple[Any, ...]) -> list[Problem]:
    wrong = [value for value in given if value not in allowed]
    if given and not wrong and list(given) == sorted(set(given), key=allowed.index):
        return []
    listed = ", ".join(str(value) or "none" for value in allowed)
    return [Problem(name, f"must be one or more of {listed}, in this order, given {', '.join(map(str, given)) or 'nothing'}")]
