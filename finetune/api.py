"""The Python API: train, compare, check, suggest and load, as functions that return objects with the results.

    import finetune

    run = finetune.train("photos", method="partial")
    run.metrics["test/top1"], run.predict("some.jpg").label
    model = finetune.load("photos@champion")

The command line calls the same functions underneath; keyword arguments are fields of the job spec (docs/spec.md).
``import finetune`` imports this module lazily.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.calibration import NO_CERTAINTY, NO_OPTIONS, Certainty, CertaintyOptions
from finetune.bundle.predictor import Predictor, SeveralLabels
from finetune.bundle.registry import Registry
from finetune.data.dataset import LocalFile, Sample
from finetune.errors import InvalidInput
from finetune.evaluation import predictions as tables
from finetune.evaluation.diagnose import Diagnosis, diagnose, read_diagnosis
from finetune.evaluation.evaluate import MOST_INDEPENDENT_FIRST, Evaluation, RunEvaluation, read_evaluation
from finetune.evaluation.of_bundle import BundleEvaluation, evaluate_bundle
from finetune.evaluation.predict import SamplePrediction, UnreadableSample, predict_samples
from finetune.evaluation.predictions import Predictions
from finetune.progress_bars import progress_bars
from finetune.runs.outcome import Outcome
from finetune.spec import JobSpec, merged_mapping, parse_spec
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import tracked_as
from finetune.tracking.process import followed
from finetune.tracking.tracker import choose
from finetune.tracking.view import experiment_name

if TYPE_CHECKING:
    from finetune.labelling.suggest import Suggestions
    from finetune.studies.compare.result import Comparison
    from finetune.studies.plan import Plan

ImageLike = str | Path | bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class ImagePrediction:
    """A model's prediction for one image."""

    labels: tuple[tuple[str, float], ...]  # (class, probability), the most probable first
    embedding: NDArray[np.float32]  # (D,)
    cam: NDArray[np.float32] | None  # (h', w') class activation map of the first label; None if the head allows none
    image: NDArray[np.uint8]  # (h, w, 3) the preprocessed image
    certainty: Certainty = NO_CERTAINTY  # what was asked for: the prediction set `labels`, abstained, reason, novelty
    several: SeveralLabels | None = None  # of a multi-label model: `given`, `scores` and `thresholds`

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[0][0]

    @property
    def probability(self) -> float:
        """The probability of the most probable class."""
        return self.labels[0][1]

    @property
    def given(self) -> tuple[str, ...]:
        """The predicted labels: the most probable class or, of a multi-label model, all that reach their thresholds."""
        return (self.label,) if self.several is None else self.several.given

    def __repr__(self) -> str:
        labels = self.labels[:3]
        if self.several is not None:
            labels = tuple((name, self.several.scores[name]) for name in self.several.given)
        shown = ", ".join(f"{label} {probability:.1%}" for label, probability in labels)
        return f"<{shown or 'no label'}>"

    def _repr_html_(self) -> str:
        from finetune.bundle.overlay import overlay_png
        from finetune.report.pictures import data_uri, thumbnail
        from finetune.report.templates import render

        pictures = [data_uri(thumbnail(self.image), "image/jpeg")]
        if self.cam is not None:
            pictures.append(data_uri(overlay_png(self.image, self.cam), "image/png"))
        return render("notebook_answer.html", pictures=pictures, labels=self.labels[:5])


class Model:
    """A loaded bundle, which predicts exactly as the server does. Torch-free."""

    def __init__(self, folder: Path) -> None:
        """Load and verify the bundle in `folder`.

        Raises:
            BundleError: a file is missing or changed, or the bundle does not reproduce its recorded outputs here.
        """
        self.folder = folder
        self._predictor = Predictor.load(folder)

    @property
    def name(self) -> str:
        return self._predictor.manifest.name

    @property
    def version(self) -> str | None:
        return self._predictor.manifest.version

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the model's outputs."""
        return self._predictor.manifest.classes

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the run that made the model, under ``split/name`` keys."""
        return self._predictor.manifest.metrics

    def predict(self, image: ImageLike, options: CertaintyOptions = NO_OPTIONS) -> ImagePrediction:
        """Classify one image: a path, the bytes of an image file, or (H, W, 3) uint8 RGB pixels.

        Args:
            options: requests a prediction set or abstention: ``finetune.CertaintyOptions(coverage=0.9, abstain=True)``.

        Raises:
            ImageError: the image cannot be read.
            InvalidInput: there is no such file, the array is not an image, or the bundle has no calibration for the requested
                coverage or precision.
        """
        options = self._predictor.estimator.resolved(options)
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise InvalidInput(
                    f"an image array has the shape (H, W, 3) and the type uint8, given {image.shape} {image.dtype}. Convert "
                    "it to RGB pixels from 0 to 255, or give the path or the bytes of an image file"
                )
            pixels = self._predictor.manifest.preprocess(image)
            outputs = self._predictor.run(pixels[None])
            cam = None if outputs.cam is None else outputs.cam[0]
            return self._image_prediction(outputs.probs[0], outputs.embedding[0], cam, pixels, options)
        if not isinstance(image, bytes | str | Path):
            raise InvalidInput(
                f"an image is a path, the bytes of an image file, or an array of RGB pixels, given {type(image).__name__}"
            )
        if not isinstance(image, bytes) and not Path(image).is_file():
            raise InvalidInput(f"{image}: no such image file")
        sample = Sample("image", _Bytes(image) if isinstance(image, bytes) else LocalFile(Path(image)), ())
        (prediction,) = predict_samples(self._predictor, [sample])
        if isinstance(prediction, UnreadableSample):
            raise prediction.error
        return self._of(prediction, options)

    def predict_many(
        self, images: Sequence[str | Path], options: CertaintyOptions = NO_OPTIONS, *, progress: bool = True
    ) -> list[ImagePrediction | UnreadableSample]:
        """Classify many image files; return results in the order given, `UnreadableSample` for files that cannot be read."""
        options = self._predictor.estimator.resolved(options)
        samples = [Sample(str(path), LocalFile(Path(path)), ()) for path in images]
        with progress_bars(shown=progress) as update:
            predicted = list(predict_samples(self._predictor, samples, what=f"{len(samples):,} images", progress=update))
        return [
            prediction if isinstance(prediction, UnreadableSample) else self._of(prediction, options) for prediction in predicted
        ]

    def evaluate(self, data: str | Path, split: str | None = None, *, progress: bool = True) -> BundleEvaluation:
        """Evaluate the model on labelled images, and count how many of them it was trained on."""
        with progress_bars(shown=progress) as update:
            return evaluate_bundle(self.folder, data, split, update)

    def _of(self, prediction: SamplePrediction, options: CertaintyOptions) -> ImagePrediction:
        return self._image_prediction(prediction.probs, prediction.embedding, prediction.cam, prediction.image, options)

    def _image_prediction(
        self,
        probs: NDArray[np.float32],
        embedding: NDArray[np.float32],
        cam: NDArray[np.float32] | None,
        image: NDArray[np.uint8],
        options: CertaintyOptions,
    ) -> ImagePrediction:
        order = self._predictor.task.ranking(probs)
        labels = tuple((self.classes[index], float(probs[index])) for index in order)
        certainty = self._predictor.estimator.estimate(probs, embedding, options)
        return ImagePrediction(labels, embedding, cam, image, certainty, self._predictor.several_labels(probs))

    def __repr__(self) -> str:
        version = "" if self.version is None else f"@{self.version}"
        return f"<model {self.name}{version}: {len(self.classes)} classes>"


class Run:
    """A finished run: its metrics, predictions, report and model."""

    def __init__(self, folder: Path) -> None:
        """Open the folder of a finished run.

        Raises:
            InvalidInput: it is not the folder of a finished run.
        """
        self._run = RunDir(Path(folder).absolute())
        if not self._run.outcome.exists():
            raise InvalidInput(f"{folder}: not the folder of a finished run (it has no outcome.json)")
        self.outcome = Outcome.read(self._run)

    @property
    def folder(self) -> Path:
        return self._run.root

    @property
    def metrics(self) -> Mapping[str, float]:
        """All metrics under ``split/name`` keys. Only ``test/…`` is unbiased: the epoch was chosen on val."""
        return self.outcome.metrics

    @property
    def cost(self) -> Mapping[str, float]:
        """The costs of the run and of the model; names end in their units."""
        return self.outcome.cost

    @property
    def report(self) -> Path:
        """The path of the run's report, one HTML file."""
        return self._run.report

    @property
    def bundle(self) -> Path:
        """The folder of the exported model.

        Raises:
            InvalidInput: the run exported no model, for example as a child of a study that was not kept.
        """
        if self.outcome.bundle is None:
            raise InvalidInput(f"{self.folder}: this run exported no model")
        return self.outcome.bundle

    @property
    def name(self) -> str | None:
        """The model version that the run registered, as ``name@version``; None if it registered none."""
        return None if self.outcome.model is None else f"{self.outcome.model}@{self.outcome.version}"

    @cached_property
    def model(self) -> Model:
        """The trained model, loaded on first use."""
        return Model(self.bundle)

    @cached_property
    def evaluation(self) -> RunEvaluation:
        """The evaluations of all splits: metrics with intervals, tables by class, confusion matrices."""
        return read_evaluation(self._run.evaluation)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """The diagnosis of the run from its own records: `findings` with evidence, confidence and advice."""
        from finetune.studies.study import kept_run

        return read_diagnosis(self._run) or diagnose(kept_run(self._run).root)

    def predictions(self, split: str = "test") -> Predictions:
        """Return the table of predictions for a split.

        Raises:
            InvalidInput: the run was not evaluated on this split; the message lists the splits that it has.
        """
        path = self._run.predictions_of(split)
        if not path.exists():
            found = ", ".join(sorted(file.stem for file in self._run.predictions.glob("*.npz"))) or "none"
            raise InvalidInput(f"{self.folder} was not evaluated on {split!r}; it has {found}")
        return tables.read(path)

    def predict(self, image: ImageLike, options: CertaintyOptions = NO_OPTIONS) -> ImagePrediction:
        """Classify one image with the trained model; see `Model.predict`."""
        return self.model.predict(image, options)

    def __repr__(self) -> str:
        split, evaluation = self._most_independent()
        metric = evaluation.leading
        low, high = evaluation.intervals[metric.key]
        figure = f"{metric.label} {metric.text(evaluation.values[metric.key])}"
        return (
            f"<run {self.name or self.folder.name}, {self.outcome.carried_out}: {figure} on {evaluation.n:,} {split} images "
            f"({metric.text(low)} to {metric.text(high)})>"
        )

    def _repr_html_(self) -> str:
        from finetune.report.templates import render

        evaluations = self.evaluation.evaluations
        return render(
            "notebook_run.html",
            title=repr(self)[1:-1],
            splits=[split for split in MOST_INDEPENDENT_FIRST if split in evaluations],
            metrics=self._most_independent()[1].shown,
            evaluations=evaluations,
        )

    def _most_independent(self) -> tuple[str, Evaluation]:
        """Return the most independent split and its evaluation."""
        evaluations = self.evaluation.evaluations
        split = next(split for split in MOST_INDEPENDENT_FIRST if split in evaluations)
        return split, evaluations[split]


def train(
    data: str | Path,
    *,
    method: str | None = None,
    model: str | None = None,
    epochs: int | None = None,
    folds: int | None = None,
    seed: int | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    workspace: str | Path | None = None,
    trackers: Sequence[str] | None = None,
    experiment: str | None = None,
    progress: bool = True,
) -> Run:
    """Fine-tune, evaluate, export and register a model; the same call after an interruption resumes the run.

    Args:
        data: a folder of class folders, or data in any other supported format.
        method: linear_probe (the default), partial, full, gradual or auto.
        model: a timm name.
        folds: number of folds for cross-validation; None for a single split.
        name: of the registered model; by default derived from the name of the data.
        settings: any other fields of the job spec, such as ``{"hyperparameters.batch_size": 16}``.
        run_dir: the run folder; by default a new one in the workspace.
        workspace: by default the folder that ``FINETUNE_HOME`` names, else ``.finetune`` in the current folder.
        trackers: ``mlflow`` (the default if installed), ``tensorboard``, or ``()`` for none.
        experiment: name of the experiment in the trackers; by default the name of the data.
        progress: show progress bars.

    Raises:
        FinetuneError: the request or the data is invalid, or training failed; the message says what to do.
    """
    from finetune.runs.shared import Shared
    from finetune.studies.carry_out import fine_tune

    spec = _spec(data, method, model, epochs, folds, seed, name, settings)
    place = _workspace(workspace)
    gathered = followed(choose(trackers), place, experiment or experiment_name(spec))
    with gathered as begun, progress_bars(shown=progress) as update:
        outcome = fine_tune(spec, Shared.of(place), update, None if run_dir is None else Path(run_dir), begun)
    return Run(outcome.run)


def compare(
    what: str | Path | Sequence[Run | str | Path],
    *,
    methods: Sequence[str] = (),
    models: Sequence[str] = (),
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: int = 3,
    folds: int | None = None,
    margin: float = 0.01,
    budget_seconds: float | None = None,
    settings: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    slots: int = 1,
    workspace: str | Path | None = None,
    trackers: Sequence[str] | None = None,
    experiment: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Train in several ways on the same images and recommend one, by paired statistics and cost.

    Args:
        what: the data; or finished runs, which are compared without training, on the images that none of them was trained on.
        methods: one arm per method (by default linear_probe, partial and full).
        models: one arm per backbone and method.
        arms: arms by their settings, such as ``{"strong": {"augmentation": "strong"}}``.
        seeds: number of runs per arm.
        margin: the largest difference of the headline metric that does not matter.
        budget_seconds: approximate time limit; the cheapest arms are run first.
        settings: fields of the job spec that all arms share.
        slots: number of runs to execute in parallel, each in its own process.
        trackers, experiment: as for `train`.

    Raises:
        FinetuneError: the request or the data is invalid, a run failed, or the runs have no image in common; the message says
            what to do.
    """
    from finetune.comparison_spec import parse_comparison
    from finetune.executors.slots import Slots
    from finetune.runs.shared import Shared
    from finetune.studies.compare import compare as run_comparison
    from finetune.studies.compare import compare_runs

    out = None if run_dir is None else Path(run_dir)
    if not isinstance(what, str | Path):
        folders = [run.folder if isinstance(run, Run) else Path(run) for run in what]
        place = _workspace(workspace)
        found = compare_runs(folders, place, margin, out)
        with followed(choose(trackers), place, experiment or found.dataset) as begun:
            begun(RunDir(found.folder))
        return replace(found, mlflow_run_id=tracked_as(RunDir(found.folder), "mlflow"))
    spec = parse_comparison(
        {
            **_request(what, None, None, None, folds, None, None, settings),
            "methods": list(methods),
            "models": list(models),
            "arms": [{"name": arm, "set": dict(changes)} for arm, changes in (arms or {}).items()],
            "seeds": seeds,
            "margin": margin,
            "budget_seconds": budget_seconds,
        }
    )
    place = _workspace(workspace)
    gathered = followed(choose(trackers), place, experiment or experiment_name(spec.job))
    with gathered as begun, progress_bars(shown=progress) as update:
        shared = Shared.of(place, Slots.of("local", slots) if slots > 1 else None)
        found = run_comparison(spec, shared, update, out, begun)
    return replace(found, mlflow_run_id=tracked_as(RunDir(found.folder), "mlflow"))


def check(
    data: str | Path,
    *,
    method: str | None = None,
    model: str | None = None,
    folds: int | None = None,
    settings: Mapping[str, Any] | None = None,
    workspace: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """Return the plan of what `train` would do with these arguments, with an estimate of its cost. Trains nothing."""
    from finetune.runs.shared import Shared
    from finetune.studies.plan import plan

    spec = _spec(data, method, model, None, folds, None, None, settings)
    with progress_bars(shown=progress) as update:
        return plan(spec, Shared.of(_workspace(workspace)), update)


def suggest(
    pictures: str | Path | Sequence[str | Path],
    model: str | Path,
    n: int = 50,
    *,
    labelled: str | Path | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    workspace: str | Path | None = None,
    progress: bool = True,
) -> Suggestions:
    """Choose the unlabelled images that are most informative for a model: uncertain ones that differ from one another.

    Args:
        pictures: folders, files and glob patterns.
        model: as for `load`.
        n: number of images to choose.
        labelled: data with labels, in any supported format; near duplicates of its images are not suggested.
        out: a folder for the table, the page and the import for Label Studio; by default nothing is written.

    Raises:
        FinetuneError: there is no such model, or no image to suggest; the message says what to do.
    """
    from finetune.labelling.page import write_suggestions
    from finetune.labelling.suggest import suggest as choose

    folders = [pictures] if isinstance(pictures, str | Path) else pictures
    bundle = Registry(_workspace(workspace).models).locate(str(model))
    with progress_bars(shown=progress) as update:
        found = choose(bundle, [Path(one) for one in folders], n, labelled=labelled, seed=seed, progress=update)
    if out is not None:
        write_suggestions(Path(out), found)
    return found


def load(reference: str | Path, *, workspace: str | Path | None = None) -> Model:
    """Load a model by ``name``, ``name@version``, ``name@alias``, or the folder of a bundle.

    Raises:
        NotFound: there is no such model; the message names those that exist.
    """
    return Model(Registry(_workspace(workspace).models).locate(str(reference)))


@dataclass(frozen=True)
class _Bytes:
    """An image file in memory."""

    data: bytes

    def read(self, limits: Any = None) -> bytes:
        return self.data

    def __str__(self) -> str:
        return "the image"


def _workspace(given: str | Path | None) -> Workspace:
    from_environment = Workspace.from_environment()
    return from_environment if given is None else Workspace.at(Path(given), from_environment.networks)


def _spec(*arguments: Any) -> JobSpec:
    return parse_spec(_request(*arguments))


def _request(
    data: str | Path,
    method: str | None,
    model: str | None,
    epochs: int | None,
    folds: int | None,
    seed: int | None,
    name: str | None,
    settings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the arguments as a mapping for `parse_spec`."""
    given: dict[str, Any] = {
        "training_file": str(data),
        "method": method,
        "model": None if model is None else {"backbone": model},
        "hyperparameters": None if epochs is None else {"n_epochs": epochs},
        "data": None if folds is None else {"folds": folds},
        "seed": seed,
        "suffix": name,
    }
    return merged_mapping(None, {key: value for key, value in given.items() if value is not None}, values=settings)
