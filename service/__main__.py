"""``python -m service``: start the server that `finetune serve` starts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from finetune.errors import FinetuneError
from service.server import DEFAULT_HOST, DEFAULT_PORT, serve
from service.settings import ServerSettings


@click.command()
@click.option("--host", default=DEFAULT_HOST, show_default=True)
@click.option("--port", default=DEFAULT_PORT, show_default=True)
@click.option("--model", help="The model of POST /predict: a registered name, name@version, name@alias, or a bundle folder.")
@click.option("--worker/--no-worker", default=True, show_default=True, help="Also run a worker, which runs the jobs.")
def main(host: str, port: int, model: str | None, worker: bool) -> None:
    """Serve predictions and fine-tuning jobs over HTTP: POST /predict, /v1/fine_tuning/jobs, and a page at /."""
    try:
        settings = dataclasses.replace(ServerSettings.from_environment(), worker=worker)
        if model is not None:
            settings = dataclasses.replace(settings, model=str(Path(model).absolute()) if Path(model).is_dir() else model)
        serve(settings, host, port)
    except FinetuneError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
