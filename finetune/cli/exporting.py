"""`export`: convert a model for other tools."""

from __future__ import annotations

from pathlib import Path

import click

FORMATS = ("timm", "safetensors", "onnx", "openvino", "web")


@click.command()
@click.argument("model")
@click.option("--format", "name", type=click.Choice(FORMATS), required=True, metavar="FORMAT", help="One of the formats below.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="A new folder. Default: named after the model, its version and the format.",
)
@click.option(
    "--onnxruntime-web",
    "runtime",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="For web: the folder of the installed npm package. Default: node_modules/onnxruntime-web.",
)
def export(model: str, name: str, out: Path | None, runtime: Path | None) -> None:
    """Convert a model to the format of another tool.

    MODEL is a registered name, name@version, or a bundle folder. The result, which includes the model card, must give the same
    predictions as the bundle; otherwise nothing is written. For example: finetune export flowers@3 --format timm

    \b
    timm         a folder that timm.create_model('local-dir:FOLDER') loads
    safetensors  backbone and head in one file
    onnx         model.onnx alone
    openvino     OpenVINO's format; needs the extra openvino
    web          one page that classifies images in a browser, without a server
    """
    from finetune.bundle.registry import Registry
    from finetune.export.formats import write_format
    from finetune.export.formats.bundle import Opened
    from finetune.storage.workspace import Workspace

    opened = Opened(Registry(Workspace.from_environment().models).locate(model), runtime)
    manifest = opened.manifest
    number = "" if manifest.version is None else f"-{manifest.version}"
    target = out or Path(f"{manifest.name}{number}-{name}")
    use = write_format(name, opened, target)
    click.echo(f"{target}: {use}", err=True)
