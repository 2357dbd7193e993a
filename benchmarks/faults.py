"""Faults for training runs, to see whether `finetune diagnose` names them: in the data, in the request, or in the running code.

Each is what really happens in some project: a folder whose labels slipped, a validation set made by saving training images again,
a learning rate with two zeros too many or four too few, weights that were trained on BGR images, a stage that a refactoring left
out, a bias that sent a layer's activations below zero for good. Faults of the code are patched into the training loop while a
block runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

Inject = Callable[[], AbstractContextManager[object]]

# ── in the data ───────────────────────────────────────────────────────────────────────────────────


def images_of(folder: Path) -> list[Path]:
    """Return the image files in class folders, in a fixed order."""
    return sorted(path for path in folder.glob("*/*") if path.suffix in (".png", ".jpg"))


def shuffled_labels(source: Path, out: Path, seed: int) -> Path:
    """Give every image the label of another one, drawn at random."""
    files = images_of(source)
    labels = [path.parent.name for path in files]
    for path, label in zip(files, np.random.default_rng(seed).permutation(labels), strict=True):
        _copy(path, out / str(label) / f"{path.parent.name}-{path.name}")
    return out


def few_images(source: Path, out: Path, seed: int, per_class: int) -> Path:
    """Keep `per_class` images of each class to train on, and a third of the rest to validate on."""
    generator = np.random.default_rng(seed)
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        files = [images_of(source)[0].parent.parent / folder.name / path.name for path in sorted(folder.iterdir())]
        order = generator.permutation(len(files))
        rest = (len(files) - per_class) // 3
        for position in order[:per_class]:
            _copy(files[position], out / "train" / folder.name / files[position].name)
        for position in order[per_class : per_class + rest]:
            _copy(files[position], out / "val" / folder.name / files[position].name)
    return out


def leaked(source: Path, out: Path, seed: int, share: float) -> Path:
    """Make a third of the images val, `share` of which are training images, scaled a little and saved again as JPEG."""
    generator = np.random.default_rng(seed)
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
        order = generator.permutation(len(files))
        n_val = len(files) // 3
        n_leaked = round(share * n_val)
        train = [files[position] for position in order[n_val:]]
        for path in train:
            _copy(path, out / "train" / folder.name / path.name)
        for path in [files[position] for position in order[n_leaked:n_val]]:
            _copy(path, out / "val" / folder.name / path.name)
        for path in train[:n_leaked]:
            target = out / "val" / folder.name / f"again-{path.stem}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            _saved_again(path, target, float(generator.uniform(0.85, 1.15)))
    return out


def classes_merged(source: Path, out: Path, seed: int, kept: int, left: int = 2) -> Path:
    """Make a third val; in train, put all but `left` images of each class after the first `kept` into the first class."""
    generator = np.random.default_rng(seed)
    classes = sorted(path for path in source.iterdir() if path.is_dir())
    for number, folder in enumerate(classes):
        files = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
        order = generator.permutation(len(files))
        for place, position in enumerate(order):
            path = files[position]
            if place < len(files) // 3:
                _copy(path, out / "val" / folder.name / path.name)
            else:
                merged = number >= kept and place >= len(files) // 3 + left
                _copy(path, out / "train" / (classes[0] if merged else folder).name / path.name)
    return out


def _saved_again(source: Path, target: Path, scale: float) -> None:
    with Image.open(source) as image:
        size = tuple(max(8, round(side * scale)) for side in image.size)
        image.convert("RGB").resize(size, Image.Resampling.BILINEAR).save(target, quality=80)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


# ── in the weights ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Normalisation:
    """What is subtracted from pixels in 0..1 and what they are divided by, and whether blue comes first."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False


def weights_expecting(
    state: Mapping[str, torch.Tensor], first: str, norm: str, given: Normalisation, expected: Normalisation, out: Path
) -> Path:
    """Write a network that computes from pixels normalised by `expected` what `state` computes from those normalised by `given`.

    Args:
        first: the name of the first convolution, which has no bias.
        norm: the name of the batch normalisation after it, which takes up what differs in the mean.
    """
    changed = {name: tensor.clone() for name, tensor in state.items()}
    weight = changed[f"{first}.weight"]  # (out, 3, h, w)
    old_mean, old_std, new_mean, new_std = (torch.tensor(part) for part in (given.mean, given.std, expected.mean, expected.std))
    shift = (weight.sum((2, 3)) * ((new_mean - old_mean) / old_std)).sum(1)
    changed[f"{norm}.running_mean"] -= shift
    weight = weight * (new_std / old_std)[None, :, None, None]
    changed[f"{first}.weight"] = weight.flip(1).contiguous() if expected.bgr else weight.contiguous()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(changed, out)
    return out


# ── in the code ───────────────────────────────────────────────────────────────────────────────────


@contextmanager
def stage_left_out(stage: int) -> Iterator[None]:
    """No parameter of this stage gets a gradient, whatever the recipe says."""
    from finetune.training import fit

    original = fit.apply_freeze

    def freeze(classifier: Any, plan: Any) -> None:
        original(classifier, plan)
        stage_of = classifier.backbone.layout.tensor_stage
        for name, parameter in classifier.backbone.module.named_parameters():
            if stage_of[name] == stage:
                parameter.requires_grad_(False)

    with mock.patch.object(fit, "apply_freeze", freeze):
        yield


@contextmanager
def stage_without_learning_rate(stage: int) -> Iterator[None]:
    """The optimiser's rate for this stage is zero at every step."""
    from finetune.training import step as optimiser_step

    original = optimiser_step.set_learning_rates

    def rates(optimizer: Any, recipe: Any, step: int) -> Any:
        found = original(optimizer, recipe, step)
        for group in optimizer.param_groups:
            if group["key"] == f"stage{stage}":
                group["lr"] = 0.0
        return found

    with mock.patch.object(optimiser_step, "set_learning_rates", rates):
        yield


@contextmanager
def biases_sunk(stage: int, at_step: int, by: float = 20.0) -> Iterator[None]:
    """Before one step, the biases of the stage's normalisations (else of its convolutions) fall by `by`: its ReLUs are dead."""
    from finetune.training import fit

    original = fit._Training._take_step

    def step(self: Any, batch: Any, parameters: Any) -> None:
        if self.state.step == at_step:
            stages_of = self.classifier.backbone.layout.module_stages
            for name, module in self.classifier.backbone.module.named_modules():
                norm = isinstance(module, torch.nn.BatchNorm2d) or (
                    isinstance(module, torch.nn.Conv2d) and module.bias is not None
                )
                if norm and stages_of[name] == {stage} and module.bias is not None:
                    with torch.no_grad():
                        module.bias -= by
        original(self, batch, parameters)

    with mock.patch.object(fit._Training, "_take_step", step):
        yield


@contextmanager
def nothing() -> Iterator[None]:
    """No fault."""
    yield
