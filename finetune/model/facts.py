"""A backbone described by plain values, enough to resolve a request without building the network again. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune.bundle.preprocess import Preprocess


@dataclass(frozen=True)
class StageFacts:
    """A coarse part of a backbone; stage 0 is the stem."""

    index: int
    name: str
    n_parameters: int
    output_shape: tuple[int, ...]  # of one image's activation at the end of this stage


@dataclass(frozen=True)
class BackboneFacts:
    """A pretrained network without its classifier, described."""

    name: str
    stages: tuple[StageFacts, ...]
    n_parameters: int
    n_features: int
    has_batch_norm: bool
    resizable: bool  # takes images of other sizes than its input size too
    weights: Mapping[str, Any]  # source, identifier, sha256, license
    preprocess: Preprocess
    cam_kind: str | None  # how exact the class activation map is: linear, layernorm; None: there is none
    cam_reason: str

    @property
    def is_pretrained(self) -> bool:
        return bool(self.weights["source"] != "none")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "preprocess": self.preprocess.to_dict()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> BackboneFacts:
        """Return the inverse of `to_dict`, also after a trip through JSON."""
        stages = tuple(StageFacts(**{**stage, "output_shape": tuple(stage["output_shape"])}) for stage in given["stages"])
        return cls(**{**given, "stages": stages, "preprocess": Preprocess.from_dict(given["preprocess"])})
