"""The solver of each task, by the task's name, that fits a linear head on frozen features. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.features.sigmoid_head import solve_sigmoid_head
from finetune.features.softmax_head import solve_softmax_head
from finetune.features.solve import SolvedHead


class HeadSolver(Protocol):
    """Fits a linear head to features (N, D) or (N, K, D) of N images in K views; see `finetune.features.solve`."""

    def __call__(
        self,
        features: NDArray[np.floating[Any]],
        targets: NDArray[Any],
        n_classes: int,
        /,
        *,
        val_features: NDArray[np.floating[Any]] | None,
        val_targets: NDArray[Any] | None,
        l2: float | None,
        label_smoothing: float,
        seed: int,
        overwrite: NDArray[np.float32] | None = None,
        class_weights: NDArray[np.floating[Any]] | None = None,
        image_weights: NDArray[np.float64] | None = None,
    ) -> SolvedHead:
        """Return the solved head; the arguments are those of `solve_softmax_head`, with targets as the task encodes them."""
        ...


HEAD_SOLVERS: Mapping[str, HeadSolver] = {"multiclass": solve_softmax_head, "multilabel": solve_sigmoid_head}


def head_solver(task: str) -> HeadSolver:
    """Return the solver of the task with this name; every task in `finetune.tasks` has one."""
    return HEAD_SOLVERS[task]
