"""`suggest`: choose the unlabelled images to label next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune.cli.training import json_option

if TYPE_CHECKING:
    from finetune.labelling.suggestion import Suggestions

SHOWN = 10


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", help="A registered name, name@version, or a bundle folder. Default: the workspace's default model.")
@click.option("-n", "--number", default=50, show_default=True, type=click.IntRange(min=1), help="Number of images to suggest.")
@click.option("--labelled", metavar="DATA", help="Your labelled data: copies of its images are not suggested.")
@click.option(
    "--out", default="suggestions", show_default=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Output folder."
)
@click.option("--seed", default=0, show_default=True, help="Random seed of the selection.")
@json_option
def suggest(
    pictures: tuple[Path, ...], model: str | None, number: int, labelled: str | None, out: Path, seed: int, as_json: bool
) -> None:
    """Choose the unlabelled images that are best to label next.

    PICTURES are folders (searched recursively), files and patterns. The model chooses images that it is uncertain about and
    that differ from each other; exact and near copies are left out. The output folder gets a table, a page that shows each image
    with the reason, and an import file for Label Studio with the model's predictions.

    \b
    finetune suggest unsorted --model photos -n 50 --labelled photos
    """
    from finetune.bundle.registry import Registry
    from finetune.cli.terminal import print_json
    from finetune.labelling.page import write_suggestions
    from finetune.labelling.suggest import suggest as choose
    from finetune.progress_bars import progress_bars
    from finetune.storage.workspace import Workspace

    bundle = Registry(Workspace.from_environment().models).locate(model)
    with progress_bars(shown=not as_json) as progress:
        found = choose(bundle, pictures, number, labelled=labelled, seed=seed, progress=progress)
    paths = write_suggestions(out, found)
    if as_json:
        print_json({**found.to_dict(), "files": {what: str(path) for what, path in paths.items()}})
    else:
        _show(found, paths)


def _show(found: Suggestions, paths: dict[str, Path]) -> None:
    from finetune.cli.terminal import shortened, table
    from finetune.labelling.queries import query_of
    from finetune.messages import plural, printable
    from finetune.progress_bars import console

    rows = [[one.rank, printable(one.relative), *_guesses(one.likely, one.probabilities)] for one in found.chosen[:SHOWN]]
    table(f"Images to label next, chosen by {found.model}", ["", "picture", *query_of(found.task).titles], rows)
    console.print(f"chosen    {len(found.chosen):,} of {plural(found.n_pictures, 'picture')}", markup=False)
    for text in found.left_out:
        console.print(f"left out  {text}", markup=False, soft_wrap=True)
    for what, path in (("page", paths["page"]), ("table", paths["table"]), ("import", paths["label_studio"])):
        console.print(f"{what:<9} {shortened(path)}", markup=False, soft_wrap=True)


def _guesses(likely: tuple[str, ...], probabilities: tuple[float, ...]) -> list[str]:
    shown = [f"{label} {probability:.0%}" for label, probability in zip(likely, probabilities, strict=True)]
    return [*shown[:2], *[""] * (2 - len(shown))]
