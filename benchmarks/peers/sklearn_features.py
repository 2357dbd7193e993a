"""scikit-learn's logistic regression on pooled features of eager timm: the strongest short script that people write.

With ``--tune`` its C is chosen by the log loss on the validation files, as our solved head chooses its L2; else it stays 1.
"""

from __future__ import annotations

import argparse

import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from task import BACKBONE, Task, read_task, timing
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

BATCH_SIZE = 64
STRENGTHS = np.logspace(-3, 2, 6)


@torch.inference_mode()
def features_of(model: nn.Module, images: ImageFolder, threads: int) -> np.ndarray:
    """(N, D) float32"""
    return np.concatenate([model(batch).numpy() for batch, _ in DataLoader(images, BATCH_SIZE, num_workers=threads)])


def run(task: Task, tune: bool, steps: dict[str, float]) -> None:
    model = timm.create_model(BACKBONE, num_classes=0, **task.pretrained).eval()
    transform = create_transform(**resolve_model_data_config(model))
    train, val = ImageFolder(task.train, transform), ImageFolder(task.val, transform)
    with timing(steps, "features"):
        train_features = features_of(model, train, task.threads)
        val_features = features_of(model, val, task.threads)
    with timing(steps, "fitting"):
        strengths = STRENGTHS if tune else [1.0]
        heads = [LogisticRegression(C=strength, max_iter=1000).fit(train_features, train.targets) for strength in strengths]
        answers = [head.predict_proba(val_features) for head in heads]
        probs = min(answers, key=lambda answer: log_loss(val.targets, answer))
    task.hand_in([path for path, _ in val.samples], train.classes, probs, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    task, given = read_task(parser)
    run(task, given.tune, {})


if __name__ == "__main__":
    main()
