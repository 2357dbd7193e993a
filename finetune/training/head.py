"""Solve the head of a run on the frozen features of its images, and record the result. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.preprocess import Preprocess
from finetune.data.dataset import Sample
from finetune.events import HeadSolved
from finetune.features.engine import Prefix
from finetune.features.heads import head_solver
from finetune.features.rows import Views, pooled_features
from finetune.features.solve import SolvedHead, head_logits
from finetune.progress import Progress
from finetune.runtime.blas import ONE_THREAD_ELEMENTS, blas_threads_for
from finetune.runtime.seconds import Seconds, process_clock, thread_clock
from finetune.training.context import TrainingContext, TrainingCost
from finetune.training.label_doubts import record_label_doubts
from finetune.training.measurements import write_neighbours, write_sample_predictions
from finetune.training.near_copies import record_near_copies
from finetune.training.recipe import Recipe
from finetune.training.sample import LARGEST, choose_sample


def solve_head(
    prefix: Prefix, preprocess: Preprocess, recipe: Recipe, context: TrainingContext
) -> tuple[SolvedHead, TrainingCost]:
    """Solve the head on frozen features, record it in the run folder, and return it with its cost.

    The features of the held-out images are compared with those of the training images too: see `_compare_with_training`.

    Args:
        prefix: the whole backbone with pooling, from pixels to the embedding.
        preprocess: of images in evaluation; `recipe.views` augmented views of training images are added if no steps follow.
    """
    train, val = context.dataset.of("train"), context.dataset.of("val")
    seen = Views(preprocess)
    n_views = 1 if recipe.n_steps else recipe.views  # if steps follow, they train on augmented images
    views = replace(seen, augment=context.augment, count=n_views) if n_views > 1 else seen
    spent: list[Seconds] = []
    matrix = np.empty((len(train) * n_views + len(val), *prefix.row_shape), np.float32)
    of_train, of_val = np.split(matrix, [len(train) * n_views])
    train_features = _features(prefix, train, views, "training", context, spent.append, of_train)
    val_features = _features(prefix, val, seen, "validation", context, spent.append, of_val) if val else None
    first_view = train_features if n_views == 1 else train_features[:, 0]
    chosen = choose_sample(train, context.sample_size or LARGEST)
    sampled = first_view[chosen]  # a copy: the solver may overwrite the features
    compare = partial(_compare_with_training, prefix, seen, first_view, val_features, context)
    one_thread = matrix.size <= ONE_THREAD_ELEMENTS
    if not one_thread:
        compare()
    clock = thread_clock if one_thread else process_clock  # the comparison is not part of the cost of training
    with blas_threads_for(matrix.size), _in_background(compare if one_thread else None):
        began = clock()
        head = head_solver(context.task.name)(
            train_features,
            context.targets(train),
            len(context.dataset.classes),
            val_features=val_features,
            val_targets=context.targets(val) if val else None,
            l2=recipe.l2,
            label_smoothing=recipe.label_smoothing if not recipe.n_steps else 0.0,
            seed=recipe.seed,
            overwrite=None if one_thread else matrix,  # of a small matrix both may have a copy
            class_weights=context.balance.weights,
            image_weights=context.image_weights,
        )
        seconds = clock() - began
    if (offsets := context.balance.offsets) is not None:
        held_out = None if head.held_out_logits is None else (head.held_out_logits - offsets).astype(np.float32)
        head = replace(head, bias=(head.bias - offsets).astype(np.float32), held_out_logits=held_out)
    cost = TrainingCost(seconds, sum(spent, Seconds()))
    _record(head, cost, recipe, context)
    if not recipe.n_steps:  # else the training loop predicts the sample itself
        logits = head_logits(sampled, head.weight, head.bias)
        write_sample_predictions(context.run, context.task, context.dataset, chosen, 0, logits)
    return head, cost


@contextmanager
def _in_background(action: Callable[[], None] | None) -> Iterator[None]:
    """Call `action` in another thread during the block, and wait for its end. Its exception is raised at the end of the block."""
    if action is None:
        yield
        return
    with ThreadPoolExecutor(1, "comparing") as pool:
        running = pool.submit(action)
        yield
        running.result()


def _compare_with_training(
    prefix: Prefix, seen: Views, features: NDArray[np.float32], val_features: NDArray[np.float32] | None, context: TrainingContext
) -> None:
    """Compare the held-out images with the training images by their features.

    Writes the nearest training image of each held-out image for the diagnosis, the near duplicates of training images, and the
    labels that are doubted.
    """
    train, val, test = (context.dataset.of(split) for split in ("train", "val", "test"))
    held_out = [(val, val_features)] if val_features is not None else []
    if test:  # on a CPU their features were computed when the files were checked, on a GPU this is one more pass over them
        held_out.append((test, _features(prefix, test, seen, "test", context, lambda _: None)))
    write_neighbours(context.run, context.dataset, (train, features), held_out)
    record_near_copies(context.run, context.dataset, context.store, threads=context.compute.threads)
    record_label_doubts(context.run, context.dataset, [(train, features), *held_out])


def _features(
    prefix: Prefix,
    samples: Sequence[Sample],
    views: Views,
    what: str,
    context: TrainingContext,
    spent: Callable[[Seconds], None],
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    def progress(update: Progress) -> None:
        context.progress(replace(update, message=f"features, {what}"))

    return pooled_features(prefix, samples, views, context.features(spent, progress), out)


def features_of_head(journal: Sequence[Mapping[str, Any]]) -> Seconds:
    """Return the seconds for the features of a solved head from the lines of ``metrics.jsonl``; zero if no head was solved."""
    values: Mapping[str, float] = next((line["values"] for line in journal if "head/l2" in line["values"]), {})
    return Seconds(values.get("head/feature_seconds", 0.0), values.get("head/feature_cpu_seconds", 0.0))


def _record(head: SolvedHead, cost: TrainingCost, recipe: Recipe, context: TrainingContext) -> None:
    """Write the head's metrics into the journal, and record how it was chosen as an event."""
    values = {
        "head/l2": head.l2,
        "head/seconds": head.seconds,
        "head/iterations": float(head.iterations),
        "head/feature_seconds": cost.features.wall,
        "head/feature_cpu_seconds": cost.features.cpu,
    }
    if not recipe.n_steps:  # before steps the training loop evaluates the head itself
        for point in head.path:
            if point.l2 == head.l2:
                values |= {"val/loss": point.val_nll, f"val/{context.task.headline.key}": point.val_score}
    context.run.metric(0, values, epoch=0.0)
    path = [{"l2": point.l2, "val_nll": point.val_nll, "val_score": point.val_score} for point in head.path]
    message = f"the head is solved: L2 {head.l2:g} ({head.chosen_by}), {head.iterations} passes, {head.seconds:.1f} s"
    context.run.record(HeadSolved(message, path, head.converged))
