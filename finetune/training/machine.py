"""Choose precision, memory layout and threads for training on this machine, once per run; a resumed run keeps them.

bfloat16 is a candidate only if the processor has instructions for it, because its emulation is hundreds of times slower. If the
run is long enough, a few training steps of each candidate are timed and the fastest is used; a short run uses float32, channels
last.
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
from finetune.runtime.allocator import retaining_memory
from finetune.runtime.device import Device
from finetune.training.compute import Compute
from finetune.training.recipe import Recipe, freeze_plan

WORTH_MEASURING_STEPS = 200  # in a shorter run the measurement costs more than it saves
MEASURED_IMAGES = 16  # at most, per step on a CPU; a GPU's time for so few is that of starting its kernels
CLEARLY_FASTER = 1.05  # ratio of images per second
ROUNDS = 3  # the first is a warm-up and is not counted


Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Numerics:
    """Device, precision, memory layout and number of threads of training."""

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
    """The measured speed of one candidate: images per second, the median of the rounds."""

    numerics: Numerics
    images_per_second: float


def computes_bfloat16(device: Device) -> bool:
    """Return whether the hardware has instructions for bfloat16; emulation does not count."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def plain_numerics(compute: Compute) -> Numerics:
    """Return float32 on the resolved device and threads, without measuring."""
    return Numerics(compute.device, "float32", threads=compute.threads)


def candidate_numerics(
    device: Device, precision: Precision | Literal["auto"], threads: int, *, bfloat16: bool
) -> tuple[Numerics, ...]:
    """Return the candidates, the simplest first: float32 before bfloat16, channels first before channels last."""
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
    """Return the fastest numerics for the last phase of `recipe`, and the timings (none for a short run, which is not measured).

    On a CPU the fastest candidate is then compared with the same on half of the threads, which is faster if two threads share a
    core. A copy of the classifier is measured, so the classifier itself does not change.
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
    """Return the fastest numerics. A later one must be faster by `CLEARLY_FASTER`, so that noise rarely decides."""
    best = timings[0]
    for timing in timings[1:]:
        if timing.images_per_second >= CLEARLY_FASTER * best.images_per_second:
            best = timing
    return best.numerics


def measure(classifier: Classifier, recipe: Recipe, candidates: Sequence[Numerics]) -> tuple[Timing, ...]:
    """Time training steps of the candidates in turn, so that other load on the machine affects all of them alike."""
    trial = copy.deepcopy(classifier).to(candidates[0].device)
    trial.train()
    apply_freeze(trial, freeze_plan(recipe, recipe.phases[-1]))
    height, width = recipe.train_size_px
    n_images = recipe.batch_size if candidates[0].device == "cuda" else min(recipe.batch_size, MEASURED_IMAGES)
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
    """Move the classifier to the device and put its weights into the memory layout, in place; return it."""
    layout = torch.channels_last if numerics.channels_last else torch.contiguous_format
    classifier.to(device=numerics.device)
    for tensor in (*classifier.parameters(), *classifier.buffers()):
        if tensor.ndim == 4:  # `Module.to(memory_format=…)` also takes those of 5 dimensions, which have no channels-last form
            tensor.data = tensor.data.contiguous(memory_format=layout)
    for module in classifier.modules():
        if getattr(module, "inplace", False) and not isinstance(module, nn.ReLU):
            # The gradient of these activations needs their input, so autograd would have to copy it; ReLU's needs the output.
            module.inplace = False  # type: ignore[assignment]
    return classifier


def prepare_images(classifier: Classifier, images: Tensor, numerics: Numerics) -> Tensor:
    """Return images (B, h, w, 3) uint8 as (B, 3, h, w) float32, normalised, in the memory layout of the weights."""
    layout = torch.channels_last if numerics.channels_last else torch.contiguous_format
    return classifier.normalise(images).contiguous(memory_format=layout)


def to_device(array: np.ndarray, numerics: Numerics) -> Tensor:
    """Return the array as a tensor on the device; a copy to a GPU is asynchronous."""
    tensor = torch.from_numpy(array)
    if numerics.device == "cpu":
        return tensor
    return tensor.pin_memory().to(numerics.device, non_blocking=True)


def autocast(numerics: Numerics) -> torch.autocast:
    """Return a context that computes in bfloat16 if `numerics` says so; else it has no effect."""
    return torch.autocast(numerics.device, dtype=torch.bfloat16, enabled=numerics.precision == "bfloat16")


@contextmanager
def computing_with(numerics: Numerics) -> Iterator[None]:
    """Use the threads of `numerics` during the block and, on a CPU, deterministic algorithms only."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(numerics.device == "cpu")
    # filling uninitialised memory would only guard against defects of torch's kernels, and takes time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with on_threads(numerics.threads):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
