"""The kinds of jobs in the queue: the names, the command and the result file of each.

The store, the worker, the clients and the server use this table, so that a new kind of job needs only a new entry.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.comparison_spec import arms_asked_for, settings_of


@dataclass(frozen=True)
class Kind:
    """One kind of job.

    Args:
        name: in the database.
        prefix: of its ids.
        path: of its HTTP routes.
        object: the value of ``object`` in documents, and the prefix of its webhook event types.
        title: for display.
        command: the `finetune` command that executes it, called with the request's file, ``--run-dir`` and ``--json``.
        result: the file in the run folder that is written last.
        describe: summarises a request in a few words.
        conclude: summarises a result in a sentence.
        registered: returns the ``name@version`` of the model that a result registered, if any.
        tracked: whether its run is mirrored to trackers, so that the command takes ``--experiment``.
        trains: whether its command needs the training libraries.
    """

    name: str
    prefix: str
    path: str
    object: str
    title: str
    command: str
    result: str
    describe: Callable[[Mapping[str, Any]], str]
    conclude: Callable[[Mapping[str, Any]], str]
    registered: Callable[[Mapping[str, Any]], str | None]
    tracked: bool = False
    trains: bool = True


def _training(spec: Mapping[str, Any]) -> str:
    return f"{spec['model']['backbone']}, {spec['method']['type']}"


def _comparison(spec: Mapping[str, Any]) -> str:
    if "runs" in spec:
        return f"{len(spec['runs'])} runs"
    return ", ".join(arm.name for _, arm in arms_asked_for(settings_of(spec)))


def _trained_model(result: Mapping[str, Any]) -> str | None:
    return None if result.get("model") is None else f"{result['model']}@{result['version']}"


def _trained(result: Mapping[str, Any]) -> str:
    if result.get("model") is None:
        return "The run is finished. No model was registered."
    return f"{result['model']} version {result['version']} is registered."


TRAINING = Kind(
    name="training",
    prefix="ftjob",
    path="/v1/fine_tuning/jobs",
    object="fine_tuning.job",
    title="fine-tuning job",
    command="train",
    result="outcome.json",
    describe=_training,
    conclude=_trained,
    registered=_trained_model,
    tracked=True,
)
COMPARISON = Kind(
    name="comparison",
    prefix="ftcmp",
    path="/v1/fine_tuning/comparisons",
    object="fine_tuning.comparison",
    title="comparison",
    command="compare",
    result="comparison.json",
    describe=_comparison,
    conclude=lambda result: str(result["verdict"]["sentence"]),
    registered=lambda result: result.get("registered"),
    tracked=True,
)
BATCH = Kind(
    name="batch",
    prefix="batch",
    path="/v1/batch_predictions",
    object="batch_prediction",
    title="batch prediction",
    command="predict",
    result="batch.json",
    describe=lambda spec: f"images predicted by {spec['model']}",
    conclude=lambda result: f"{result['summary']}.",
    registered=lambda result: None,
    trains=False,
)
CHECK = Kind(
    name="check",
    prefix="ftchk",
    path="/v1/checks",
    object="data_check",
    title="data check",
    command="check",
    result="check.json",
    describe=lambda spec: f"data examined with {spec['model']['backbone']}",
    conclude=lambda result: str(result["summary"]),
    registered=lambda result: None,
)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (TRAINING, COMPARISON, BATCH, CHECK)}


_TRAINING_MODULES = ("torch", "timm")


def can_train() -> bool:
    """Return whether the training libraries are installed, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in _TRAINING_MODULES)


def runnable_kinds() -> tuple[str, ...]:
    """Return the names of the kinds whose libraries are installed here: without torch, batch predictions only."""
    trains = can_train()
    return tuple(kind.name for kind in KINDS.values() if trains or not kind.trains)


def kind_of_id(job_id: str) -> Kind:
    """Return the kind of job that an id's prefix names; fine-tuning if the prefix is unknown."""
    prefix = job_id.partition("-")[0]
    return next((kind for kind in KINDS.values() if kind.prefix == prefix), TRAINING)
