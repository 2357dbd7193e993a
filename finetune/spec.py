"""JobSpec: the one validated, immutable request for a fine-tuning job, whatever door it came through.

A YAML file, CLI flags with ``--set key.path=value``, Python keywords and an HTTP body all become a mapping, and
`parse_spec` turns a mapping into a `JobSpec` or reports every problem at once. ``auto`` stays ``auto`` here: it is resolved
in `finetune.train.recipe`, from facts about the data, the backbone and the machine that this module does not know. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from finetune.errors import NotFound, Problem, SpecError, did_you_mean

DEFAULT_BACKBONE = "tf_efficientnet_lite0"

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
SUFFIX_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class _Section(BaseModel):
    """Unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class HeadSpec(_Section):
    """What is put on top of the backbone: pooling over positions, dropout, one linear layer."""

    pooling: Literal["avg", "max", "avgmax", "gem"] = "avg"
    dropout: Auto | Fraction = "auto"
    aux: Annotated[
        bool | str | None,
        Field(description="Auxiliary classifier during training, dropped at export: true (the architecture's own) or a stage name."),
    ] = None


class ModelSpec(_Section):
    """Which pretrained backbone, where its weights come from, and the head."""

    backbone: str = Field(DEFAULT_BACKBONE, min_length=1, max_length=200)
    weights: Annotated[
        str,
        Field(description="auto (installed package, else timm's hub) | package | hub | none | path of a .pth or .safetensors file"),
    ] = "auto"
    input_size_px: Auto | Annotated[int, Field(ge=32, le=1024)] = "auto"
    head: HeadSpec = HeadSpec()


class DataSpec(_Section):
    """How the labelled images are read and divided."""

    val_fraction: Annotated[float, Field(gt=0.0, lt=0.9)] = 0.15
    test_fraction: Fraction = 0.15
    group_column: str | None = None
    on_bad_image: Literal["quarantine", "fail"] = "quarantine"
    max_bad_fraction: Fraction = 0.05
    resize: Literal["auto", "crop", "squash", "letterbox"] = "auto"
    folds: Annotated[int, Field(ge=2, le=50)] | None = None

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> DataSpec:
        if self.val_fraction + self.test_fraction >= 0.9:
            raise ValueError(f"val_fraction {self.val_fraction} + test_fraction {self.test_fraction} leaves under a tenth to train on")
        return self


BatchNormPolicy = Literal["frozen", "train", "recalibrate"]


class LinearProbe(_Section):
    """Feature extractor: the whole backbone is frozen and only the linear head is fitted."""

    type: Literal["linear_probe"] = "linear_probe"


class Partial(_Section):
    """Train the head and the last stages: `stages` counts them from the top (default 1), `train` names them."""

    type: Literal["partial"] = "partial"
    stages: Annotated[int, Field(ge=1)] | None = None
    train: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    warm_head: bool = True
    bn: BatchNormPolicy = "frozen"

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Partial:
        if self.stages is not None and self.train is not None:
            raise ValueError("give either stages (a number from the top) or train (a list of stage names), not both")
        return self


class Full(_Section):
    """Train everything. With `warm_head` the head is fitted on frozen features first (LP-FT, Kumar et al. 2022, arXiv:2202.10054)."""

    type: Literal["full"] = "full"
    warm_head: bool = True
    layer_decay: Auto | Annotated[float, Field(gt=0.0, le=1.0)] = "auto"
    bn: BatchNormPolicy = "frozen"


class Gradual(_Section):
    """Thaw stage by stage from the top, one phase each (ULMFiT, Howard & Ruder 2018, arXiv:1801.06146)."""

    type: Literal["gradual"] = "gradual"
    warm_head: bool = True
    epochs_per_stage: Auto | Annotated[int, Field(ge=1)] = "auto"
    layer_decay: Auto | Annotated[float, Field(gt=0.0, le=1.0)] = "auto"
    bn: BatchNormPolicy = "frozen"


class AutoMethod(_Section):
    """Start with the probe, go deeper only while it pays, keep the best."""

    type: Literal["auto"] = "auto"


METHODS = ("linear_probe", "partial", "full", "gradual", "auto")
Method = Annotated[LinearProbe | Partial | Full | Gradual | AutoMethod, Field(discriminator="type")]


class Hyperparameters(_Section):
    """Training settings; every ``auto`` is resolved from the data, the backbone and the machine, and the run records how."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    learning_rate: Auto | Annotated[float, Field(gt=0.0, le=10.0)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0.0, le=100.0)] = "auto"
    weight_decay: Auto | Annotated[float, Field(ge=0.0, le=10.0)] = "auto"
    label_smoothing: Auto | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    mixup: Annotated[float, Field(ge=0.0, le=10.0, description="alpha of the Beta distribution; 0 is off")] = 0.0
    warmup_fraction: Auto | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    early_stopping_epochs: Auto | Annotated[int, Field(ge=1)] | None = "auto"
    ema: Auto | bool = "auto"
    l2: Auto | Annotated[float, Field(ge=0.0, description="L2 strength of the solved head; auto chooses it by validation")] = "auto"
    views: Auto | Annotated[int, Field(ge=1, le=64, description="cached augmented views per image, for frozen prefixes")] = "auto"


class AugmentationSpec(_Section):
    """A named policy, or explicit albumentations transforms: ``[{RandomCrop: {height: 200, width: 200}}, …]``."""

    policy: Literal["none", "light", "default", "strong"] = "default"
    transforms: tuple[dict[str, dict[str, Any]], ...] | None = None


class ExportSpec(_Section):
    quantize: Literal["none", "int8"] = "none"


class ComputeSpec(_Section):
    """Where and how it is computed. A run resumes bit-equal only with the device and the number of threads that it began with."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"


def _name_means(key: str):  # type: ignore[no-untyped-def]
    """A bare string stands for a section with only `key` set: ``model: resnet18``, ``method: full``, ``augmentation: light``."""
    return BeforeValidator(lambda given: {key: given} if isinstance(given, str) else given)


class JobSpec(_Section):
    """The request. See `docs/spec.md` for each field with its default."""

    model: Annotated[ModelSpec, _name_means("backbone")] = ModelSpec()
    training_file: str = Field(min_length=1)
    validation_file: str | None = None
    test_file: str | None = None
    data: DataSpec = DataSpec()
    method: Annotated[Method, _name_means("type")] = LinearProbe()
    hyperparameters: Hyperparameters = Hyperparameters()
    augmentation: Annotated[AugmentationSpec, _name_means("policy")] = AugmentationSpec()
    export: ExportSpec = ExportSpec()
    compute: ComputeSpec = ComputeSpec()
    seed: int = Field(0, ge=0, lt=2**32)
    suffix: str | None = Field(None, pattern=SUFFIX_PATTERN)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=64)

    def digest(self) -> str:
        """sha256 of the canonical JSON: equal specs have equal digests."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_spec(given: Mapping[str, Any]) -> JobSpec:
    """Validate a mapping.

    Raises:
        SpecError: with one `Problem` for each thing that is wrong, each with its field path.
    """
    try:
        return JobSpec.model_validate(dict(given))
    except ValidationError as error:
        problems = _problems(error, given)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise SpecError(f"the job spec has {count}", problems) from None


def load_spec(path: Path | None = None, overrides: Mapping[str, Any] | None = None, settings: Iterable[str] = ()) -> JobSpec:
    """Read a YAML spec file, lay `overrides` (nested mapping) over it, then `settings` (``key.path=value``, the value is YAML).

    Raises:
        NotFound: no such file.
        SpecError: the file is not YAML, a setting is not ``key=value``, or the result is not a valid spec.
    """
    merged: dict[str, Any] = _read_yaml(path) if path else {}
    for key_path, value in [*_flatten(overrides or {}), *(_parse_setting(setting) for setting in settings)]:
        _assign(merged, key_path, value)
    return parse_spec(merged)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NotFound(f"{path}: no such spec file. Give the path of a YAML file, or only flags: finetune train --data FOLDER")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(loaded, dict):
        raise SpecError(f"{path}: a spec is a mapping with at least training_file, found {type(loaded).__name__}")
    return loaded


def _flatten(nested: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    pairs: list[tuple[tuple[str, ...], Any]] = []
    for key, value in nested.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, (*prefix, key))
        else:
            pairs.append(((*prefix, key), value))
    return pairs


def _parse_setting(setting: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"--set {setting!r}: expected key.path=value, for example hyperparameters.n_epochs=5")
    try:
        return tuple(key.strip().split(".")), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {setting!r}: the value is not YAML: {error}") from None


_SHORTHAND = {"model": "backbone", "method": "type", "augmentation": "policy"}


def _assign(target: dict[str, Any], key_path: Sequence[str], value: Any) -> None:
    for depth, key in enumerate(key_path[:-1]):
        inner = target.get(key)
        if isinstance(inner, str) and depth == 0 and key in _SHORTHAND:
            inner = {_SHORTHAND[key]: inner}
        target[key] = target = dict(inner) if isinstance(inner, Mapping) else {}
    target[key_path[-1]] = value


def _problems(error: ValidationError, given: Mapping[str, Any]) -> list[Problem]:
    """Pydantic's errors as one problem a field: a union reports each of its branches, which readers see as one."""
    by_field: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        where = _field_path(detail["loc"], given)
        by_field.setdefault(where, []).append(_sentence(detail))
    return [Problem(where, " or ".join(dict.fromkeys(sentences))) for where, sentences in by_field.items()]


def _field_path(location: Sequence[str | int], given: Any) -> str:
    """The location without the names that pydantic adds for union branches (a branch name is not a key of what was given)."""
    parts: list[str] = []
    value: Any = given
    for position, part in enumerate(location):
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1]}[{part}]"] if parts else [f"[{part}]"]
            value = value[part] if isinstance(value, Sequence) and part < len(value) else None
        elif isinstance(value, Mapping) and (part in value or position == len(location) - 1):
            parts.append(part)
            value = value.get(part)
        elif not isinstance(value, Mapping) and not parts:
            parts.append(part)
    return ".".join(parts)


def _sentence(detail: Any) -> str:
    kind, context, given = detail["type"], detail.get("ctx", {}), detail.get("input")
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        return f"unknown key.{did_you_mean(name, _known_keys(detail['loc']))}"
    if kind == "missing":
        return "required, and not given"
    if kind == "union_tag_invalid":
        tag = str(context.get("tag"))
        return f"unknown type {tag!r}; allowed are {', '.join(METHODS)}.{did_you_mean(tag, METHODS)}"
    if kind == "literal_error":
        allowed = str(context["expected"])
        return f"must be {allowed}, given {given!r}"
    message = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    message = f"must be {message}" if str(detail["msg"]).startswith("Input should be ") else message
    return message if kind == "value_error" else f"{message}, given {given!r}"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys that are allowed beside the unknown one at `location`."""
    section: type[BaseModel] = JobSpec
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSpec, "head": HeadSpec, "data": DataSpec, "hyperparameters": Hyperparameters,
        "augmentation": AugmentationSpec, "export": ExportSpec, "compute": ComputeSpec,
        "linear_probe": LinearProbe, "partial": Partial, "full": Full, "gradual": Gradual, "auto": AutoMethod,
    }  # fmt: skip
    for part in location[:-1]:
        section = sections.get(str(part), section)
    return list(section.model_fields)
