"""Select the stages that a method trains, by pure functions. Torch-free; `finetune.model.freeze` applies the selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from finetune.errors import Problem, SpecError, did_you_mean
from finetune.spec import AutoMethod, LinearProbe, Method, Partial

HEAD = "head"


class StageLike(Protocol):
    """The attributes of a stage that the selection uses."""

    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def n_parameters(self) -> int: ...


@dataclass(frozen=True)
class FreezePlan:
    """The stages that train. The head always trains.

    Args:
        trainable: indices of the stages that train.
        bn: whether batch norms in these stages update their running statistics (``train``) or not (``frozen``); their weight and
            bias train in either case.
    """

    trainable: frozenset[int]
    bn: Literal["frozen", "train"] = "frozen"


@dataclass(frozen=True)
class MethodChoice:
    """The stages of a backbone that one method trains: a row of ``finetune backbones NAME``."""

    method: str
    trains: tuple[str, ...]
    n_parameters: int
    fraction: float


def plan_freeze(stages: Sequence[StageLike], method: Method) -> FreezePlan:
    """Return the plan with all stages that `method` trains at some step (all for gradual, none for auto).

    Raises:
        SpecError: the method names a stage that the backbone does not have, or more stages than it has.
    """
    if isinstance(method, LinearProbe | AutoMethod):
        return FreezePlan(frozenset())
    bn: Literal["frozen", "train"] = "train" if method.bn == "train" else "frozen"
    if not isinstance(method, Partial):
        return FreezePlan(frozenset(stage.index for stage in stages), bn)
    chosen = _named(stages, method.train) if method.train is not None else _from_top(stages, method.stages or 1)
    return FreezePlan(frozenset(chosen), bn)


def describe_methods(stages: Sequence[StageLike]) -> tuple[MethodChoice, ...]:
    """Return what each method would train of these stages, from least to most, without the head."""
    total = sum(stage.n_parameters for stage in stages)

    def choice(method: str, n_stages: int) -> MethodChoice:
        chosen = stages[len(stages) - n_stages :]
        count = sum(stage.n_parameters for stage in chosen)
        return MethodChoice(method, tuple(stage.name for stage in chosen), count, count / total if total else 0.0)

    partial = [choice(f"partial {{stages: {n}}}", n) for n in range(1, len(stages))]
    return (choice("linear_probe", 0), *partial, choice("full", len(stages)))


def _from_top(stages: Sequence[StageLike], count: int) -> list[int]:
    if count > len(stages):
        names = ", ".join(stage.name for stage in stages)
        message = f"must be at most {len(stages)}, given {count}; the backbone's stages are {names}"
        raise SpecError("the method does not fit the backbone", [Problem("method.stages", message)])
    return [stage.index for stage in stages[len(stages) - count :]]


def _named(stages: Sequence[StageLike], wanted: Sequence[str]) -> list[int]:
    """Return the indices of the stages with these names.

    Raises:
        SpecError: some names are not those of stages.
    """
    index_of = {stage.name: stage.index for stage in stages}
    allowed = [*index_of, HEAD]  # the head always trains, so it may be named too
    problems = [
        Problem(
            f"method.train[{position}]", f"no stage {name!r}; the stages are {', '.join(index_of)}.{did_you_mean(name, allowed)}"
        )
        for position, name in enumerate(wanted)
        if name not in allowed
    ]
    if problems:
        raise SpecError("the method does not fit the backbone", problems)
    return [index_of[name] for name in wanted if name in index_of]
