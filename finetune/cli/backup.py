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

    FILE will contain jobs, keys, uploads, runs, models and the MLflow database, but not the cache. Jobs in a PostgreSQL
    database are not included: back that database up with pg_dump first.

    \b
    finetune backup finetune.tar
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
        console.print("[yellow]note[/] the jobs are in a PostgreSQL database, which is not in this backup: use pg_dump for it")
    console.print(f"{made.n_files:,} files ({byte_size(made.size_bytes)}) written to {file}", markup=False, soft_wrap=True)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@json_option
def restore(file: Path, as_json: bool) -> None:
    """Restore a backup into a new workspace, in FINETUNE_HOME.

    The folder that FINETUNE_HOME names (by default .finetune) must not exist yet. All files are verified first. If its path
    differs from that of the original workspace, paths in files and databases are adapted. Jobs that were running resume from
    their newest checkpoints when a worker runs.

    \b
    FINETUNE_HOME=/srv/finetune finetune restore finetune.tar
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
    console.print(f"{made.n_files:,} files ({byte_size(made.size_bytes)}) restored to {root}", markup=False, soft_wrap=True)
