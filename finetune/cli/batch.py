"""Batch prediction with `predict`: executing one as a worker's process, and requesting one from a server."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from finetune.monitoring.statistics import PredictionStatistics


def carry_out(request: Path, run_dir: Path) -> dict[str, Any]:
    """Execute the batch request in the file `request`, in the folder `run_dir`; resume an interrupted one."""
    from finetune.batch_spec import load_batch
    from finetune.bundle.manifest import MODEL
    from finetune.bundle.predictor import Predictor
    from finetune.bundle.registry import Registry
    from finetune.evaluation.batch import predict_folder
    from finetune.jobs.lease import watch_lease_from_environment
    from finetune.monitoring.monitored import submit_statistics
    from finetune.progress import silent
    from finetune.runs.watch import Stopwatch, failures_recorded, recorded
    from finetune.runtime.cores import available_cores
    from finetune.storage.rundir import RunDir
    from finetune.storage.workspace import Workspace

    watch_lease_from_environment()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    spec, run = load_batch(request), RunDir(run_dir.absolute())
    with run.create().held(), failures_recorded(run):
        registry = Registry(Workspace.from_environment().models)
        predictor = Predictor.load(registry.locate(spec.model), threads=available_cores())
        progress = recorded(silent, run, Stopwatch(run))

        def report_statistics(statistics: PredictionStatistics) -> None:
            if spec.model is not None and "/" not in spec.model:
                version, sha256 = registry.lookup(spec.model), predictor.manifest.files[MODEL]
                submit_statistics(registry, version, run.name, statistics, sha256, time.time())

        return predict_folder(
            predictor, Path(spec.input_file), run.root, embedding=spec.embedding, progress=progress, answered=report_statistics
        )


def predict_on_server(images: tuple[Path, ...], model: str | None, server: str, out: Path, *, as_json: bool) -> None:
    """Upload a folder or an archive, wait for the batch prediction, and download its table of predictions to `out`."""
    from finetune.batch_spec import BatchSpec
    from finetune.cli.follow import follow
    from finetune.cli.jobs import EXIT_CODES
    from finetune.cli.terminal import print_json
    from finetune.evaluation.tables import check_ending
    from finetune.jobs.remote import RemoteJobs
    from finetune.progress_bars import console, progress_bars

    ending = check_ending(out)
    if len(images) != 1:
        raise click.UsageError("--server takes one folder, one archive, or the id of one file on the server")
    client = RemoteJobs(server, os.environ.get("FINETUNE_API_KEY"))
    with progress_bars(shown=not as_json) as progress:
        job = client.submit(BatchSpec(input_file=str(images[0]), model=model), progress=progress)
    job = follow(client, job, shown=not as_json)
    if job.state != "succeeded":
        if as_json:
            print_json(job.to_dict())
        sys.exit(EXIT_CODES[job.state])
    client.download_answers(job.id, ending.removeprefix("."), out)
    found = client.result(job.id)
    if as_json:
        print_json(found)
    console.print(f"{found['summary']}; the predictions are in {out}", markup=False, soft_wrap=True)
    sys.exit(2 if found["n_unreadable"] else 0)
