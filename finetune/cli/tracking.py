"""`mlflow`: open MLflow's pages at a run or comparison; `mlflow sync`: send what MLflow missed."""

from __future__ import annotations

import re
import signal
from typing import Any

import click

from finetune.cli.training import json_option

MLFLOW_ID = re.compile(r"[0-9a-f]{32}")


class RunOrCommand(click.Group):
    """A click group that passes a first argument that is not a command's name to the command ``open``."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["open", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
            args = ["open", *args]
        return super().parse_args(ctx, args)


@click.group(cls=RunOrCommand, subcommand_metavar="[RUN] | sync [RUN…]")
def mlflow() -> None:
    """Open MLflow's pages, or send missing data to MLflow.

    \b
    finetune mlflow             all experiments
    finetune mlflow RUN         one run, or the charts of a comparison
    finetune mlflow sync        send what is missing, synchronise models

    RUN is the folder of a run or comparison, its name in the workspace, or MLflow's id of a run.
    """


@mlflow.command("open")
@click.argument("run", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=5000, show_default=True, help="Port to listen on.")
@click.option("--no-browser", is_flag=True, help="Only print the links.")
def open_(run: str | None, host: str, port: int, no_browser: bool) -> None:
    """Open the MLflow pages, at RUN or at all experiments.

    The pages are served until Ctrl-C. RUN is the folder of a run or comparison, its name in the workspace, or MLflow's run id.
    """
    from finetune.progress_bars import console
    from finetune.storage.workspace import Workspace
    from finetune.tracking.mlflow.pages import show_pages

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop MLflow's server, too
    workspace = Workspace.from_environment()
    run_id = None if run is None else _tracked(run, workspace)
    show_pages(
        workspace,
        run_id,
        host,
        port,
        lambda link: console.print(f"{link.title}: {link.url}", markup=False, soft_wrap=True),
        browse=not no_browser,
    )


@mlflow.command()
@click.argument("runs", nargs=-1, metavar="[RUN…]")
@json_option
def sync(runs: tuple[str, ...], as_json: bool) -> None:
    """Send missing data to MLflow; synchronise models.

    Sends what MLflow lacks of each RUN, also of runs that were made with --no-mlflow. Without RUN, all tracked runs of the
    workspace are completed. Registered models and aliases are made equal on both sides. It is safe to repeat.
    """
    from finetune.cli.terminal import print_json
    from finetune.progress_bars import console
    from finetune.storage.workspace import Workspace
    from finetune.tracking.sync import find_run, in_order, incomplete_runs, sync_models, sync_run
    from finetune.tracking.tracker import Choice

    workspace, choice = Workspace.from_environment(), Choice("mlflow")
    found = [find_run(text, workspace) for text in runs] if runs else incomplete_runs(workspace, choice.kind)
    done = [sync_run(run, choice, workspace) for run in in_order(found)]
    notes = sync_models(choice, workspace)
    if as_json:
        listed = [{"run": str(one.run.root), "mlflow_run_id": one.run_id, "missing": one.reason} for one in done]
        print_json({"runs": listed, "models": notes})
    for one in done:
        said = f"not complete: {one.reason}" if one.reason else f"complete, run {one.run_id}"
        console.print(f"{one.run.root.name}: {said}", markup=False, soft_wrap=True)
    if not done:
        console.print("MLflow has all tracked runs", markup=False)
    for note in notes:
        console.print(f"[yellow]note[/] {note}")
    if any(one.reason for one in done):
        raise SystemExit(1)


def _tracked(text: str, workspace: Any) -> str:
    """Return MLflow's id of the run that the user's text refers to; send the run to MLflow first if it is not there."""
    from finetune.errors import NotFound
    from finetune.tracking.mirror import read_state, tracked_as
    from finetune.tracking.sync import find_run, sync_run
    from finetune.tracking.tracker import Choice
    from finetune.tracking.view import top_of

    if MLFLOW_ID.fullmatch(text):
        return text
    run, choice = find_run(text, workspace), Choice("mlflow")
    state, run_id = read_state(top_of(run), choice.kind), tracked_as(run, choice.kind)
    if run_id is None or state is None or not state.complete:
        done = sync_run(run, choice, workspace)
        run_id = done.run_id or run_id
        if run_id is None:
            raise NotFound(f"{text} is not in MLflow: {done.reason}")
    return run_id
