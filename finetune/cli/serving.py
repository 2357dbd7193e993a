"""`predict`, `serve`, `models`: the commands around a finished model. None of them needs torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from finetune.cli.training import json_option


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", help="A registered name, name@version, or a bundle folder. Default: the newest model.")
@click.option("--top-k", default=5, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--explain", type=click.Path(path_type=Path), metavar="FOLDER", help="Write each image's activation map there as PNG."
)
@json_option
def predict(images: tuple[Path, ...], model: str | None, top_k: int, explain: Path | None, as_json: bool) -> None:
    """Classify image files with a bundle, exactly as the server does. The exit code is 2 if any image cannot be read."""
    from finetune.bundle.overlay import write_overlay
    from finetune.bundle.predictor import Predictor
    from finetune.cli.terminal import console, print_json
    from finetune.errors import ImageError, NotFound

    predictor = Predictor.load(_registry().locate(model))
    documents: list[dict[str, Any]] = []
    failed = False
    for path in images:
        try:
            if not path.is_file():
                raise NotFound(f"{path}: no such image file")
            prediction = predictor.predict(path.read_bytes(), top_k=top_k)
        except (ImageError, NotFound) as error:
            failed = True
            documents.append({"file": str(path), "error": {"code": error.code, "message": error.message}})
            continue
        labels = [{"label": label, "probability": probability} for label, probability in prediction.labels]
        documents.append({"file": str(path), "model": prediction.name, "version": prediction.version, "predictions": labels})
        if explain is not None and prediction.cam is not None:
            documents[-1]["explanation"] = str(write_overlay(explain / f"{path.stem}.cam.png", prediction.image, prediction.cam))
    if as_json:
        print_json(documents)
    else:
        for document in documents:
            click.echo(document["file"])
            if "error" in document:
                console.print(f"  {document['error']['message']}", style="red", markup=False)
            for row in document.get("predictions", ()):
                click.echo(f"  {row['probability']:7.2%}  {row['label']}")
    sys.exit(2 if failed else 0)


@click.command()
@click.option("--model", help="A registered name, name@version, or a bundle folder. Default: the newest model.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=3000, show_default=True)
@click.option("--worker/--no-worker", default=True, show_default=True, help="Also run a worker, which carries jobs out.")
def serve(model: str | None, host: str, port: int, worker: bool) -> None:
    """Serve predictions and fine-tuning jobs over HTTP. Routes: /predict, /v1/fine_tuning/jobs, and a page at /."""
    arguments = [sys.executable, "-m", "service", "--host", host, "--port", str(port)]
    arguments += [] if worker else ["--no-worker"]
    os.execv(sys.executable, [*arguments, "--model", model] if model else arguments)


@click.group()
def models() -> None:
    """List, show, promote and roll back registered models."""


def _registry() -> Any:
    from finetune.bundle.registry import Registry
    from finetune.storage.workspace import Workspace

    return Registry(Workspace.from_environment().models)


@models.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List every registered model with its versions and aliases."""
    from finetune.cli.show import show_models
    from finetune.cli.terminal import print_json

    versions = _registry().list()
    print_json({"models": [version.to_dict() for version in versions]}) if as_json else show_models(versions)


@models.command("show")
@click.argument("model")
@json_option
def show_model(model: str, as_json: bool) -> None:
    """Show one model: classes, weights and licence, metrics."""
    from finetune.bundle.manifest import read_manifest
    from finetune.cli.show import show_manifest
    from finetune.cli.terminal import print_json

    manifest = read_manifest(_registry().locate(model))
    print_json(manifest.to_dict()) if as_json else show_manifest(manifest)


@models.command()
@click.argument("name")
@click.argument("version")
@click.option("--alias", default="champion", show_default=True)
def promote(name: str, version: str, alias: str) -> None:
    """Point an alias of model NAME at VERSION. A running server swaps to it between requests."""
    _registry().set_alias(name, alias, version)
    click.echo(f"{name}@{alias} is now version {version}", err=True)


@models.command()
@click.argument("name")
@click.option("--alias", default="champion", show_default=True)
def rollback(name: str, alias: str) -> None:
    """Point an alias back at the version that it named before."""
    version = _registry().rollback(name, alias)
    click.echo(f"{name}@{alias} is back at version {version.version}", err=True)
