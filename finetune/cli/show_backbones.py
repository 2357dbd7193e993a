"""Print backbones in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.cli.terminal import table
from finetune.progress_bars import console

if TYPE_CHECKING:
    from finetune.model.tried import Trial


def show_backbone_names(names: Sequence[str], limit: int) -> None:
    """Print at most `limit` names, and how many more there are."""
    for name in names[:limit]:
        console.print(name, markup=False)
    if len(names) > limit:
        console.print(
            f"… and {len(names) - limit:,} more; give a pattern (finetune backbones 'resnet*') or --limit {len(names)}",
            markup=False,
        )


def show_trials(trials: Mapping[str, Trial], n_names: int) -> None:
    """Print for `finetune backbones` the results of trying one small member of each family."""
    maps = {"linear": "exact", "layernorm": "exact"}
    rows = [
        [
            trial.backbone,
            "yes" if trial.works else "no",
            trial.n_stages or "–",
            maps.get(trial.cam_kind or "", "none") if trial.n_stages else "–",
            trial.input_size_px or "–",
            f"{trial.n_parameters / 1e6:.1f} M" if trial.n_parameters else "–",
            f"{trial.milliseconds:.0f}" if trial.works else "–",
        ]
        for trial in trials.values()
    ]
    title = f"The smallest of {len(rows)} families, tried with random weights: frozen, trained, exported, compared with torch"
    table(title, ["backbone", "works", "stages", "map", "px", "size", "ms"], rows)
    console.print("map: class activation map; ms: CPU time of one image on one core\n", markup=False)
    for trial in trials.values():
        if not trial.works:
            console.print(f"{trial.backbone}: {trial.reason}", markup=False)
    console.print(f"{n_names:,} names in all: finetune backbones 'resnet*' lists those that match", markup=False)


def show_backbone(description: Mapping[str, Any]) -> None:
    """Print for `finetune backbones NAME` the stages from the stem up, and what each method would train."""
    size = "×".join(map(str, description["input_size_px"]))
    title = f"{description['name']} at {size} px: {description['n_parameters']:,} parameters, {description['map']}"
    stages = [
        [stage["index"], stage["name"], stage["n_parameters"], "×".join(map(str, stage["output_shape"]))]
        for stage in description["stages"]
    ]
    table(title, ["#", "stage", "parameters", "output"], stages)
    choices = [
        [choice["method"], ", ".join(choice["trains"]) or "nothing", choice["n_parameters"], f"{choice['fraction']:.1%}"]
        for choice in description["choices"]
    ]
    table("What each method trains, besides the head", ["method", "stages", "parameters", "share"], choices)
    console.print(
        "gradual: what full trains, but unfrozen one stage after another from the top. auto: the head, then the last stage, "
        "then all, while each gains more than its standard error",
        style="dim",
        markup=False,
    )
    if description["note"]:
        console.print(description["note"], markup=False)
