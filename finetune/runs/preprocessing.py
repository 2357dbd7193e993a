"""Decide whether to measure which pixel normalisation pretrained weights expect, and store the result.

Torch is imported only if something is measured.
"""

from __future__ import annotations

import hashlib

from finetune.data.dataset import Sample
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runs.options import RunOptions
from finetune.runs.prepare import Prepared, built_network, prepare
from finetune.runs.shared import Shared
from finetune.spec import load_spec
from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir
from finetune.training.sample import SHARE_OF_TRAINING, STEP_COST, choose_sample

MEASUREMENT = 2  # version of the measurement; increase it when that changes
N_IMAGES = 288
N_PASSES = 5  # forward passes of these images through the whole network, about


def check_preprocessing(
    prepared: Prepared, run: RunDir, shared: Shared, progress: ProgressCallback = silent, *, at_any_cost: bool = False
) -> None:
    """Measure and write ``measurements/preprocessing.json``, or copy an earlier result for the same weights and images.

    Something is measured if the weights come from a file, because a file does not say which normalisation it was trained with, or
    if the measurement costs at most a hundredth of the training. Randomly initialised weights are never measured.

    Args:
        at_any_cost: measure pretrained weights in any case.
    """
    backbone = prepared.resolved.backbone
    if run.preprocessing.exists() or not backbone.is_pretrained:
        return
    known = shared.store.folder("notes") / f"preprocessing-{_digest(prepared)}.json"
    if known.exists():
        write_json(run.preprocessing, read_json(known))
    elif at_any_cost or backbone.weights["source"] == "file" or _costs_little(prepared):
        from finetune.runs.normalisation import compare_normalisations

        progress(Progress("preparing", 0, 1, "measurements", message="preprocessing"))
        network = built_network(prepared.resolved.spec, prepared.dataset, shared)
        measured = compare_normalisations(network.classifier, prepared, sampled(prepared))
        write_json(known, measured)
        write_json(run.preprocessing, measured)


def measure_finished_run(run: RunDir, shared: Shared, progress: ProgressCallback = silent) -> None:
    """Measure for a finished run, from its data and weights, which must still be where they were.

    Raises:
        InvalidInput: the data or the weights are no longer there.
    """
    prepared = prepare(load_spec(run.spec), shared, progress, run, RunOptions.read(run))
    check_preprocessing(prepared, run, shared, progress, at_any_cost=True)


def sampled(prepared: Prepared) -> tuple[Sample, ...]:
    """Return `N_IMAGES` images, chosen and ordered by their bytes, so independently of classes, splits and folds."""
    samples = prepared.dataset.samples
    chosen = [samples[index] for index in choose_sample(samples, N_IMAGES)]
    return tuple(sorted(chosen, key=lambda sample: (sample.sha256, sample.id)))


def _costs_little(prepared: Prepared) -> bool:
    recipe = prepared.resolved.recipe
    return SHARE_OF_TRAINING * STEP_COST * recipe.n_steps * recipe.batch_size >= N_PASSES * N_IMAGES


def _digest(prepared: Prepared) -> str:
    """Return the sha256 of everything that the measurement depends on."""
    samples = [(sample.sha256, sample.labels) for sample in sampled(prepared)]
    parts = (MEASUREMENT, prepared.network.prefix.digest, prepared.resolved.preprocess.digest(), samples)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
