"""Measure the speed of a backbone on this machine, with a few forward passes and a few steps, for `finetune.runs.forecast`.

On a CPU the CPU time of one thread is measured, which hardly depends on other work on the machine. (Several threads would spin
while they wait for each other, for long on a busy machine.) The weights are random, because the speed does not depend on them and
nothing has to be downloaded.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.bundle.preprocess import Preprocess
from finetune.export.dry_run import dry_run_export, noise
from finetune.export.graph import DeployModule, fill
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.model.cut import cut_at, why_not_cut
from finetune.model.freeze import apply_freeze
from finetune.model.selection import FreezePlan
from finetune.model.threads import on_threads
from finetune.runs.build import facts_of
from finetune.runs.forecast import Speeds
from finetune.runtime.session import INPUT_NAME, open_session
from finetune.training.compute import Compute
from finetune.training.machine import Numerics, autocast, computing_with, place, plain_numerics, prepare_images

STEP_IMAGES = 4
FORWARD_IMAGES = 8
MEASURED_SECONDS = 0.2  # at least, because some machines count CPU time in hundredths of a second
LONGEST_STEP_SECONDS = 2.0  # if a step takes longer, fewer images are used
N_CLASSES = 4  # the speed does not depend on it
PHOTOGRAPHS_PX = (320, 1600)  # a small and a large one


def measure_speeds(backbone: str, input_size_px: int | None, compute: Compute, networks: Path, started: float) -> Speeds:
    """Build a backbone with random weights and measure its speed.

    Args:
        networks: folder of traced networks, see `dry_run_export`.
        started: the process's CPU seconds when it began to import the libraries for training.

    Raises:
        InvalidInput: there is no such backbone, or it cannot take images of this size.
        ExportError: the backbone cannot be exported, although it could be trained.
    """
    with on_threads(1):
        network = build_backbone(backbone, weights="none", input_size_px=input_size_px or "auto")
        classifier = Classifier(network, N_CLASSES)
    start_seconds = time.process_time() - started
    with on_threads(1):
        graph = dry_run_export(classifier, cache=networks)
    session = open_session(fill(graph, DeployModule(classifier, task="multiclass")))
    facts = facts_of(classifier)
    size_px = facts.preprocess.input_size_px
    images = noise(FORWARD_IMAGES, size_px)
    forward = _each(lambda: session.run(["embedding"], {INPUT_NAME: images})) / FORWARD_IMAGES
    shares, steps = _by_depth(classifier, compute)
    (small, _), (large, megabytes) = (_decode_seconds(facts.preprocess, side_px) for side_px in PHOTOGRAPHS_PX)
    return Speeds(
        backbone=facts.name,
        stages=facts.stages,
        n_parameters=facts.n_parameters,
        has_batch_norm=facts.has_batch_norm,
        resizable=facts.resizable,
        input_size_px=(size_px[0], size_px[1]),
        device=compute.device,
        threads=compute.threads,
        start_seconds=start_seconds,
        decode_seconds=small,
        decode_seconds_per_megabyte=max(0.0, (large - small) / megabytes),
        feature_seconds=forward if compute.device == "cpu" else steps[0] / 3,
        prefix_shares=shares,
        step_seconds=steps,
    )


def _by_depth(classifier: Classifier, compute: Compute) -> tuple[dict[int, float], dict[int, float]]:
    """Return for some stages the share of the forward pass before the stage, and the seconds of a step from the stage on."""
    n_stages = len(classifier.backbone.stages)
    numerics = replace(plain_numerics(compute), threads=1)
    wanted = sorted({0, max(0, n_stages - 2), n_stages - 1})
    depths = [depth for depth in wanted if depth == 0 or not why_not_cut(classifier.backbone, depth)]
    steps, forwards = {}, {}
    for depth in depths:
        forwards[depth], steps[depth] = _step_seconds(classifier, depth, numerics, STEP_IMAGES)
    steps[n_stages] = 0.0
    shares = {depth: max(0.0, 1 - forwards[depth] / forwards[0]) for depth in depths} | {n_stages: 1.0}
    return shares, steps


def _step_seconds(classifier: Classifier, depth: int, numerics: Numerics, n_images: int) -> tuple[float, float]:
    """Return the seconds per image from stage `depth` on, of a forward pass alone and of a whole step."""
    n_stages = len(classifier.backbone.stages)
    apply_freeze(classifier, FreezePlan(frozenset(range(depth, n_stages))))
    classifier.train()
    place(classifier, numerics)
    given, run = _part(classifier, depth, numerics, n_images)

    def finished() -> None:
        if numerics.device == "cuda":
            torch.cuda.synchronize()

    def step() -> None:
        with autocast(numerics):
            answer = run(given)
        answer.float().square().mean().backward()
        classifier.zero_grad()
        finished()

    def forward() -> None:
        with torch.no_grad(), autocast(numerics):
            run(given)
        finished()

    with computing_with(numerics):
        started = time.perf_counter()
        step()
        if time.perf_counter() - started > LONGEST_STEP_SECONDS and n_images > 2:
            return _step_seconds(classifier, depth, numerics, n_images // 4)
        of_step = _seconds(step, numerics)
        of_forward = _seconds(forward, numerics)
    return of_forward / n_images, of_step / n_images


def _part(classifier: Classifier, depth: int, numerics: Numerics, n_images: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the part of the network from stage `depth` on, after an input for it."""
    if depth == 0:
        pixels = torch.from_numpy(noise(n_images, classifier.backbone.preprocess.input_size_px)).to(numerics.device)
        return prepare_images(classifier, pixels, numerics), classifier
    cut = cut_at(classifier, depth)
    layout = torch.channels_last if len(cut.activation_shape) == 3 else torch.contiguous_format
    activation = torch.rand(n_images, *cut.activation_shape, device=numerics.device)
    return activation.contiguous(memory_format=layout), cut.suffix


def _seconds(work: Callable[[], object], numerics: Numerics) -> float:
    return _each(work, time.process_time if numerics.device == "cpu" else time.perf_counter)


def _each(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return the mean seconds of a call of `work`, repeated for at least `MEASURED_SECONDS`."""
    work()  # warm-up
    n, started = 0, clock()
    while (taken := clock() - started) < MEASURED_SECONDS:
        work()
        n += 1
    return taken / n


def _decode_seconds(preprocess: Preprocess, side_px: int) -> tuple[float, float]:
    """Return the seconds that decoding and resizing a JPEG with the detail of a photograph takes, and its size in megabytes."""
    coarse = np.random.default_rng(0).integers(0, 256, (side_px // 4, side_px // 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=85)
    data = stream.getvalue()
    return _each(lambda: preprocess.load(data)), len(data) / 1e6
