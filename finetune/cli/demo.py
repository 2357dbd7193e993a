"""`demo`: an example of the whole workflow, on data and weights that are installed with the package."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from finetune.cli.training import json_option


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path), help="Your own images instead: a folder with one folder of images per class."
)
@json_option
def demo(data: Path | None, as_json: bool) -> None:
    """Compare frozen with full fine-tuning on example images.

    Then serve the better model and classify an image over HTTP. The images are handwritten digits, which are installed with
    scikit-learn; with --data, your own. Takes about two minutes on two cores.
    """
    from finetune.cli.show_comparison import show_demo
    from finetune.cli.terminal import print_json
    from finetune.demo import run_demo
    from finetune.progress_bars import progress_bars
    from finetune.storage.workspace import Workspace

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the demo's server, too
    with progress_bars(shown=not as_json) as progress:
        result = run_demo(data, Workspace.from_environment(), progress)
    print_json(result.to_dict()) if as_json else show_demo(result)
