"""The description of a backbone by plain values, sufficient to resolve a request without building the network. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune.bundle.preprocess import Preprocess


@dataclass(frozen=True)
class StageFacts:
    """The description of a stage, a coarse part of a backbone; stage 0 is the stem."""

    index: int
    name: str
    n_parameters: int
    output_shape: tuple[int, ...]  # of the activation of one image at the end of the stage


@dataclass(frozen=True)
class BackboneFacts:
    """The description of a backbone."""

    name: str
    stages: tuple[StageFacts, ...]
    n_parameters: int
    n_features: int
    has_batch_norm: bool
    resizable: bool  # whether it also takes images of other sizes than its input size
    weights: Mapping[str, Any]  # source, identifier, sha256, license
    preprocess: Preprocess
    cam_kind: str | None  # how the class activation map is exact: linear, layernorm; None: there is no exact map
    cam_reason: str

    @property
    def is_pretrained(self) -> bool:
        return bool(self.weights["source"] != "none")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "preprocess": self.preprocess.to_dict()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> BackboneFacts:
        """Return the inverse of `to_dict`, also for values from JSON, in which tuples are lists."""
        stages = tuple(StageFacts(**{**stage, "output_shape": tuple(stage["output_shape"])}) for stage in given["stages"])
        return cls(**{**given, "stages": stages, "preprocess": Preprocess.from_dict(given["preprocess"])})
