"""`study`: experiments on the user's own images that show how training works."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.executing import places_options, take_places
from finetune.cli.training import json_option, spec_options
from finetune.runtime.collector import objects_exempt

if TYPE_CHECKING:
    from finetune.spec import JobSpec


@click.group()
def study() -> None:
    """Experiments on your own images that show how training works."""


@study.command()
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option("--depths", default="8,20,44", show_default=True, help="Numbers of layers, each 6 n + 2.")
@click.option("--kinds", default="plain,residual", show_default=True, help="Without and with identity shortcuts.")
@click.option(
    "--aids", default="none,he,bn", show_default=True, help="Default initialisation, He initialisation, batch normalisation."
)
@click.option("--epochs", type=int, help="Of every network (default about 320 steps).")
@click.option("--images", default=2000, show_default=True, help="Training images at most.")
@click.option("--size", default=32, show_default=True, help="Side of the images in pixels.")
@click.option("--seed", default=0, show_default=True, help="Of weights and order.")
@places_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the study writes; an unfinished one is resumed.")
@json_option
def depth(data: Path | None, run_dir: Path | None, as_json: bool, **given: Any) -> None:
    """Show what depth does to plain and to residual networks.

    Trains small networks of growing depth from nothing on DATA (by default handwritten digits), with and without
    identity shortcuts, He initialisation and batch normalisation, and writes a page: degradation shows in the
    training error, vanishing gradients in the gradients by block. Some minutes on two cores.
    """
    from finetune.jobs.lease import watch_lease_from_environment

    with objects_exempt():
        from finetune.cli.show_depth import show_depth
        from finetune.cli.terminal import print_json
        from finetune.demo import write_digits
        from finetune.progress_bars import progress_bars
        from finetune.runs.shared import Shared
        from finetune.storage.workspace import Workspace
        from finetune.studies.depth import DepthRequest, study_depth

    watch_lease_from_environment()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as for Ctrl-C, wherever the study is
    workspace, places = Workspace.from_environment(), take_places(given)
    request = DepthRequest(
        data=data or write_digits(workspace.root / "demo" / "digits"),
        depths=_numbers(given["depths"], "--depths", "8,20,44"),
        kinds=_names(given["kinds"]),
        aids=tuple("" if name == "none" else name for name in _names(given["aids"])),  # type: ignore[misc]
        n_epochs=given["epochs"],
        n_images=given["images"],
        input_size_px=given["size"],
        seed=given["seed"],
    )
    with progress_bars(shown=not as_json) as progress:
        found = study_depth(request, Shared.of(workspace, places), progress, run_dir)
    print_json(found.to_dict()) if as_json else show_depth(found)


@study.command()
@spec_options
@click.option(
    "--more", metavar="N,N,…", help="More images per class to estimate (default a quarter, a half and all of a class's)."
)
@click.option(
    "--repeats",
    default=8,
    show_default=True,
    type=click.IntRange(min=2),
    help="Number of random splits into training and held-out images.",
)
@click.option("--sizes", default=6, show_default=True, type=click.IntRange(min=4), help="Points of the curve.")
@click.option("--page", type=click.Path(path_type=Path), metavar="FILE.html", help="Where the page is written.")
@json_option
def labels(spec: JobSpec, more: str | None, repeats: int, sizes: int, page: Path | None, as_json: bool) -> None:
    """Estimate the gain of more labelled images.

    Measures accuracy with growing parts of the data, several times, and extrapolates the learning curve with its interval:
    "200 more images a class: +1.4 points, 0.3 to 2.6". Reports if the data do not suffice for that. Heads are solved on the
    features of the frozen backbone, which are computed once: a minute or less on two cores. Writes a page with the curve.
    """
    with objects_exempt():
        from finetune.cli.show_labels import show_labels
        from finetune.cli.terminal import print_json
        from finetune.progress_bars import progress_bars
        from finetune.runs.shared import Shared
        from finetune.storage.workspace import Workspace
        from finetune.studies.labels import study_labels, write_page

    shared = Shared.of(Workspace.from_environment())
    asked = () if more is None else _numbers(more, "--more", "50,100,200")
    with progress_bars(shown=not as_json) as progress:
        found = study_labels(spec, shared, progress, more=asked, repeats=repeats, sizes=sizes)
    page = page or shared.workspace.datasets / f"{found.revision[:12]}-labels.html"
    found = write_page(page, found, f"finetune study labels {shlex.quote(spec.training_file)}")
    print_json(found.to_dict()) if as_json else show_labels(found)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str, option: str, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        message = f"{text!r}: expected numbers separated by commas, such as {example}"
        raise click.BadParameter(message, param_hint=option) from None
