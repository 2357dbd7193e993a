"""`backup` and `restore`: copy the whole workspace into one file and back."""

from __future__ import annotations

import os
from pathlib import Path

import click

from finetune.cli.training import json_option


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def backup(file: Path, as_json: bool) -> None:
    """Write the workspace to a tar file, while it is in use.

    FILE gets the jobs, keys, uploads, runs, models and MLflow's records; not the cache. Jobs that are kept in PostgreSQL are not
    in it: back that database up with pg_dump before.
    """
    from finetune.cli.terminal import print_json
    from finetune.jobs.database import DATABASE_VARIABLE
    from finetune.messages import byte_size
    from finetune.progress_bars import console
    from finetune.storage.backup import write_backup
    from finetune.storage.workspace import Workspace

    workspace = Workspace.from_environment()
    given = os.environ.get(DATABASE_VARIABLE) or str(workspace.jobs_database)
    elsewhere = "://" in given
    made = write_backup(workspace.root, file, jobs_database=None if elsewhere else Path(given))
    if as_json:
        print_json({"file": str(file), "n_files": made.n_files, "size_bytes": made.size_bytes, "jobs_included": not elsewhere})
    if elsewhere:
        console.print("[yellow]note[/] the jobs are kept in another database, which is not in this backup: pg_dump it too")
    console.print(f"{made.n_files:,} files, {byte_size(made.size_bytes)}, are in {file}", markup=False, soft_wrap=True)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@json_option
def restore(file: Path, as_json: bool) -> None:
    """Restore a backup into a new workspace, in FINETUNE_HOME.

    The workspace must not exist yet. Every file is checked first. Its path may differ from the original one: paths in files and
    databases are changed. Jobs that were running resume from their newest checkpoints when a worker runs.
    """
    from finetune.cli.terminal import print_json
    from finetune.messages import byte_size
    from finetune.progress_bars import console
    from finetune.storage.backup import restore_backup
    from finetune.storage.workspace import Workspace

    root = Workspace.from_environment().root
    made = restore_backup(file, root)
    if as_json:
        print_json({"workspace": str(root), "n_files": made.n_files, "size_bytes": made.size_bytes, "made_of": str(made.root)})
    console.print(f"{made.n_files:,} files, {byte_size(made.size_bytes)}, are in {root}", markup=False, soft_wrap=True)
