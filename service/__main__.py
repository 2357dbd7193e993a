"""``python -m service``: start the server that `finetune serve` starts."""

from __future__ import annotations

import click

from finetune.errors import FinetuneError
from service.serve import DEFAULT_HOST, DEFAULT_PORT, serve


@click.command()
@click.option("--host", default=DEFAULT_HOST, show_default=True)
@click.option("--port", default=DEFAULT_PORT, show_default=True)
@click.option("--model", help="A registered name, name@version, or a bundle folder. Default: the newest model.")
@click.option("--worker/--no-worker", default=True, show_default=True, help="Also run a worker, which carries jobs out.")
def main(host: str, port: int, model: str | None, worker: bool) -> None:
    """Serve predictions and fine-tuning jobs over HTTP: POST /predict, /v1/fine_tuning/jobs, and a page at /."""
    try:
        serve(host, port, model=model, worker=worker)
    except FinetuneError as error:
        raise SystemExit(_say(error)) from None


def _say(error: FinetuneError) -> int:
    click.echo(f"error: {error}", err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
