"""Describe a backbone for a user who chooses one: its stages, and what each method would train."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from finetune.model.backbone import build_backbone
from finetune.model.selection import describe_methods

_MAP = {
    "linear": "exact activation map",
    "layernorm": "exact activation map (through the final LayerNorm)",
    "own": "no activation map",
}


def describe_backbone(name: str) -> dict[str, Any]:
    """Return the stages of a backbone, from the input up, and what each method would train, as JSON values.

    The network is built without its pretrained weights.

    Raises:
        UnknownBackbone: there is no such architecture; the message suggests similar names.
    """
    backbone = build_backbone(name, weights="none")
    stages = [
        {"index": stage.index, "name": stage.name, "n_parameters": stage.n_parameters, "output_shape": list(stage.output_shape)}
        for stage in backbone.stages
    ]
    return {
        "name": backbone.name,
        "n_parameters": backbone.n_parameters,
        "num_features": backbone.num_features,
        "input_size_px": list(backbone.preprocess.input_size_px),
        "map": _MAP[backbone.readout.kind],
        "note": backbone.readout.note,
        "stages": stages,
        "choices": [asdict(choice) for choice in describe_methods(backbone.stages)],
    }
