"""Print drift and sampled images in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from finetune.cli.terminal import table
from finetune.messages import plural, printable
from finetune.progress_bars import console

_COLOURS = {"steady": "green", "drifted": "red"}
_EFFECTS = {"ks_distance": "KS distance", "population_stability_index": "PSI", "share_difference": "share"}


def show_drift(found: Mapping[str, Any]) -> None:
    """Print the conclusion, and the tests as a table."""
    rows = [
        [one["name"], one["test"].partition(" ")[0], _p(one["adjusted_p"]), f"{one['effect']:.3f}",
         f"{_EFFECTS[one['effect_measure']]} {one['threshold']:g}", "drifted" if one["drifted"] else ""]
        for one in found["tests"]
    ]  # fmt: skip
    if rows:
        title = f"{printable(found['model'])}@{found['version']}: live predictions compared with held-out ones"
        table(title, ["of", "test", "adjusted p", "effect", "matters from", ""], rows)
    click.secho(f"{found['sentence']}.", fg=_COLOURS.get(found["state"]))
    if found["n_seen"] > found["n"]:
        console.print(f"{found['n_seen']:,} images in all, the last {found['n']:,} compared", style="dim", markup=False)


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def show_samples(found: Mapping[str, Any]) -> None:
    """Print the number of stored images, and their folder."""
    model = f"{printable(found['model'])}@{found['version']}"
    if not found["n"]:
        click.echo(f"No images sent to {model} are stored here. A server stores some if FINETUNE_SAMPLE_INPUTS is above 0.")
        return
    counted = plural(found["n"], "image")
    if found["deleted"]:
        click.echo(f"{counted} deleted")
        return
    click.echo(f"{counted} sent to {model}, {found['oldest']} to {found['newest']}")
    console.print(printable(found["folder"]), markup=False, soft_wrap=True)
