"""`study`: experiments on the user's own images that show how training works."""

from __future__ import annotations

import hashlib
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.executing import pop_slots, slots_options
from finetune.cli.training import json_option, spec_options
from finetune.runtime.collector import objects_exempt

if TYPE_CHECKING:
    from finetune.spec import JobSpec


@click.group()
def study() -> None:
    """Show on your own images how training behaves."""


@study.command()
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option("--depths", default="8,20,44", show_default=True, help="Numbers of layers, separated by commas; each is 6 n + 2.")
@click.option(
    "--kinds",
    default="plain,residual",
    show_default=True,
    help="Networks without (plain) and with (residual) identity shortcuts.",
)
@click.option(
    "--aids",
    default="none,he,bn",
    show_default=True,
    help="none: PyTorch's default initialisation; he: He initialisation; bn: batch normalisation.",
)
@click.option("--epochs", type=int, help="Epochs of each network. Default: about 320 steps.")
@click.option("--images", default=2000, show_default=True, help="Maximum number of training images.")
@click.option("--size", default=32, show_default=True, help="Side of the input images in pixels.")
@click.option("--seed", default=0, show_default=True, help="Random seed of the weights and of the order of images.")
@slots_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Folder of the study; an unfinished one in it is resumed.")
@json_option
def depth(data: Path | None, run_dir: Path | None, as_json: bool, **given: Any) -> None:
    """Show the effect of depth on plain and residual networks.

    Trains small networks of growing depth from random weights on DATA (by default handwritten digits), with and without
    identity shortcuts, He initialisation and batch normalisation, and writes a page with training and validation
    errors and with the gradients of each block. Degradation is a rise of the training error with depth; vanishing
    gradients are a fall of the gradient towards the first block. Takes some minutes on two cores.

    \b
    finetune study depth
    finetune study depth photos --depths 8,20,44 --aids bn
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
    workspace, slots = Workspace.from_environment(), pop_slots(given)
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
        found = study_depth(request, Shared.of(workspace, slots), progress, run_dir)
    print_json(found.to_dict()) if as_json else show_depth(found)


@study.command()
@spec_options
@click.option(
    "--more",
    metavar="N,N,…",
    help="Numbers of additional images per class. Default: a quarter, a half and all of the present number.",
)
@click.option(
    "--repeats",
    default=8,
    show_default=True,
    type=click.IntRange(min=2),
    help="Number of random splits into training and held-out images.",
)
@click.option("--sizes", default=6, show_default=True, type=click.IntRange(min=4), help="Number of points of the learning curve.")
@click.option(
    "--page", type=click.Path(path_type=Path), metavar="FILE.html", help="Where to write the page. Default: in the workspace."
)
@json_option
def labels(spec: JobSpec, more: str | None, repeats: int, sizes: int, page: Path | None, as_json: bool) -> None:
    """Estimate the gain of more labelled images.

    Trains heads on growing parts of the data, several times, and extrapolates the learning curve with a 95 % interval: "200
    more images per class: +1.4 points, 0.3 to 2.6". It says so if the data is not sufficient for an estimate. The features of
    the frozen backbone are computed once, so it takes a minute or less on two cores. Writes a page with the curve.

    \b
    finetune study labels photos --more 50,200,500
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
    settings = hashlib.sha256(f"{spec.digest()} {asked} {repeats} {sizes}".encode()).hexdigest()
    page = page or shared.workspace.datasets / f"{found.revision[:12]}-labels-{settings[:8]}.html"
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
