"""JobSpec: the validated, immutable request for a fine-tuning job, and its validation from a mapping. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from finetune.errors import InvalidInput, SpecError
from finetune.spec.backbones import DEFAULT_BACKBONE, absolute_backbone
from finetune.spec.problems import keys_called_in, problems_of
from finetune.spec.sections import (
    SUFFIX_PATTERN,
    AugmentationSpec,
    AutoMethod,
    ComputeSpec,
    DataSpec,
    ExportSpec,
    Full,
    Gradual,
    HeadSpec,
    Hyperparameters,
    LinearProbe,
    Method,
    ModelSpec,
    Partial,
    Section,
)
from finetune.spec.tasks import LOSSES, NOT_CONVEX, TASK_MEANINGS, TaskName

_TASKS = " ".join(f"{name}: {meaning}." for name, meaning in TASK_MEANINGS.items())
_OF_A_SOLVED_HEAD = ("l2", "views", "refit", "loss")  # the hyperparameters that a linear probe uses


def _name_means(key: str):  # type: ignore[no-untyped-def]
    """Return a validator that accepts a string for a section with only `key` set: ``model: resnet18``, ``method: full``."""
    return BeforeValidator(lambda given: {key: given} if isinstance(given, str) else given)


class JobSpec(Section):
    """The request for a fine-tuning job. `docs/spec.md` describes each field and its default."""

    model: Annotated[
        ModelSpec, _name_means("backbone"), Field(description="The network. A name alone is model.backbone: model: resnet50.")
    ] = ModelSpec(backbone=DEFAULT_BACKBONE)
    training_file: Annotated[
        str,
        Field(
            min_length=1,
            description="The labelled images: a folder, an archive, a table or an address; on a server also the id of an upload. "
            "Required.",
        ),
    ]
    validation_file: Annotated[
        str | None, Field(description="Labelled images to validate on, in any of the same formats. null: split off.")
    ] = None
    test_file: Annotated[str | None, Field(description="Labelled images to test on once, at the end. null: split off.")] = None
    task: Annotated[
        Literal["auto", TaskName],
        Field(description=f"{_TASKS} auto: detected from the labels."),
    ] = "auto"
    data: Annotated[DataSpec, Field(description="How the labelled images are read and split.")] = DataSpec()
    method: Annotated[
        Method, _name_means("type"), Field(description="What trains. A name alone is method.type: method: full.")
    ] = LinearProbe()
    hyperparameters: Annotated[
        Hyperparameters, Field(description="Training settings. Each auto is resolved and recorded in the run.")
    ] = Hyperparameters()
    augmentation: Annotated[
        AugmentationSpec,
        _name_means("policy"),
        Field(description="Augmentation. A name alone is augmentation.policy: augmentation: light."),
    ] = AugmentationSpec()
    export: Annotated[ExportSpec, Field(description="How the trained model is exported and registered.")] = ExportSpec()
    compute: Annotated[ComputeSpec, Field(description="Device, precision and threads.")] = ComputeSpec()
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of training. The split has its own seed, data.split_seed.")] = 0
    suffix: Annotated[
        str | None,
        Field(pattern=SUFFIX_PATTERN, description="Name of the registered model. null: derived from the name of the data."),
    ] = None
    metadata: Annotated[
        dict[str, str], Field(max_length=64, description="Your own keys and values, kept with the job and its run.")
    ] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _loss_fits(self) -> JobSpec:
        loss = self.hyperparameters.loss
        if loss in NOT_CONVEX and self.method.type == "linear_probe":
            raise ValueError(
                f"hyperparameters.loss: {loss} is for training by steps, and linear_probe takes none: its head is solved, "
                "which needs a convex loss. Choose method partial, full or gradual"
            )
        if loss != "auto" and loss not in LOSSES.get(self.task, (loss,)):
            raise ValueError(f"hyperparameters.loss: {loss} is not a loss of task {self.task}; leave it at auto")
        return self

    def without_effect(self) -> tuple[str, ...]:
        """Return the field paths that were given although the method ignores them: a linear probe takes no optimiser steps."""
        if self.method.type != "linear_probe":
            return ()
        given = self.hyperparameters.model_dump(exclude_defaults=True)
        head = self.model.head.model_dump(exclude_defaults=True)
        return (
            *(f"hyperparameters.{name}" for name in given if name not in _OF_A_SOLVED_HEAD),
            *(f"model.head.{name}" for name in head if name != "pooling"),
        )

    @property
    def refits(self) -> bool:
        """Whether the final model is trained on the validation images too, after epochs were chosen on them."""
        return self.data.folds is not None if self.hyperparameters.refit == "auto" else self.hyperparameters.refit

    def digest(self) -> str:
        """Return the sha256 of the spec in canonical JSON."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_absolute_paths(self) -> JobSpec:
        """Return the spec with absolute paths, for use from another working directory.

        Raises:
            InvalidInput: a file or folder in the spec does not exist.
        """
        found = {}
        for name in ("training_file", "validation_file", "test_file"):
            if (given := getattr(self, name)) is not None and "://" not in given:
                if not Path(given).exists():
                    raise InvalidInput(f"{name}: {given}: no such file or folder")
                found[name] = str(Path(given).absolute())
        weights = Path(self.model.weights)
        model = self.model.model_copy(update={"weights": str(weights.absolute())}) if weights.is_file() else self.model
        model = model.model_copy(update={"backbone": absolute_backbone(model.backbone)})
        data = self.data
        named = {name: getattr(data, name) for name in ("split_file", "manifest")}
        data = data.model_copy(update={name: str(Path(path).absolute()) for name, path in named.items() if path is not None})
        return self.model_copy(update={**found, "model": model, "data": data})

    def to_yaml(self) -> str:
        """Return the spec as YAML text with all fields, in the order of their definition."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelSpec, "head": HeadSpec, "data": DataSpec, "hyperparameters": Hyperparameters,
    "augmentation": AugmentationSpec, "export": ExportSpec, "compute": ComputeSpec,
}  # fmt: skip
METHOD_SECTIONS: Mapping[str, type[Section]] = {
    "linear_probe": LinearProbe, "partial": Partial, "full": Full, "gradual": Gradual, "auto": AutoMethod,
}  # fmt: skip


def fields_called(name: str) -> list[str]:
    """Return the paths of the fields that a name means which is given without its section.

    ``learning_rate`` and its abbreviation ``lr`` mean ``hyperparameters.learning_rate``. Fields with this very name come first.
    """
    sections = {section: list(kind.model_fields) for section, kind in SECTIONS.items() if section != "head"}
    of_methods = dict.fromkeys(key for kind in METHOD_SECTIONS.values() for key in kind.model_fields if key != "type")
    keys = {"": list(JobSpec.model_fields), **sections, "model.head": list(HeadSpec.model_fields), "method": list(of_methods)}
    found = [(section, name) for section, names in keys.items() if name in names] or keys_called_in(keys, name)
    return [f"{section}.{key}".lstrip(".") for section, key in found]


def parse_spec(given: Mapping[str, Any]) -> JobSpec:
    """Validate a mapping as a job spec.

    Raises:
        SpecError: the spec is invalid; it has one `Problem` per mistake, with its field path.
    """
    try:
        return JobSpec.model_validate(dict(given))
    except ValidationError as error:
        problems = problems_of(error, given, JobSpec, {**SECTIONS, **METHOD_SECTIONS}, elsewhere=SECTIONS)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise SpecError(f"the job spec has {count}", problems) from None
