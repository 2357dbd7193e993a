"""fastai as its documentation does it: `vision_learner`, then three frozen epochs or `fine_tune`. All defaults are its own.

The head (two pooled maps, batch normalisation, a hidden layer), one-cycle rates, batch normalisation that trains in frozen
layers, 64 images a batch, as many loading processes as cores.
"""

from __future__ import annotations

import argparse
import statistics
import time

from fastai.vision.all import Callback, ImageDataLoaders, Resize, accuracy, aug_transforms, set_seed, vision_learner
from task import BACKBONE, Task, read_task, timing

INPUT_SIZE_PX = 224


class Speed(Callback):
    """Images per second of every epoch, its validation left out."""

    def __init__(self) -> None:
        self.epochs: dict[str, list[float]] = {}

    def before_train(self) -> None:
        self._began = time.perf_counter()

    def after_train(self) -> None:
        seconds = time.perf_counter() - self._began
        trained = "all" if self.opt.frozen_idx == 0 else "frozen body"
        self.epochs.setdefault(trained, []).append(len(self.dls.train) * self.dls.train.bs / seconds)

    def medians(self) -> dict[str, float]:
        return {trained: statistics.median(speeds) for trained, speeds in self.epochs.items()}


def run(task: Task, recipe: str, epochs: int, steps: dict[str, float]) -> None:
    with timing(steps, "data and network"):
        set_seed(task.seed)
        loaders = ImageDataLoaders.from_folder(
            task.train.parent,
            train=task.train.name,
            valid=task.val.name,
            item_tfms=Resize(INPUT_SIZE_PX),
            batch_tfms=aug_transforms(),
        )
        learner = vision_learner(loaders, BACKBONE, metrics=accuracy, **task.pretrained)
        speed = Speed()
        learner.add_cb(speed)
    with timing(steps, "training, validation after each epoch"):
        if recipe == "frozen":
            learner.fit_one_cycle(epochs)  # vision_learner has frozen the body
        else:
            learner.fine_tune(epochs)  # one frozen epoch first
    with timing(steps, "predicting"):
        probs, _ = learner.get_preds(dl=loaders.valid)
    task.hand_in(loaders.valid_ds.items, list(loaders.vocab), probs.numpy(), steps, speed.medians())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=("frozen", "fine_tune"), required=True)
    parser.add_argument("--epochs", type=int, default=3)
    task, given = read_task(parser)
    run(task, given.recipe, given.epochs, {})


if __name__ == "__main__":
    main()
