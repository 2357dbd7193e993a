"""The loop of the Keras guide "Transfer learning & fine-tuning", in plain PyTorch.

As in the guide's own end-to-end example: flips and small rotations, batches of 64, dropout 0.2 and a linear layer on the base.
First the head alone for two epochs of Adam (1e-3), then everything for one epoch of Adam at 1e-5, with the base in inference mode
throughout, so that batch normalisation keeps its statistics; validation after each epoch.
"""

from __future__ import annotations

from collections.abc import Iterable

import timm
import torch
from task import BACKBONE, Task, read_task, timing
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

BATCH_SIZE = 64
HEAD_EPOCHS, ALL_EPOCHS = 2, 1
HEAD_LR, ALL_LR = 1e-3, 1e-5
ROTATION_DEGREES = 36  # RandomRotation(0.1) of the guide is in turns


def train_epoch(base: nn.Module, head: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Adam) -> None:
    head.train()
    for images, labels in batches:
        loss = nn.functional.cross_entropy(head(base(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def predict(base: nn.Module, head: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """(N, C) probabilities, and the accuracy."""
    head.eval()
    answers = [(head(base(images)).softmax(dim=1), labels) for images, labels in batches]
    probs, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
    return probs, (probs.argmax(dim=1) == labels).float().mean().item()


def run(task: Task, steps: dict[str, float]) -> None:
    torch.manual_seed(task.seed)
    base = timm.create_model(BACKBONE, num_classes=0, **task.pretrained).eval()  # and stays in eval mode
    as_evaluated = create_transform(**resolve_model_data_config(base))
    resize, crop, *to_values = as_evaluated.transforms
    augmented = v2.Compose([resize, crop, v2.RandomHorizontalFlip(), v2.RandomRotation(ROTATION_DEGREES), *to_values])
    train, val = ImageFolder(task.train, augmented), ImageFolder(task.val, as_evaluated)
    train_batches = DataLoader(train, BATCH_SIZE, shuffle=True, num_workers=task.threads)
    val_batches = DataLoader(val, BATCH_SIZE, num_workers=task.threads)
    head = nn.Sequential(nn.Dropout(0.2), nn.Linear(base.num_features, len(train.classes)))

    def train_for(epochs: int, parameters: list[nn.Parameter], lr: float, what: str) -> None:
        optimizer = torch.optim.Adam(parameters, lr=lr)
        for _ in range(epochs):
            with timing(steps, f"training {what}"):
                train_epoch(base, head, train_batches, optimizer)
            with timing(steps, "validating"):
                _, accuracy = predict(base, head, val_batches)
            print(f"{what}: {accuracy:.4f} of the validation files are right", flush=True)

    base.requires_grad_(False)
    train_for(HEAD_EPOCHS, list(head.parameters()), HEAD_LR, "the head")
    base.requires_grad_(True)
    train_for(ALL_EPOCHS, [*base.parameters(), *head.parameters()], ALL_LR, "everything")
    with timing(steps, "predicting"):
        probs, _ = predict(base, head, val_batches)
    speed = {
        "frozen body": HEAD_EPOCHS * len(train) / steps["training the head"],
        "all": ALL_EPOCHS * len(train) / steps["training everything"],
    }
    task.hand_in([path for path, _ in val.samples], train.classes, probs.numpy(), steps, speed)


def main() -> None:
    task, _ = read_task()
    run(task, {})


if __name__ == "__main__":
    main()
