"""How to compute on this machine: device, precision, memory layout and threads, chosen once and then kept with the run.

Lower precision is offered only where the processor has instructions for it: without them bfloat16 is emulated, hundreds of times
slower. Where a run is long enough to pay for it, the choice is measured: a few training steps of each candidate, in turn.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze
from finetune.model.threads import on_threads
from finetune.runtime.device import Device
from finetune.training.compute import Compute
from finetune.training.memory import retaining_memory
from finetune.training.recipe import Recipe, freeze_plan

WORTH_MEASURING_STEPS = 200  # shorter runs cost less than the measurement
MEASURED_IMAGES = 16  # at most, per step
CLEARLY_FASTER = 1.05
ROUNDS = 3  # the first warms up and does not count


Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Numerics:
    """How the numbers of training are computed: where, how precisely, in which memory layout, on how many threads."""

    device: Device = "cpu"
    precision: Precision = "float32"
    channels_last: bool = True
    threads: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "channels first"
        return f"{self.precision}, {layout}, {self.threads} thread{'s' if self.threads != 1 else ''} on {self.device}"


@dataclass(frozen=True)
class Timing:
    """What one candidate did: images per second, the median of the rounds."""

    numerics: Numerics
    images_per_second: float


def computes_bfloat16(device: Device) -> bool:
    """Return whether the hardware itself multiplies bfloat16; emulation does not count."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def plain_numerics(compute: Compute) -> Numerics:
    """Return float32, for what is computed once and compared."""
    return Numerics(compute.device, "float32", threads=compute.threads)


def candidate_numerics(
    device: Device, precision: Precision | Literal["auto"], threads: int, *, bfloat16: bool
) -> tuple[Numerics, ...]:
    """Return the numerics to choose among, the plainest first."""
    precisions: tuple[Precision, ...] = (
        (precision,) if precision != "auto" else ("float32", "bfloat16") if bfloat16 else ("float32",)
    )
    return tuple(Numerics(device, chosen, channels_last, threads) for chosen in precisions for channels_last in (False, True))


def choose_numerics(
    classifier: Classifier,
    recipe: Recipe,
    *,
    device: Device,
    precision: Precision | Literal["auto"] = "auto",
    threads: int,
) -> tuple[Numerics, tuple[Timing, ...]]:
    """Return the fastest numerics for the last phase of `recipe`, and the timings; short runs are not measured.

    On a CPU the fastest is then measured beside itself with half of the threads: two on one core can be slower than one.
    The classifier is left as it was: the measured steps are taken by a copy.
    """
    candidates = candidate_numerics(device, precision, threads, bfloat16=computes_bfloat16(device))
    if recipe.n_steps < WORTH_MEASURING_STEPS:
        return next(numerics for numerics in candidates if numerics.channels_last), ()
    timings = measure(classifier, recipe, candidates)
    best = fastest(timings)
    if device == "cuda" or threads == 1:
        return best, timings
    beside = measure(classifier, recipe, (best, replace(best, threads=threads // 2)))
    return fastest(beside), (*timings, *beside)


def fastest(timings: Sequence[Timing]) -> Numerics:
    """Return the fastest numerics; of two within `CLEARLY_FASTER` the plainer, so that noise seldom decides."""
    best = timings[0]
    for timing in timings[1:]:
        if timing.images_per_second >= CLEARLY_FASTER * best.images_per_second:
            best = timing
    return best.numerics


def measure(classifier: Classifier, recipe: Recipe, candidates: Sequence[Numerics]) -> tuple[Timing, ...]:
    """Time training steps of each candidate in turn, so that other load on the machine affects all of them alike."""
    trial = copy.deepcopy(classifier).to(candidates[0].device)
    trial.train()
    apply_freeze(trial, freeze_plan(recipe, recipe.phases[-1]))
    height, width = recipe.train_size_px
    n_images = min(recipe.batch_size, MEASURED_IMAGES)
    images = torch.full((n_images, height, width, 3), 127, dtype=torch.uint8, device=candidates[0].device)
    seconds: dict[Numerics, list[float]] = {numerics: [] for numerics in candidates}
    with retaining_memory():
        for _ in range(ROUNDS):
            for numerics in candidates:
                with computing_with(numerics):
                    seconds[numerics].append(_seconds_of_a_step(place(trial, numerics), images, numerics))
    return tuple(Timing(numerics, n_images / statistics.median(taken[1:])) for numerics, taken in seconds.items())


def _seconds_of_a_step(trial: Classifier, images: Tensor, numerics: Numerics) -> float:
    """Return the seconds of one forward and backward pass; the optimiser's part does not depend on the numerics."""
    started = time.perf_counter()
    with autocast(numerics):
        logits = trial(prepare_images(trial, images, numerics))
    logits.float().square().mean().backward()
    trial.zero_grad()
    if numerics.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def place(classifier: Classifier, numerics: Numerics) -> Classifier:
    """Move the classifier to the device and lay out its weights for training; in place, as `Module.to` does."""
    layout = torch.channels_last if numerics.channels_last else torch.contiguous_format
    classifier.to(device=numerics.device)
    for tensor in (*classifier.parameters(), *classifier.buffers()):
        if tensor.ndim == 4:  # `Module.to(memory_format=…)` also takes those of 5 dimensions, which have no channels-last form
            tensor.data = tensor.data.contiguous(memory_format=layout)
    for module in classifier.modules():
        if getattr(module, "inplace", False) and not isinstance(module, nn.ReLU):
            # their gradients need the input, so in place autograd copies it first; ReLU's need only the output
            module.inplace = False  # type: ignore[assignment]
    return classifier


def prepare_images(classifier: Classifier, images: Tensor, numerics: Numerics) -> Tensor:
    """Return images (B, h, w, 3) uint8 as (B, 3, h, w) float32, normalised, laid out as the weights are."""
    layout = torch.channels_last if numerics.channels_last else torch.contiguous_format
    return classifier.normalise(images).contiguous(memory_format=layout)


def to_device(array: np.ndarray, numerics: Numerics) -> Tensor:
    """Return the array as a tensor on the device; a copy to a GPU runs beside the computation."""
    tensor = torch.from_numpy(array)
    if numerics.device == "cpu":
        return tensor
    return tensor.pin_memory().to(numerics.device, non_blocking=True)


def autocast(numerics: Numerics) -> torch.autocast:
    return torch.autocast(numerics.device, dtype=torch.bfloat16, enabled=numerics.precision == "bfloat16")


@contextmanager
def computing_with(numerics: Numerics) -> Iterator[None]:
    """Use the numerics' threads in the block and, on a CPU, only algorithms that give the same bits each time."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(numerics.device == "cpu")
    # a guard against reading what was never written, at the cost of writing it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with on_threads(numerics.threads):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
