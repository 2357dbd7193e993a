"""`serve` and `build`: the server, and an archive of it with a model inside."""

from __future__ import annotations

import os
import sys

import click

from finetune.cli.registry import workspace_registry


@click.command()
@click.option(
    "--model",
    help="The model of /predict: name, name@version, name@alias, a bundle folder, or a URL such as s3://bucket/flowers/3. "
    "Default: the promoted model.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than this need API keys.")
@click.option("--port", default=3000, show_default=True, help="Port to listen on.")
@click.option("--worker/--no-worker", default=True, show_default=True, help="Also run a worker, which runs the jobs.")
def serve(model: str | None, host: str, port: int, worker: bool) -> None:
    """Serve predictions and fine-tuning jobs over HTTP.

    The server has a page at /, documentation of all routes at /docs, and a worker that runs the jobs. Stop it with Ctrl-C.

    \b
    finetune serve
    curl -F image=@some.jpg http://127.0.0.1:3000/predict
    """
    if model is not None and "://" not in model:
        from finetune.errors import NotFound

        try:
            workspace_registry().locate(model)
        except NotFound as error:
            click.echo(f"note: {error.message}. Until this model exists, the server answers /predict with status 503", err=True)
    arguments = [sys.executable, "-m", "service", "--host", host, "--port", str(port)]
    arguments += [] if worker else ["--no-worker"]
    os.execv(sys.executable, [*arguments, "--model", model] if model else arguments)


@click.command()
@click.argument("model", required=False)
def build(model: str | None) -> None:
    """Build a BentoML archive of the service with a model.

    MODEL is a name, name@version or name@alias; by default the default model of the workspace. Prints the tag of the archive (a
    bento). `bentoml serve TAG` serves it, `bentoml containerize TAG` builds a container image.
    """
    from finetune.bento import build_bento

    click.echo(build_bento(workspace_registry(), model))
