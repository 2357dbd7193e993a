"""The sections of a job spec, with the type, the bounds and the default of each field. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from finetune.spec.backbones import DEFAULT_BACKBONE, HUB_NAME, ON_HUB, is_own_model, is_registered_model

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
SUFFIX_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


LOSSES: Mapping[str, tuple[str, ...]] = {
    "multiclass": ("cross_entropy",),
    "multilabel": ("binary_cross_entropy", "asymmetric"),
}
"""The losses that training can minimise, by task, the default first."""


class Section(BaseModel):
    """A section of a spec: unknown keys are errors, and values are immutable after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    HINT: ClassVar[str] = ""  # appended to the allowed keys in the error for an unknown key


class HeadSpec(Section):
    """The head on top of the backbone: pooling over positions, dropout, one linear layer."""

    pooling: Literal["avg", "max", "avgmax", "gem"] = "avg"
    dropout: Auto | Fraction = "auto"
    aux: Annotated[
        bool | str | None,
        Field(description="auxiliary classifier while training, dropped at export: true or a stage name"),
    ] = None


class ModelSpec(Section):
    """The pretrained backbone, the source of its weights, and the head."""

    backbone: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1000,
            description="a timm name, local-dir:FOLDER or hf-hub:OWNER/NAME; or one's own model: name@version, or a run's folder",
        ),
    ] = DEFAULT_BACKBONE
    weights: Annotated[
        str,
        Field(description="auto (installed package, else timm's hub) | package | hub | none | path of .pth or .safetensors"),
    ] = "auto"
    input_size_px: Auto | Annotated[int, Field(ge=32, le=1024)] = "auto"
    head: HeadSpec = HeadSpec()

    @field_validator("backbone")
    @classmethod
    def _is_a_name_that_the_hub_can_have(cls, backbone: str) -> str:
        if backbone.startswith(ON_HUB) and not re.fullmatch(HUB_NAME, backbone.removeprefix(ON_HUB)):
            raise ValueError(f"{backbone[:200]!r} is not of the form hf-hub:OWNER/NAME, as in hf-hub:timm/resnet18.a1_in1k")
        return backbone

    @model_validator(mode="after")
    def _own_models_bring_their_weights(self) -> ModelSpec:
        if not is_own_model(self.backbone):
            return self
        if self.weights != "auto":
            raise ValueError(f"{self.backbone} brings its own weights: leave model.weights at auto")
        if "@" in self.backbone and "/" not in self.backbone and not is_registered_model(self.backbone):
            raise ValueError(
                f"{self.backbone!r}: give a registered model with the number of its version, as in flowers@3; what an alias "
                "means can change while a job waits"
            )
        return self


Column = Annotated[str | None, Field(min_length=1, max_length=1000)]


def _no_empty_separator(given: Any) -> Any:
    """Refuse what YAML makes of a separator without quotes: ``label_separator: |`` begins a text there, which is empty."""
    if given == "":
        raise ValueError("an empty text separates nothing; in a YAML file, put the separator into quotes: label_separator: '|'")
    return given


class DataSpec(Section):
    """How the labelled images are read and split."""

    val_fraction: Annotated[float, Field(gt=0.0, lt=0.9)] = 0.15
    test_fraction: Annotated[Auto | Fraction, Field(description="auto: 0.15, and nothing with folds, which test every image")] = (
        "auto"
    )
    split_seed: Annotated[
        int, Field(ge=0, lt=2**32, description="of the split alone: runs with another seed are compared on the same images")
    ] = 0
    split_file: Annotated[
        str | None, Field(min_length=1, description="a split.csv of an earlier run: its images stay on the side they were on")
    ] = None
    revision: Annotated[
        str | None,
        Field(pattern=r"^[0-9a-f]{8,64}$", description="what finetune data show calls the data: anything else is refused"),
    ] = None
    manifest: Annotated[
        str | None,
        Field(min_length=1, description="corrections of finetune check --fix: labels, groups, images left out"),
    ] = None
    file_column: Column = None
    label_column: Column = None
    split_column: Column = None
    group_column: Annotated[Column, Field(description="images of one group are on one side of every split")] = None
    weight_column: Annotated[
        Column,
        Field(description="how much an image counts in the training loss, a number from 0 up; figures count every image once"),
    ] = None
    label_separator: Annotated[
        str | None, Field(min_length=1, max_length=8, description="between several labels in one cell of a table")
    ] = None
    _separates = field_validator("label_separator", mode="before")(_no_empty_separator)
    splits: Annotated[
        dict[str, Literal["train", "val", "test", "none", "class"]],
        Field(max_length=1000, description="what folder names, or values of the split column, mean; none leaves out"),
    ] = Field(default_factory=dict)
    class_folder: Annotated[
        Literal["auto", "first", "last"], Field(description="which of nested folders names the class: the outermost or innermost")
    ] = "auto"
    name_encoding: Annotated[
        str, Field(max_length=40, description="of names in archives that do not tell it, such as cp437, cp932 or gbk")
    ] = "auto"
    within: Annotated[
        tuple[str, ...] | None, Field(description="folders that links and tables may lead into; a server sets it for its jobs")
    ] = None
    class_weights: Annotated[
        Literal["none", "balanced", "effective_number", "sampling"],
        Field(
            description="weight of an image in the loss by its class: balanced is one over the class's images; sampling: steps "
            "see every class equally often"
        ),
    ] = "none"
    logit_adjustment: Annotated[
        float, Field(ge=0.0, le=2.0, description="1 aims at the mean of the classes' recall, whatever their sizes; 0 is off")
    ] = 0.0
    on_bad_image: Literal["quarantine", "fail"] = "quarantine"
    max_bad_fraction: Fraction = 0.05
    resize: Literal["auto", "crop", "squash", "letterbox"] = "auto"
    folds: Annotated[
        Annotated[int, Field(ge=2, le=50)] | None,
        Field(description="cross-validation: the whole job is done so many times, each time tested on other images"),
    ] = None

    @model_validator(mode="after")
    def _balances_once(self) -> DataSpec:
        if self.class_weights != "none" and self.logit_adjustment > 0:
            raise ValueError("give either class_weights or logit_adjustment: both make up for the classes' sizes")
        return self

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> DataSpec:
        if self.val_fraction + self.held_out_fraction >= 0.9:
            raise ValueError(
                f"val_fraction {self.val_fraction} + test_fraction {self.held_out_fraction} leaves under a tenth to train on"
            )
        return self

    @property
    def held_out_fraction(self) -> float:
        """The share of images that is split off for testing if no test images are given."""
        if self.test_fraction != "auto":
            return self.test_fraction
        return 0.15 if self.folds is None else 0.0


BatchNormPolicy = Literal["frozen", "train", "recalibrate"]


class LinearProbe(Section):
    """Freeze the whole backbone and fit only the linear head on its features."""

    type: Literal["linear_probe"] = "linear_probe"


class Partial(Section):
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


class Full(Section):
    """Train all stages. `warm_head` fits the head on frozen features first (LP-FT, Kumar et al. 2022, arXiv:2202.10054)."""

    type: Literal["full"] = "full"
    warm_head: bool = True
    layer_decay: Auto | Annotated[float, Field(gt=0.0, le=1.0)] = "auto"
    bn: BatchNormPolicy = "frozen"


class Gradual(Section):
    """Unfreeze stage by stage from the top, one phase each (ULMFiT, Howard & Ruder 2018, arXiv:1801.06146)."""

    type: Literal["gradual"] = "gradual"
    warm_head: bool = True
    epochs_per_stage: Auto | Annotated[int, Field(ge=1)] = "auto"
    layer_decay: Auto | Annotated[float, Field(gt=0.0, le=1.0)] = "auto"
    bn: BatchNormPolicy = "frozen"


class AutoMethod(Section):
    """Start with the linear probe, train more stages while that improves the model, and keep the best."""

    type: Literal["auto"] = "auto"


MethodName = Literal["linear_probe", "partial", "full", "gradual", "auto"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
Method = Annotated[LinearProbe | Partial | Full | Gradual | AutoMethod, Field(discriminator="type")]


class Hyperparameters(Section):
    """Training settings. Every ``auto`` is resolved from the data, the backbone and the machine; the run records the values."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    train_size_px: Annotated[
        Auto | Annotated[int, Field(ge=32, le=1024)],
        Field(description="side of the images that steps are taken on, for full and gradual; evaluation sees input_size_px"),
    ] = "auto"
    learning_rate: Auto | Annotated[float, Field(gt=0.0, le=10.0)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0.0, le=100.0)] = "auto"
    weight_decay: Auto | Annotated[float, Field(ge=0.0, le=10.0)] = "auto"
    loss: Annotated[
        Literal["auto", "cross_entropy", "binary_cross_entropy", "asymmetric"],
        Field(description="that steps minimise; auto: cross_entropy, for multilabel binary_cross_entropy (or asymmetric)"),
    ] = "auto"
    label_smoothing: Auto | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    mixup: Annotated[float, Field(ge=0.0, le=10.0, description="alpha of the Beta distribution; 0 is off")] = 0.0
    warmup_fraction: Auto | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    early_stopping_epochs: Auto | Annotated[int, Field(ge=1)] | None = "auto"
    ema: Auto | bool = "auto"
    l2: Auto | Annotated[float, Field(ge=0.0, description="L2 strength of the solved head; auto: by validation")] = "auto"
    views: Auto | Annotated[int, Field(ge=1, le=64, description="cached augmented views per image, for frozen prefixes")] = "auto"
    refit: Annotated[
        Auto | bool,
        Field(description="at the end train on train + val, with what val has chosen; auto: with data.folds only"),
    ] = "auto"


class AugmentationSpec(Section):
    """A named policy, or explicit albumentations transforms: ``[{RandomCrop: {height: 200, width: 200}}, …]``."""

    policy: Literal["none", "light", "default", "strong"] = "default"
    transforms: tuple[dict[str, dict[str, Any]], ...] | None = None


class ExportSpec(Section):
    """How the trained model is exported and registered."""

    register_model: Annotated[
        Literal["auto", "always"],
        Field(description="auto: as a new version, unless the model is no better than always giving the same answer"),
    ] = "auto"
    quantize: Literal["none", "int8"] = "none"


class ComputeSpec(Section):
    """Device, precision and threads. A run resumes bit-equal only with its original device and number of threads."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"


SHORTHAND = {"model": "backbone", "method": "type", "augmentation": "policy"}
"""The sections for which a text may be given instead, with the key that the text is the value of."""
