"""JobSpec: the validated, immutable request for a fine-tuning job, from the command line, HTTP or Python.

A YAML file, CLI flags with ``--set key.path=value``, Python keywords and an HTTP body all become a mapping. `parse_spec` converts
a mapping to a `JobSpec`, or reports all problems at once. ``auto`` values stay ``auto`` here; `finetune.training.recipe` resolves
them from facts about the data, the backbone and the machine. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from finetune.errors import InvalidInput, NotFound, Problem, SpecError, did_you_mean

DEFAULT_BACKBONE = "tf_efficientnet_lite0"

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

    pooling: Annotated[
        Literal["avg", "max", "avgmax", "gem"],
        Field(
            description="How the feature map is reduced to one vector per image: global average pooling (avg), global max "
            "pooling, "
            "the mean of both (avgmax), or generalised mean with exponent 3 (gem). Class activation maps are exact with avg."
        ),
    ] = "avg"
    dropout: Annotated[
        Auto | Fraction,
        Field(description="Dropout rate between pooling and the linear layer, in training by steps; a solved head has none."),
    ] = "auto"
    aux: Annotated[
        bool | str | None,
        Field(
            description="Train an auxiliary classifier on an intermediate stage, as in Inception, and drop it at export: "
            "true for "
            "the last stage but one, or the name of a stage. For methods that train by steps."
        ),
    ] = None


LOCAL_FOLDER, ON_HUB = "local-dir:", "hf-hub:"  # timm's prefixes of models in a folder and on the hub
_REGISTERED = r"[a-z0-9][a-z0-9._-]{0,62}@[1-9][0-9]*"


_HUB_PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"  # the hub's rule for names
_HUB_NAME = rf"({_HUB_PART})/({_HUB_PART})(@[A-Za-z0-9][A-Za-z0-9._/-]{{0,199}})?"


def is_own_model(backbone: str) -> bool:
    """Return whether ``model.backbone`` refers to a model made by finetune: ``name@version``, or a run or bundle folder."""
    if backbone.startswith((LOCAL_FOLDER, ON_HUB)):
        return False
    return "@" in backbone or "/" in backbone or backbone.startswith(".")


def is_registered_model(backbone: str) -> bool:
    """Return whether ``model.backbone`` refers to a registered version by its number."""
    return re.fullmatch(_REGISTERED, backbone) is not None


class ModelSpec(Section):
    """The pretrained backbone, the source of its weights, and the head."""

    backbone: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1000,
            description="The pretrained network: a timm name such as resnet50, local-dir:FOLDER, hf-hub:OWNER/NAME, or a "
            "model of "
            "your own as name@version or as the folder of a run.",
        ),
    ] = DEFAULT_BACKBONE
    weights: Annotated[
        str,
        Field(
            description="Where the initial weights come from: package (installed with finetune), hub (downloaded from timm's "
            "hub), "
            "auto (package if it has them, else hub), none (random initialisation), or the path of a .pth or .safetensors file."
        ),
    ] = "auto"
    input_size_px: Annotated[
        Auto | Annotated[int, Field(ge=32, le=1024)],
        Field(description="Side of the square input images in pixels. auto: the size that the weights were trained with."),
    ] = "auto"
    head: Annotated[HeadSpec, Field(description="The head: pooling, dropout and one linear layer.")] = HeadSpec()

    @field_validator("backbone")
    @classmethod
    def _is_a_name_that_the_hub_can_have(cls, backbone: str) -> str:
        if backbone.startswith(ON_HUB) and not re.fullmatch(_HUB_NAME, backbone.removeprefix(ON_HUB)):
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

    val_fraction: Annotated[
        float, Field(gt=0.0, lt=0.9, description="Share of the images to validate on, if no validation images are given.")
    ] = 0.15
    test_fraction: Annotated[
        Auto | Fraction,
        Field(
            description="Share of the images to test on, if no test images are given. auto: 0.15, or 0 with data.folds, which "
            "tests on every image."
        ),
    ] = "auto"
    split_seed: Annotated[
        int,
        Field(
            ge=0,
            lt=2**32,
            description="Seed of the split into train, val and test. The seed of training does not change the split, so that "
            "runs "
            "with different seeds are compared on the same images.",
        ),
    ] = 0
    split_file: Annotated[
        str | None,
        Field(
            min_length=1,
            description="The split.csv of an earlier run: its images stay in the same split, and only new images are drawn.",
        ),
    ] = None
    revision: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9a-f]{8,64}$",
            description="The revision of the data that is expected, as finetune data show prints it; other data is refused.",
        ),
    ] = None
    manifest: Annotated[
        str | None,
        Field(
            min_length=1,
            description="A CSV file of corrections, written by finetune check --fix: labels, groups, and images to leave out.",
        ),
    ] = None
    file_column: Annotated[Column, Field(description="The column of a table that names the image files. null: detected.")] = None
    label_column: Annotated[Column, Field(description="The column of a table with the labels. null: detected.")] = None
    split_column: Annotated[
        Column, Field(description="The column of a table that says train, val or test. null: detected, if there is one.")
    ] = None
    group_column: Annotated[
        Column,
        Field(
            description="The column of a table with the group of an image, such as a patient: images of one group are never in "
            "two splits or folds."
        ),
    ] = None
    weight_column: Annotated[
        Column,
        Field(
            description="The column of a table with the weight of an image in the training loss, 0 or more. Metrics count every "
            "image once."
        ),
    ] = None
    label_separator: Annotated[
        str | None,
        Field(min_length=1, max_length=8, description="The text between several labels in one cell of a table, such as |."),
    ] = None
    _separates = field_validator("label_separator", mode="before")(_no_empty_separator)
    splits: Annotated[
        dict[str, Literal["train", "val", "test", "none", "class"]],
        Field(
            max_length=1000,
            description="What the names of folders, or the values of the split column, mean, as in {dev_set: val, extra: none}: "
            "train, val, test, none (left out) or class (a class of that name).",
        ),
    ] = Field(default_factory=dict)
    class_folder: Annotated[
        Literal["auto", "first", "last"],
        Field(description="Which of nested folders names the class: first is the outermost, last the innermost."),
    ] = "auto"
    name_encoding: Annotated[
        str,
        Field(
            max_length=40,
            description="Encoding of the file names in archives that do not state it, such as cp437, cp932 or gbk. auto: "
            "detected.",
        ),
    ] = "auto"
    within: Annotated[
        tuple[str, ...] | None,
        Field(description="The only folders that links and tables may point into. A server sets this for its jobs."),
    ] = None
    class_weights: Annotated[
        Literal["none", "balanced", "effective_number", "sampling"],
        Field(
            description="Weight of an image in the training loss by the size of its class: balanced is one over the number of "
            "images of the class, effective_number is less steep, sampling draws every class equally often."
        ),
    ] = "none"
    logit_adjustment: Annotated[
        float,
        Field(
            ge=0.0,
            le=2.0,
            description="Strength of logit adjustment for classes of different size: 1 optimises the mean recall over classes, "
            "0 switches it off. An alternative to class_weights.",
        ),
    ] = 0.0
    on_bad_image: Annotated[
        Literal["quarantine", "fail"],
        Field(description="What to do with an image that cannot be read: leave it out and report it (quarantine), or fail."),
    ] = "quarantine"
    max_bad_fraction: Annotated[Fraction, Field(description="Fail if a larger share of the images than this cannot be read.")] = (
        0.05
    )
    resize: Annotated[
        Literal["auto", "crop", "squash", "letterbox"],
        Field(
            description="How an image becomes a square: crop its centre, squash it (change its aspect ratio), or letterbox "
            "it (add "
            "borders). auto: chosen by the shapes of the images."
        ),
    ] = "auto"
    folds: Annotated[
        Annotated[int, Field(ge=2, le=50)] | None,
        Field(
            description="Cross-validate with this number of folds, each tested on other images, then train on all images. "
            "null: one split."
        ),
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


BatchNormPolicy = Annotated[
    Literal["frozen", "train", "recalibrate"],
    Field(
        description="Batch normalisation in the stages that train: frozen keeps the running statistics of the pretrained "
        "weights, "
        "train updates them at every step, recalibrate estimates them once at the end."
    ),
]
WarmHead = Annotated[
    bool,
    Field(description="Solve the head on frozen features before the first step, so that early steps do not harm the backbone."),
]
LayerDecay = Annotated[
    Auto | Annotated[float, Field(gt=0.0, le=1.0)],
    Field(description="Ratio of the learning rate of a stage to that of the stage above it. 1: the same for all stages."),
]
MethodType = Field(description="The method: which part of the network trains.")


class LinearProbe(Section):
    """Freeze the whole backbone and fit only the linear head on its features."""

    type: Annotated[Literal["linear_probe"], MethodType] = "linear_probe"


class Partial(Section):
    """Train the head and the last stages: `stages` counts them from the top (default 1), `train` names them."""

    type: Annotated[Literal["partial"], MethodType] = "partial"
    stages: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="How many stages train, counted from the top. null: 1, unless train names them."),
    ] = None
    train: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1)] | None,
        Field(description="The stages that train, by name, as finetune backbones NAME lists them: [layer3, layer4]."),
    ] = None
    warm_head: WarmHead = True
    bn: BatchNormPolicy = "frozen"

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Partial:
        if self.stages is not None and self.train is not None:
            raise ValueError("give either stages (a number from the top) or train (a list of stage names), not both")
        return self


class Full(Section):
    """Train all stages. `warm_head` fits the head on frozen features first (LP-FT, Kumar et al. 2022, arXiv:2202.10054)."""

    type: Annotated[Literal["full"], MethodType] = "full"
    warm_head: WarmHead = True
    layer_decay: LayerDecay = "auto"
    bn: BatchNormPolicy = "frozen"


class Gradual(Section):
    """Unfreeze stage by stage from the top, one phase each (ULMFiT, Howard & Ruder 2018, arXiv:1801.06146)."""

    type: Annotated[Literal["gradual"], MethodType] = "gradual"
    warm_head: WarmHead = True
    epochs_per_stage: Annotated[
        Auto | Annotated[int, Field(ge=1)],
        Field(description="Epochs between unfreezing one stage and the next. auto: n_epochs divided by the number of stages."),
    ] = "auto"
    layer_decay: LayerDecay = "auto"
    bn: BatchNormPolicy = "frozen"


class AutoMethod(Section):
    """Start with the linear probe, train more stages while that improves the model, and keep the best."""

    type: Annotated[Literal["auto"], MethodType] = "auto"


MethodName = Literal["linear_probe", "partial", "full", "gradual", "auto"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
Method = Annotated[LinearProbe | Partial | Full | Gradual | AutoMethod, Field(discriminator="type")]


class Hyperparameters(Section):
    """Training settings. Every ``auto`` is resolved from the data, the backbone and the machine; the run records the values."""

    n_epochs: Annotated[
        Auto | Annotated[int, Field(ge=1, le=10_000)],
        Field(description="Number of epochs of the methods that train by steps. A linear probe takes no steps."),
    ] = "auto"
    batch_size: Annotated[Auto | Annotated[int, Field(ge=1, le=4096)], Field(description="Images per optimiser step.")] = "auto"
    train_size_px: Annotated[
        Auto | Annotated[int, Field(ge=32, le=1024)],
        Field(
            description="Side of the training images in pixels, for full and gradual; evaluation always uses "
            "model.input_size_px. "
            "auto: 0.8 of that size for pretrained weights."
        ),
    ] = "auto"
    learning_rate: Annotated[
        Auto | Annotated[float, Field(gt=0.0, le=10.0)],
        Field(description="Peak learning rate (AdamW) of the head and the topmost stage; lower stages get less (layer_decay)."),
    ] = "auto"
    learning_rate_multiplier: Annotated[
        Auto | Annotated[float, Field(gt=0.0, le=100.0)],
        Field(description="Factor on the learning rate, whether that is given or auto."),
    ] = "auto"
    weight_decay: Annotated[
        Auto | Annotated[float, Field(ge=0.0, le=10.0)],
        Field(description="Weight decay (decoupled L2 regularisation, AdamW) of training by steps; not on biases and norms."),
    ] = "auto"
    loss: Annotated[
        Literal["auto", "cross_entropy", "binary_cross_entropy", "asymmetric"],
        Field(
            description="The loss of training by steps: cross_entropy for one label per image, binary_cross_entropy (the "
            "default) "
            "or asymmetric for several."
        ),
    ] = "auto"
    label_smoothing: Annotated[
        Auto | Annotated[float, Field(ge=0.0, lt=1.0)],
        Field(description="Label smoothing of training by steps. 0: off."),
    ] = "auto"
    mixup: Annotated[
        float, Field(ge=0.0, le=10.0, description="Mixup: the alpha of the Beta distribution that images are mixed by. 0: off.")
    ] = 0.0
    warmup_fraction: Annotated[
        Auto | Annotated[float, Field(ge=0.0, lt=1.0)],
        Field(description="Share of the steps of each phase in which the learning rate rises linearly to its peak."),
    ] = "auto"
    early_stopping_epochs: Annotated[
        Auto | Annotated[int, Field(ge=1)] | None,
        Field(description="Stop after this number of epochs without improvement on the validation images. null: never."),
    ] = "auto"
    ema: Annotated[Auto | bool, Field(description="Evaluate and export an exponential moving average of the weights.")] = "auto"
    l2: Annotated[
        Auto | Annotated[float, Field(ge=0.0)],
        Field(description="L2 regularisation strength of the solved head. auto: chosen on the validation images."),
    ] = "auto"
    views: Annotated[
        Auto | Annotated[int, Field(ge=1, le=64)],
        Field(description="Augmented views of each image that the frozen stages are computed for and that are cached."),
    ] = "auto"
    refit: Annotated[
        Auto | bool,
        Field(
            description="Train once more at the end, on the training and validation images together, with what validation chose. "
            "auto: only with data.folds."
        ),
    ] = "auto"


class AugmentationSpec(Section):
    """A named policy, or explicit albumentations transforms: ``[{RandomCrop: {height: 200, width: 200}}, …]``."""

    policy: Annotated[
        Literal["none", "light", "default", "strong"],
        Field(
            description="Random changes of the training images: light crops slightly and never mirrors (for digits and text), "
            "default also mirrors, strong adds rotation, shear, blur and erasing."
        ),
    ] = "default"
    transforms: Annotated[
        tuple[dict[str, dict[str, Any]], ...] | None,
        Field(description="A list of albumentations transforms in place of the policy: [{HorizontalFlip: {p: 0.5}}]."),
    ] = None


class ExportSpec(Section):
    """How the trained model is exported and registered."""

    register_model: Annotated[
        Literal["auto", "always"],
        Field(
            description="auto registers the model as a new version unless it is no better than always predicting the same class; "
            "always registers it in any case."
        ),
    ] = "auto"
    quantize: Annotated[
        Literal["none", "int8"],
        Field(description="Quantise the exported model to int8; kept only if it is as accurate on the validation images."),
    ] = "none"


class ComputeSpec(Section):
    """Device, precision and threads. A run resumes bit-equal only with its original device and number of threads."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="Where to train. auto: a GPU if there is one.")] = "auto"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="Number format of the computation. auto: measured on this machine."),
    ] = "auto"
    threads: Annotated[
        Auto | Annotated[int, Field(ge=1, le=1024)], Field(description="CPU threads. auto: the cores available to the process.")
    ] = "auto"


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
        Literal["auto", "multiclass", "multilabel"],
        Field(
            description="multiclass: exactly one label per image. multilabel: several labels, or none. auto: detected from "
            "the labels."
        ),
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
        if loss == "asymmetric" and self.method.type == "linear_probe":
            raise ValueError(
                "hyperparameters.loss: asymmetric is for training by steps, and linear_probe takes none: its head is solved, "
                "which needs a convex loss. Choose method partial, full or gradual"
            )
        if loss != "auto" and loss not in LOSSES.get(self.task, (loss,)):
            raise ValueError(f"hyperparameters.loss: {loss} is not a loss of task {self.task}; leave it at auto")
        return self

    @property
    def refits(self) -> bool:
        """Whether the final model is trained on the validation images too, after epochs were chosen on them."""
        return self.data.folds is not None if self.hyperparameters.refit == "auto" else self.hyperparameters.refit

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


def absolute_backbone(backbone: str) -> str:
    """Return ``model.backbone``, made absolute if it is a folder."""
    if backbone.startswith(LOCAL_FOLDER):
        return f"{LOCAL_FOLDER}{Path(backbone.removeprefix(LOCAL_FOLDER)).absolute()}"
    is_folder = is_own_model(backbone) and not is_registered_model(backbone)
    return str(Path(backbone).absolute()) if is_folder else backbone


def parse_spec(given: Mapping[str, Any]) -> JobSpec:
    """Validate a mapping as a job spec.

    Raises:
        SpecError: the spec is invalid; it has one `Problem` per mistake, with its field path.
    """
    try:
        return JobSpec.model_validate(dict(given))
    except ValidationError as error:
        problems = problems_of(error, given)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise SpecError(f"the job spec has {count}", problems) from None


def load_spec(path: Path | None = None, overrides: Mapping[str, Any] | None = None, settings: Iterable[str] = ()) -> JobSpec:
    """Read a YAML spec file, apply `overrides` (nested mapping), then `settings` (``key.path=value`` with YAML values).

    Raises:
        NotFound: the file does not exist.
        SpecError: the file is not YAML, a setting is not ``key=value``, or the result is not a valid spec.
    """
    return parse_spec(merged_mapping(path, overrides, settings))


def merged_mapping(
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    settings: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the mapping that `load_spec` validates: the file with `overrides` and then `settings` applied.

    Args:
        settings: ``key.path=value`` strings with YAML values.
        values: ``key.path`` -> value, applied last.
    """
    merged: dict[str, Any] = _read_yaml(path) if path else {}
    for key_path, value in [*_flatten(overrides or {}), *(_parse_setting(setting) for setting in settings)]:
        _assign(merged, key_path, value)
    for key, value in (values or {}).items():
        _assign(merged, tuple(key.split(".")), value)
    return merged


def with_settings(spec: JobSpec, settings: Mapping[str, Any]) -> JobSpec:
    """Return the spec with some fields changed (``key.path`` -> value).

    Raises:
        SpecError: the result is not a valid spec.
    """
    changed = spec.model_dump(mode="json")
    for key, value in settings.items():
        _assign(changed, tuple(key.split(".")), value)
    return parse_spec(changed)


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


_PUNCTUATION = re.compile(r"\s*[^\w\s\[\]{}'\"~]+\s*")  # such as | ; and , which YAML takes for syntax and which are separators


def _parse_setting(setting: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"--set {setting!r}: expected key.path=value, for example hyperparameters.n_epochs=5")
    path = tuple(key.strip().split("."))
    if _PUNCTUATION.fullmatch(text):
        return path, text.strip()
    try:
        return path, yaml.safe_load(text)
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


def problems_of(
    error: ValidationError,
    given: Mapping[str, Any],
    root: type[Section] = JobSpec,
    sections: Mapping[str, type[Section]] | None = None,
) -> list[Problem]:
    """Convert pydantic's errors to one problem per field; errors of a union's branches are merged.

    Args:
        root: the model that `given` was validated against.
        sections: the section class of each key of `root`; by default those of a job spec.
    """
    requirements: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    sentences: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        where = _field_path(detail, given)
        if sentence := _plain_sentence(detail, root, _SECTIONS if sections is None else sections):
            sentences[where] = sentence
        else:
            requirements.setdefault(where, []).append(_requirement(detail))
            values[where] = detail["input"]
    for where, allowed in requirements.items():
        allowed.sort(key="'auto'".__eq__)  # 'auto', which many fields allow, comes last
        sentences.setdefault(where, f"must be {' or '.join(dict.fromkeys(allowed))}, given {values[where]!r}")
    return [Problem(where, sentence) for where, sentence in sentences.items()]


def _field_path(detail: Any, given: Any) -> str:
    """Return the field path of an error, without the names that pydantic adds for branches of unions."""
    location = detail["loc"]
    path = ""
    value: Any = given
    for position, part in enumerate(location):
        names_absent_key = detail["type"] == "missing" and position == len(location) - 1
        if isinstance(part, int):
            path += f"[{part}]"
            value = value[part] if isinstance(value, Sequence) and part < len(value) else None
        elif isinstance(value, Mapping) and (part in value or names_absent_key):
            path += f".{part}" if path else part
            value = value.get(part)
    return path


def _plain_sentence(detail: Any, root: type[Section], sections: Mapping[str, type[Section]]) -> str | None:
    """Return the message of an error that is not of the form "must be …", else None."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{_meant_instead(detail['loc'], root, sections)}"
    if kind == "missing":
        return "required, and not given"
    if kind == "union_tag_invalid":
        tag = str(context["tag"])
        return f"unknown type {tag!r}; allowed are {', '.join(METHODS)}.{did_you_mean(tag, METHODS)}"
    if kind == "union_tag_not_found":
        return f"needs a type as well, such as --method partial; allowed are {', '.join(METHODS)}"
    if kind == "value_error":
        return str(detail["msg"]).removeprefix("Value error, ")
    return None


_REQUIREMENTS = {
    "model_type": "a section (a mapping of keys)", "model_attributes_type": "a section (a mapping of keys)",
    "dict_type": "a mapping",
    "tuple_type": "a list", "string_type": "a text", "int_type": "a whole number", "int_parsing": "a whole number",
    "int_from_float": "a whole number", "float_type": "a number", "float_parsing": "a number", "bool_type": "true or false",
    "bool_parsing": "true or false", "finite_number": "a finite number",
}  # fmt: skip


def _requirement(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "string_pattern_mismatch" and context["pattern"] == SUFFIX_PATTERN:
        return "at most 63 lower-case letters, digits, '.', '_' and '-', beginning with a letter or a digit, such as my-flowers"
    if kind == "string_pattern_mismatch":
        return f"a text that matches {context['pattern']}"
    if kind in ("string_too_short", "string_too_long"):
        bound, number = ("least", context["min_length"]) if kind == "string_too_short" else ("most", context["max_length"])
        return f"a text of at {bound} {number} character{'' if number == 1 else 's'}"
    if kind in ("model_type", "model_attributes_type") and detail["loc"] and detail["loc"][-1] in _SHORTHAND:
        return "a name or a section (a mapping of keys)"
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"{'a mapping' if context['field_type'] == 'Dictionary' else 'a list'} of {bound}"
    return _REQUIREMENTS.get(kind) or str(detail["msg"]).removeprefix("Input should be ").removeprefix("Value should be ")


_SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelSpec, "head": HeadSpec, "data": DataSpec, "hyperparameters": Hyperparameters,
    "augmentation": AugmentationSpec, "export": ExportSpec, "compute": ComputeSpec,
}  # fmt: skip
METHOD_SECTIONS: Mapping[str, type[Section]] = {
    "linear_probe": LinearProbe, "partial": Partial, "full": Full, "gradual": Gradual, "auto": AutoMethod,
}  # fmt: skip


_NAMES_OF_OTHER_TOOLS = {
    "img_size": "input_size_px", "image_size": "input_size_px", "imgsz": "input_size_px", "size": "input_size_px",
    "patience": "early_stopping_epochs", "architecture": "backbone", "arch": "backbone",
}  # fmt: skip


def _keys_called(given: str, allowed: Sequence[str]) -> list[str]:
    """Return the keys that an abbreviation (``lr``, ``test``) or the name in another tool refers to."""
    if len(given) < 2:
        return []
    short = [
        key
        for key in allowed
        if "".join(word[0] for word in key.split("_")) == given or key.startswith(f"{given}_") or key.endswith(f"_{given}")
    ]
    return short or [key for key in allowed if key == _NAMES_OF_OTHER_TOOLS.get(given)]


def _meant_instead(location: Sequence[str | int], root: type[Section], sections: Mapping[str, type[Section]]) -> str:
    """Return a hint for an unknown key: a similar key of the same or another section, or the list of allowed keys."""
    section = root
    for part in location[:-1]:
        section = {**sections, **METHOD_SECTIONS}.get(str(part), section)
    given, allowed = str(location[-1]), list(section.model_fields)
    if near := _keys_called(given, allowed):
        return f". Did you mean {' or '.join(map(repr, near))}?"
    others = {name: list(other.model_fields) for name, other in sections.items()} if root is JobSpec else {}
    if exact := [f"{name}.{given}" for name, fields in others.items() if given in fields]:
        return f". Did you mean {exact[0]!r}?"
    if spelled := did_you_mean(given, allowed):
        return f".{spelled}"
    if meant := [f"{name}.{key}" for name, fields in others.items() for key in _keys_called(given, fields)]:
        return f". Did you mean {meant[0]!r}?"
    return f"; allowed {'are' if len(allowed) > 1 else 'is'} {', '.join(allowed)}{section.HINT}"
