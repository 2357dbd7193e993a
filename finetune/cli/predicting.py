"""`predict`: classify images with a model, here or on a server."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.registry import workspace_registry
from finetune.cli.training import json_option

if TYPE_CHECKING:
    from finetune.bundle.calibration import CertaintyOptions
    from finetune.bundle.predictor import Predictor
    from finetune.errors import FinetuneError
    from finetune.evaluation.predict import SamplePrediction

QUIET_IMAGES = 64  # up to this number, which takes about a second, there is no progress bar


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--model", help="name, name@version, name@alias, a bundle folder or a URL. Default: the default model of the workspace."
)
@click.option("--top-k", default=5, show_default=True, type=click.IntRange(min=1), help="Number of classes to show.")
@click.option(
    "--coverage",
    type=float,
    metavar="SHARE",
    help="Also show a prediction set: classes that contain the correct one with this probability, such as 0.9.",
)
@click.option("--per-class", is_flag=True, help="Guarantee the coverage for each class separately; the sets are larger.")
@click.option(
    "--abstain/--answer-always",
    default=None,
    help="Mark predictions that are too uncertain to rely on. Default: the setting of the model.",
)
@click.option(
    "--precision",
    type=float,
    metavar="SHARE",
    help="With --abstain: the share of the remaining predictions that must be correct. Default: 0.95.",
)
@click.option(
    "--explain",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write the class activation map of each image to this folder, as PNG.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the prediction for each image to a .csv, .parquet or .npz file.",
)
@click.option(
    "--server",
    metavar="URL",
    help="Let a server predict for one folder or archive; needs --out. The key is read from FINETUNE_API_KEY.",
)
@click.option("--run-dir", type=click.Path(path_type=Path), hidden=True, help="A worker's: IMAGES is a request file.")
@json_option
def predict(
    images: tuple[Path, ...],
    model: str | None,
    top_k: int,
    coverage: float | None,
    per_class: bool,
    abstain: bool | None,
    precision: float | None,
    explain: Path | None,
    out: Path | None,
    server: str | None,
    run_dir: Path | None,
    as_json: bool,
) -> None:
    """Classify images with a model.

    IMAGES are files, folders (searched recursively) and patterns such as 'holiday/*.jpg'. The predictions are exactly those of
    the server. The exit code is 2 if an image cannot be read.

    \b
    finetune predict some.jpg
    finetune predict holiday --model photos@3 --out predictions.csv
    finetune predict some.jpg --explain maps         where the model looked
    finetune predict some.jpg --coverage 0.9 --abstain
    """
    if run_dir is not None:
        from finetune.cli.batch import carry_out
        from finetune.cli.terminal import print_json

        print_json(carry_out(images[0], run_dir))
        return
    if server is not None:
        from finetune.cli.batch import predict_on_server

        if out is None or explain is not None:
            raise click.UsageError("--server needs --out FILE for the predictions, and cannot be combined with --explain")
        predict_on_server(images, model, server, out, as_json=as_json)
        return
    from finetune.bundle.calibration import CertaintyOptions
    from finetune.bundle.overlay import write_overlay
    from finetune.bundle.predictor import Predictor
    from finetune.cli.terminal import print_json
    from finetune.evaluation.predict import (
        UnreadableSample,
        cam_file_names,
        image_samples,
        predict_samples,
        predictions_table,
    )
    from finetune.evaluation.tables import check_ending, write_table
    from finetune.progress_bars import console, progress_bars
    from finetune.runtime.cores import available_cores

    if out is not None:
        check_ending(out)
        if coverage is not None or abstain or precision is not None:
            raise click.UsageError("--out writes probabilities only; use --json for --coverage, --abstain and --precision")
    predictor = Predictor.load(workspace_registry().locate(model), threads=available_cores())
    manifest = predictor.manifest
    options = predictor.estimator.resolved(CertaintyOptions(coverage, per_class, abstain, precision))
    if model is None and not as_json:
        chosen = f"model {manifest.reference}, the default of this workspace (choose another with --model)"
        console.print(chosen, style="dim", markup=False)
    samples = image_samples(images)
    documents: list[dict[str, Any]] = []
    predicted: list[SamplePrediction] = []
    with progress_bars(shown=not as_json and len(samples) > QUIET_IMAGES) as progress:
        predictions = predict_samples(predictor, samples, what=f"{len(samples):,} images", progress=progress)
        for prediction, map_file in zip(predictions, cam_file_names(samples), strict=True):
            if isinstance(prediction, UnreadableSample):
                documents.append(_refused(prediction.sample.id, prediction.error))
                continue
            if out is not None:
                predicted.append(prediction)
            document = _document(predictor, prediction, options, top_k)
            if explain is not None and prediction.cam is not None:
                document["explanation"] = str(write_overlay(explain / map_file, prediction.image, prediction.cam))
            documents.append(document)
    if out is not None:
        temperature = float(manifest.calibration.get("temperature", 1.0))
        write_table(out, predictions_table(predicted, predictor, "given", labelled=False), temperature)
    if as_json:
        print_json(documents)
    else:
        _show_results(documents, out, explain, abstains=bool(options.abstain))
    sys.exit(2 if any("error" in document for document in documents) else 0)


def _document(predictor: Predictor, prediction: SamplePrediction, options: CertaintyOptions, top_k: int) -> dict[str, Any]:
    """Return the prediction for one image as JSON values."""
    manifest = predictor.manifest
    order = predictor.task.ranking(prediction.probs)[:top_k]
    labels = [{"label": manifest.classes[label], "probability": float(prediction.probs[label])} for label in order]
    document = {"file": prediction.sample.id, "model": manifest.name, "version": manifest.version, "predictions": labels}
    if several := predictor.several_labels(prediction.probs):
        document |= several.to_dict()
    return document | predictor.estimator.estimate(prediction.probs, prediction.embedding, options).to_dict()


def _refused(file: str, error: FinetuneError) -> dict[str, Any]:
    return {"file": file, "error": {"code": error.code, "message": error.message}}


def _show_results(documents: Sequence[Mapping[str, Any]], out: Path | None, explain: Path | None, *, abstains: bool) -> None:
    """Print the predictions, or how many were written to `out`, and the number of maps in `explain`."""
    from finetune.messages import plural
    from finetune.progress_bars import console

    if out is None:
        _show_predictions(documents)
    else:
        refused = [document for document in documents if "error" in document]
        _show_predictions(refused)
        console.print(f"{plural(len(documents) - len(refused), 'prediction')} written to {out}", markup=False)
        if abstains:
            console.print("this model abstains by default: --json marks the predictions that are too uncertain", markup=False)
    if explain is not None:
        n_maps = sum("explanation" in document for document in documents)
        console.print(
            f"{plural(n_maps, 'activation map')} written to {explain}" if n_maps else "this model has no activation maps",
            markup=False,
        )


def _show_predictions(documents: Sequence[Mapping[str, Any]]) -> None:
    from finetune.messages import printable
    from finetune.progress_bars import console

    for document in documents:
        click.echo(printable(document["file"]))
        if "error" in document:
            console.print(f"  {printable(document['error']['message'])}", style="red", markup=False)
        given = document.get("labels")  # only in a multi-label task
        for row in document.get("predictions", ()):
            mark = "" if given is None else "✓ " if row["label"] in given else "  "
            click.echo(f"  {mark}{row['probability']:7.2%}  {row['label']}")
        if given == []:
            console.print("  no label reaches its threshold", style="yellow", markup=False)
        if document.get("abstained"):
            why = {"unsure": "not sure enough", "unlike": "unlike anything seen"}[document["reason"]]
            console.print(f"  abstains: {why}", style="yellow", markup=False)
        if found := document.get("prediction_set"):
            click.echo(f"  {found['coverage']:.0%} set: {', '.join(found['labels'])}")
