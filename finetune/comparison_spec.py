"""ComparisonSpec: the validated request for a comparison, from the command line, HTTP or Python. Torch-free.

A comparison has a job spec that all arms share, and the settings in which the arms differ: methods, backbones, or any others. As
a mapping it is the job spec with additional keys, so that adding ``methods`` makes the spec file of a job one of a comparison.
A mapping with the key ``runs`` requests a comparison of existing runs instead (`ComparedRuns`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError

from finetune.errors import Problem, SpecError
from finetune.spec import JobSpec, MethodName, Section, absolute_backbone, merged_mapping, parse_spec, problems_of, with_settings

DEFAULT_METHODS: tuple[MethodName, ...] = ("linear_probe", "partial", "full")
MOST_ARMS = 20
_READING = (
    *(
        "revision",
        "manifest",
        "file_column",
        "label_column",
        "split_column",
        "group_column",
        "weight_column",
        "label_separator",
        "splits",
    ),
    *("class_folder", "name_encoding"),
)
SHARED = ("training_file", "validation_file", "test_file", "task", "suffix", "metadata")  # no arm may change these


class ArmSpec(Section):
    """One arm: a name, and the settings in which it differs (``key.path`` -> value)."""

    HINT: ClassVar[str] = ', as in {"name": "wide", "set": {"model": "resnet50", "hyperparameters.n_epochs": 5}}'

    name: Annotated[str, Field(min_length=1, max_length=60, description="Name of the arm, for tables and folders.")]
    set: Annotated[
        dict[str, Any], Field(description='Fields of the job spec and their values in this arm: {"augmentation": "strong"}.')
    ] = Field(default_factory=dict)


_Margin = Annotated[
    float,
    Field(gt=0.0, lt=0.5, description="The largest difference of the headline metric that does not matter: 0.01 is one point."),
]


class ComparisonSettings(Section):
    """The settings of a comparison, besides the job spec that its arms share."""

    methods: Annotated[
        tuple[MethodName, ...], Field(description="One arm for each method. By default linear_probe, partial and full.")
    ] = ()
    models: Annotated[
        tuple[str, ...], Field(description="One arm for each of these backbones, combined with each of the methods.")
    ] = ()
    arms: Annotated[
        tuple[ArmSpec, ...], Field(description="Arms that differ in any other settings, in addition to methods and models.")
    ] = ()
    seeds: Annotated[
        int, Field(ge=1, le=50, description="Number of runs of each arm, with the seeds seed, seed + 1, seed + 2 and so on.")
    ] = 3
    margin: _Margin = 0.01
    budget_seconds: Annotated[
        float | None,
        Field(gt=0.0, description="Approximate limit of the comparison's time; the cheapest arms are trained first. null: none."),
    ] = None
    register_chosen: Annotated[
        bool, Field(description="Register the best run of the chosen arm as a new version of the model.")
    ] = True


class ComparedRuns(Section):
    """The request to compare finished runs without training."""

    runs: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(min_length=2, max_length=100, description="The folders of the finished runs; on a server the ids of their jobs."),
    ]
    margin: _Margin = 0.01
    metadata: Annotated[
        dict[str, str], Field(max_length=64, description="Your own keys and values, kept with the comparison.")
    ] = Field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One arm as a job spec; its runs differ in the seed only.

    Args:
        asked_in: the field of the request that defines it.
    """

    name: str
    spec: JobSpec
    asked_in: str

    def problem(self, found: Problem) -> Problem:
        """Convert a problem of this arm's spec to a problem of the request, with the field path there."""
        return _problem_of_arm(self.asked_in, self.name, found)

    def run_name(self, number: int) -> str:
        """Return the name of the arm's run with this number, counted from 0."""
        return f"{self.slug}-seed{number}"

    @property
    def slug(self) -> str:
        """The name in the form used for folder names."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-") or hashlib.sha256(self.name.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class ComparisonSpec:
    """A validated request: the job spec that all arms share, and the arms."""

    job: JobSpec
    settings: ComparisonSettings
    arms: tuple[Arm, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the request as one mapping, which `parse_comparison` accepts."""
        return {**self.job.model_dump(mode="json"), **self.settings.model_dump(mode="json")}

    def given(self) -> dict[str, Any]:
        """Return the fields that were given in the request as one mapping, without defaults."""
        return {
            **self.job.model_dump(mode="json", exclude_unset=True),
            **self.settings.model_dump(mode="json", exclude_unset=True),
        }

    def digest(self) -> str:
        """Return the sha256 of the request in canonical JSON."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_job(self, job: JobSpec) -> ComparisonSpec:
        """Return the request with another shared job spec, to which the arms are adapted."""
        return parse_comparison({**job.model_dump(mode="json"), **self.settings.model_dump(mode="json")})

    def with_absolute_paths(self) -> ComparisonSpec:
        """Return the request with absolute paths; see `JobSpec.with_absolute_paths`."""
        arms = [{"name": arm.name, "set": {key: _absolute(key, arm.set[key]) for key in arm.set}} for arm in self.settings.arms]
        job = self.job.with_absolute_paths()
        own = {"arms": arms, "models": [absolute_backbone(model) for model in self.settings.models]}
        return parse_comparison({**job.model_dump(mode="json"), **self.settings.model_dump(mode="json"), **own})


def _absolute(key: str, value: Any) -> Any:
    """Return the value of an arm's setting, made absolute if it is the path of weights or of a model folder."""
    if key == "model.backbone" and isinstance(value, str):
        return absolute_backbone(value)
    return str(Path(value).absolute()) if key == "model.weights" and Path(str(value)).is_file() else value


def parse_comparison(given: Mapping[str, Any]) -> ComparisonSpec:
    """Validate a mapping with the keys of a job spec and of `ComparisonSettings`.

    Raises:
        SpecError: the request is invalid; it has one `Problem` per mistake, with its field path.
    """
    own = _own(given)
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
        problems += problems_of(error, own, ComparisonSettings, {"arms": ArmSpec})
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


def settings_of(request: Mapping[str, Any]) -> ComparisonSettings:
    """Return the settings in a request that `parse_comparison` has already accepted."""
    return ComparisonSettings.model_validate(_own(request))


def _own(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key in ComparisonSettings.model_fields}


def parse_request(given: Mapping[str, Any]) -> ComparisonSpec | ComparedRuns:
    """Validate a mapping as a request to compare runs if it has the key ``runs``, else with `parse_comparison`.

    Raises:
        SpecError: the request is invalid; it has one `Problem` per mistake, with its field path.
    """
    if "runs" not in given:
        return parse_comparison(given)
    try:
        return ComparedRuns.model_validate(dict(given))
    except ValidationError as error:
        problems = problems_of(error, given, ComparedRuns, {})
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise SpecError(f"the comparison of runs has {count}", problems) from None


def load_request(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None, settings: Iterable[str] = ()
) -> ComparisonSpec | ComparedRuns:
    """Read a YAML file, apply `overrides`, then `settings` (``key.path=value``); see `finetune.spec.load_spec`."""
    return parse_request(merged_mapping(path, overrides, settings))


def arms_asked_for(settings: ComparisonSettings) -> list[tuple[str, ArmSpec]]:
    """Return all arms, including those of methods and models, each with the field that defines it."""
    asked: list[tuple[str, ArmSpec]] = []
    methods = settings.methods or (() if settings.models or settings.arms else DEFAULT_METHODS)
    for (m, method), (b, model) in itertools.product(enumerate(methods or ("",)), enumerate(settings.models or ("",))):
        if method or model:
            changes = {**({"method": method} if method else {}), **({"model.backbone": model} if model else {})}
            where = f"methods[{m}]" if settings.methods else f"models[{b}]" if settings.models else "methods"
            asked.append((where, ArmSpec.model_construct(name=f"{model} {method}".strip(), set=changes)))
    return asked + [(f"arms[{index}]", arm) for index, arm in enumerate(settings.arms)]


def _arms(job: JobSpec, settings: ComparisonSettings) -> tuple[tuple[Arm, ...], list[Problem]]:
    problems: list[Problem] = []
    arms: list[Arm] = []
    for where, asked in arms_asked_for(settings):
        shared = [key for key in asked.set if key.split(".")[0] in SHARED]
        wrong = [Problem(key, "all arms share this; give it beside the arms, not inside one") for key in sorted(shared)]
        try:
            spec = with_settings(job, {key: asked.set[key] for key in asked.set if key not in shared})
            arms.append(Arm(asked.name, spec, where))
        except SpecError as error:
            wrong += error.problems
        problems += [_problem_of_arm(where, asked.name, one) for one in wrong]
    problems += _between(arms)
    return tuple(arms), problems


def _problem_of_arm(where: str, name: str, found: Problem) -> Problem:
    """Convert a problem of an arm's spec to one with a field path in the request."""
    if where.startswith("arms"):
        return Problem(f"{where}.set.{found.where}", f"arm {name!r}: {found.message}")
    return Problem(where, f"arm {name!r}: {found.where}: {found.message}")


def _between(arms: list[Arm]) -> list[Problem]:
    """Return the problems of the arms in combination, such as equal names."""
    problems = []
    if len(arms) < 2:
        only = f"{len(arms)} ({arms[0].name})" if arms else "none"
        problems.append(
            Problem(
                "arms",
                f"a comparison needs at least two arms, given {only}. Add a method (methods, as in --methods linear_probe,full), "
                "a backbone (models, --models) or an arm with other settings (arms, --arm); to train in one way only, use "
                "finetune train",
            )
        )
    if len(arms) > MOST_ARMS:
        problems.append(Problem("arms", f"at most {MOST_ARMS} arms, given {len(arms)}"))
    slugs = [arm.slug for arm in arms]
    if twice := sorted({arm.name for arm in arms if slugs.count(arm.slug) > 1}):
        problems.append(Problem("arms", f"names must differ: {', '.join(twice)}"))
    for arm in arms[1:]:
        split = ("val_fraction", "test_fraction", "split_seed", "split_file", "folds", *_READING)
        if any(getattr(arm.spec.data, key) != getattr(arms[0].spec.data, key) for key in split):
            differing = [key for key in split if getattr(arm.spec.data, key) != getattr(arms[0].spec.data, key)]
            message = f"reads or splits the data differently: {', '.join(differing)} must be the same in all arms"
            problems.append(Problem(f"arm {arm.name!r}", message))
    return problems
