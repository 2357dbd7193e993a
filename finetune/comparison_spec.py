"""ComparisonSpec: the validated request for a comparison, whatever door it came through. Torch-free.

A comparison is a job spec that all arms share, and what differs between the arms: methods, backbones, or any settings. As a
mapping it is the job spec with a few keys more, so that a spec file of a job becomes one of a comparison by adding ``methods``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from finetune.errors import Problem, SpecError
from finetune.spec import JobSpec, MethodName, Section, merged_mapping, parse_spec, problems_of, with_settings

DEFAULT_METHODS: tuple[MethodName, ...] = ("linear_probe", "partial", "full")
MOST_ARMS = 20
_READING = (
    *("revision", "file_column", "label_column", "split_column", "group_column", "weight_column", "label_separator", "splits"),
    *("class_folder", "name_encoding"),
)


class ArmSpec(Section):
    """One arm: a name, and the settings that it changes (``key.path`` -> value)."""

    name: Annotated[str, Field(min_length=1, max_length=60)]
    set: dict[str, Any] = Field(default_factory=dict)


class ComparisonSettings(Section):
    """What a comparison asks beyond the job spec that its arms share."""

    methods: Annotated[
        tuple[MethodName, ...], Field(description="one arm for each method; by default linear_probe, partial and full")
    ] = ()
    models: Annotated[tuple[str, ...], Field(description="one arm for each backbone, times the methods")] = ()
    arms: Annotated[
        tuple[ArmSpec, ...], Field(description="arms by their settings, beside or in place of methods and models")
    ] = ()
    seeds: Annotated[int, Field(ge=1, le=50, description="runs of each arm, with seed, seed + 1 …")] = 3
    margin: Annotated[
        float, Field(gt=0.0, lt=0.5, description="a difference of the headline metric that does not matter, 0.01 is one point")
    ] = 0.01
    budget_seconds: Annotated[float | None, Field(gt=0.0, description="about the time that the comparison may take")] = None
    register_chosen: Annotated[bool, Field(description="make the chosen arm's best run a version in the registry")] = True


@dataclass(frozen=True)
class Arm:
    """One way to train, as a job spec; its runs differ in the seed alone."""

    name: str
    spec: JobSpec

    @property
    def slug(self) -> str:
        """The name as it stands in folder names."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-") or hashlib.sha256(self.name.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class ComparisonSpec:
    """A validated request: what all arms share, and the arms."""

    job: JobSpec
    settings: ComparisonSettings
    arms: tuple[Arm, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the request as one mapping, as `parse_comparison` takes it."""
        return {**self.job.model_dump(mode="json"), **self.settings.model_dump(mode="json")}

    def digest(self) -> str:
        """Return a sha256: equal requests have equal digests."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def parse_comparison(given: Mapping[str, Any]) -> ComparisonSpec:
    """Validate a mapping: the keys of a job spec and those of `ComparisonSettings` together.

    Raises:
        SpecError: with one `Problem` for each thing that is wrong, each with its field path.
    """
    own = {key: value for key, value in given.items() if key in ComparisonSettings.model_fields}
    shared = {key: value for key, value in given.items() if key not in own}
    problems: list[Problem] = []
    job: JobSpec | None = None
    settings: ComparisonSettings | None = None
    try:
        job = parse_spec(shared)
    except SpecError as error:
        problems += error.problems
    try:
        settings = ComparisonSettings.model_validate(own)
    except ValidationError as error:
        problems += problems_of(error, own)
    arms: tuple[Arm, ...] = ()
    if job is not None and settings is not None:
        arms, wrong = _arms(job, settings)
        problems += wrong
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise SpecError(f"the comparison has {count}", problems)
    assert job is not None
    assert settings is not None
    return ComparisonSpec(job, settings, arms)


def load_comparison(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None, settings: Iterable[str] = ()
) -> ComparisonSpec:
    """Read a YAML file, lay `overrides` over it, then `settings` (``key.path=value``); see `finetune.spec.load_spec`."""
    return parse_comparison(merged_mapping(path, overrides, settings))


def _arms(job: JobSpec, settings: ComparisonSettings) -> tuple[tuple[Arm, ...], list[Problem]]:
    problems: list[Problem] = []
    named: list[tuple[str, str, dict[str, Any]]] = []  # where, name, settings
    methods = settings.methods or (() if settings.models or settings.arms else DEFAULT_METHODS)
    for method, model in itertools.product(methods or ("",), settings.models or ("",)):
        if method or model:
            changes = {**({"method": method} if method else {}), **({"model.backbone": model} if model else {})}
            named.append(("methods" if method else "models", f"{model} {method}".strip(), changes))
    named += [(f"arms[{index}]", arm.name, arm.set) for index, arm in enumerate(settings.arms)]
    arms: list[Arm] = []
    for where, name, changes in named:
        try:
            arms.append(Arm(name, with_settings(job, changes)))
        except SpecError as error:
            problems += [Problem(f"{where} {name!r}: {problem.where}", problem.message) for problem in error.problems]
    problems += _between(arms)
    return tuple(arms), problems


def _between(arms: list[Arm]) -> list[Problem]:
    """Return what is wrong with the arms together."""
    problems = []
    if len(arms) < 2:
        problems.append(Problem("arms", f"a comparison needs at least two arms, given {len(arms)}"))
    if len(arms) > MOST_ARMS:
        problems.append(Problem("arms", f"at most {MOST_ARMS} arms, given {len(arms)}"))
    slugs = [arm.slug for arm in arms]
    if twice := sorted({arm.name for arm in arms if slugs.count(arm.slug) > 1}):
        problems.append(Problem("arms", f"names must differ: {', '.join(twice)}"))
    for arm in arms[1:]:
        if (arm.spec.training_file, arm.spec.validation_file, arm.spec.test_file) != (
            arms[0].spec.training_file,
            arms[0].spec.validation_file,
            arms[0].spec.test_file,
        ):
            problems.append(Problem(f"arm {arm.name!r}", "has other data; arms are compared on the same images"))
        split = ("val_fraction", "test_fraction", "split_seed", "split_file", "folds", *_READING)
        if any(getattr(arm.spec.data, key) != getattr(arms[0].spec.data, key) for key in split):
            differing = [key for key in split if getattr(arm.spec.data, key) != getattr(arms[0].spec.data, key)]
            problems.append(Problem(f"arm {arm.name!r}", f"divides the data otherwise: {', '.join(differing)} must be the same"))
    return problems
