"""Tables of answers for tests of what is computed from them: made-up logits that lean towards their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.evaluation.predictions import Predictions


def names(n_classes: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(n_classes))


def table(
    logits: np.ndarray, targets: np.ndarray | None, classes: Sequence[str] | None = None, *, split: str = "val", start: int = 0
) -> Predictions:
    """Answers with ids ``start``, ``start + 1`` … and digests that belong to them."""
    numbers = range(start, start + len(logits))
    return Predictions(
        split=split,
        task="multiclass",
        classes=tuple(classes) if classes is not None else names(logits.shape[1]),
        ids=tuple(f"{number}.jpg" for number in numbers),
        sha256=np.array([[number % 256, number // 256] + [7] * 30 for number in numbers], np.uint8).reshape(-1, 32),
        targets=targets,
        logits=logits,
    )


def made_up(n: int = 500, n_classes: int = 7, *, scale: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, n_classes) f32 that lean towards their labels (n,), of which each class has some."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_classes), generator.integers(0, n_classes, n - n_classes)])
    logits = generator.normal(size=(n, n_classes)) * scale
    logits[np.arange(n), labels] += scale
    return logits.astype(np.float32), labels
